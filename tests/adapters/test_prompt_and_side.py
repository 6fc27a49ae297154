"""The prompt and side modules of S2A, on plain functions and on a packed Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from memjax import adapters, codecs, weights
from memjax.core.bytes import nbytes
from tests.models.checkpoints import checkpoint
from tests.random_views import array, assert_close

L, B, S, D = 3, 2, 5, 8


def stack(hidden=16):
    return {"up": array(0, L, D, hidden) / 3, "down": array(1, L, hidden, D) / 4}


def block(layer, x):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def trained(theta):
    leaves, tree = jax.tree.flatten(theta)
    return jax.tree.unflatten(tree, [0.3 * array(50 + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def naive(theta, layers, x):
    z, states = 0.0, []
    for i in range(L):
        x = block(jax.tree.map(lambda leaf, i=i: leaf[i], layers), x)
        states.append(x)
        z = z + jax.nn.gelu(lax.stop_gradient(x) @ theta["side"]["down"][i]) @ theta["side"]["up"][i]
    return x, z, jnp.stack(states)


def test_a_side_network_is_the_sum_of_its_rungs():
    side = adapters.side(3, D, L)
    assert side.nbytes() == (4 * 2 * 3 * D * L, 0)
    theta, layers, x = trained(side.init(jax.random.key(0))), stack(), array(2, B, S, D)
    packed = weights.quantize(layers, codecs.int8(group=4), "**")

    def run(theta, layers):
        h, z = side.run(theta, block, layers, x)
        return jnp.sum(jnp.cos(h + z)), (h, z)

    def expected(theta, layers):
        h, z, _ = naive(theta, layers, x)
        return jnp.sum(jnp.cos(lax.stop_gradient(h) + z)), (h, z)

    actual = jax.jit(jax.value_and_grad(weights.lift(run), has_aux=True))(theta, packed)
    wanted = jax.jit(jax.value_and_grad(expected, has_aux=True))(theta, weights.materialize(packed))
    assert_close(actual, wanted, 5e-6)
    assert_close(side.over(theta, naive(theta, layers, x)[2]), naive(theta, layers, x)[1])
    gradients = jax.grad(lambda layers: run(theta, layers)[0])(layers)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_the_backbone_keeps_nothing():
    def residuals(hidden, pool=None):
        side = adapters.side(3, D, L, pool=pool)
        layers = stack(hidden)

        def fn(theta):
            return side.run(theta, block, layers, jnp.ones((B, S, D)))

        theta = side.init(jax.random.key(0))
        kept = jax.tree.leaves(jax.eval_shape(lambda theta: jax.vjp(fn, theta)[1], theta))
        return nbytes(kept), [leaf.shape for leaf in kept]

    few, shapes = residuals(16)
    assert residuals(64)[0] == few  # of whatever width the blocks are
    inside = {3, D}  # the ladder's inputs and what is as wide as the ladder
    assert all(shape[-1] in inside for shape in shapes if shape)
    assert shapes.count((L, B, S, D)) == 1
    assert residuals(16, lambda h: jnp.mean(h, axis=1, keepdims=True))[0] < few


def test_a_fresh_ladder_beside_a_packed_llama_changes_nothing_and_learns():
    model = checkpoint("llama3")
    packed = weights.quantize(model.params, codecs.int8(group=8), "layers/**/kernel")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8)))
    side = adapters.side(4, model.config.hidden_size, model.config.num_layers)

    def hidden(params, theta):
        stages = model.stages(tokens)
        h, z = side.run(theta, stages.block, stages.layers(params), stages.embed(params))
        return stages.finish(params, h + z), model.hidden(params, tokens)

    theta = side.init(jax.random.key(0))
    ours, frozen = jax.jit(weights.lift(hidden))(packed, theta)
    assert_close(ours, frozen, 1e-6)

    target = jnp.roll(frozen, 1, axis=-1)

    def loss(theta):
        return jnp.mean(jnp.square(weights.lift(hidden)(packed, theta)[0] - target))

    tx = adapters.lora_plus(optax.adam, 3e-3, 4.0)

    def step(carry, _):
        theta, state = carry
        value, grads = jax.value_and_grad(loss)(theta)
        updates, state = tx.update(grads, state, theta)
        return (optax.apply_updates(theta, updates), state), value

    losses = jax.jit(lambda theta: lax.scan(step, (theta, tx.init(theta)), length=30)[1])(theta)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layers", [None, L])
def test_a_prompt_is_the_product_of_its_factors(layers, tmp_path):
    prompt = adapters.prompt(4, 2, D, layers=layers)
    theta = prompt.init(jax.random.key(0))
    assert prompt.nbytes() == (nbytes(theta), 0) == (4 * 2 * (4 + D) * (layers or 1), 0)
    a, b = theta["prompt"]["a"], theta["prompt"]["b"]
    prefix = prompt.prefix(theta)
    assert_close(prefix, jnp.einsum("...nr,...rd->...nd", a, b))
    assert np.linalg.matrix_rank(np.asarray(prefix).reshape(-1, 4, D)).max() == 2
    assert 0 < np.abs(prefix).max() < 0.1
    weights.save(tmp_path / "prompt.safetensors", theta)
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "prompt.safetensors"), theta)

    x = array(1, B, S, D).astype(jnp.bfloat16)
    if layers is None:
        longer = adapters.prepend(prefix, x)
        assert longer.dtype == jnp.bfloat16 and longer.shape == (B, 4 + S, D)
        np.testing.assert_array_equal(longer[:, 4:], x)
        np.testing.assert_array_equal(longer[1, :4], prefix.astype(jnp.bfloat16))


def test_a_prompt_of_a_packed_llama_learns():
    model = checkpoint("llama3")
    packed = weights.quantize(model.params, codecs.int8(group=8), "layers/**/kernel")
    prompt = adapters.prompt(3, 2, model.config.hidden_size, layers=model.config.num_layers)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8)))
    logits = weights.lift(model.logits)

    def loss(theta):
        out = logits(packed, tokens[:, :-1], prefix=prompt.prefix(theta))
        return optax.softmax_cross_entropy_with_integer_labels(out, tokens[:, 1:]).mean()

    tx = optax.adam(0.05)

    def step(carry, _):
        theta, state = carry
        value, grads = jax.value_and_grad(loss)(theta)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(theta, updates), state), value

    theta = prompt.init(jax.random.key(0))
    losses = jax.jit(lambda theta: lax.scan(step, (theta, tx.init(theta)), length=30)[1])(theta)
    assert losses[-1] < losses[0] - 0.2


def test_refusals():
    with pytest.raises(ValueError, match="1 <= rank <= min"):
        adapters.prompt(4, 5, 8)
    with pytest.raises(ValueError, match="numbers above 0"):
        adapters.side(0, 8, 2)
    with pytest.raises(ValueError, match="expected hidden states"):
        side = adapters.side(2, 8, 2)
        side.over(side.init(jax.random.key(0)), jnp.zeros((3, 1, 8)))
    with pytest.raises(ValueError, match="floating"):
        adapters.side(2, 8, 2, dtype=jnp.int32)
