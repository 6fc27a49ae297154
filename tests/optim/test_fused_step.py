import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax as mj
from memjax.core import compiled_bytes
from memjax.optim.fused_step import LossParts, fused_step, parts_of_stages

L, D, V, B = 6, 16, 24, 4


def problem(dtype=jnp.float32, features=D):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": jax.random.normal(keys[0], (V, features)),
        "layers": {
            "up": jax.random.normal(keys[1], (L, features, 2 * features)) / 4,
            "down": jax.random.normal(keys[2], (L, 2 * features, features)) / 8,
            "scale": jnp.ones((L, features)),
        },
        "head": jax.random.normal(keys[3], (features, V)) / 4,
        "unused": jnp.ones(3),
    }
    return jax.tree.map(lambda x: x.astype(dtype), params), (jnp.arange(B), jnp.arange(B) + 5)


def make_parts(tied=False):
    def block(layer, x, batch, index):
        return x + jnp.tanh((x * layer["scale"]) @ layer["up"]) @ layer["down"] * jnp.where(index == 1, 0.5, 1).astype(
            x.dtype
        )

    def head(params, x, batch):
        logits = (x @ (params["embed"].T if tied else params["head"])).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1))

    return LossParts(lambda params, batch: params["embed"][batch[0]], block, head)


def whole_loss(parts, params, batch):
    x = parts.embed(params, batch)
    numbers = jnp.arange(L, dtype=jnp.int32)
    body = jax.checkpoint(lambda x, layer: parts.block(layer[0], x, batch, layer[1]))
    x, _ = jax.lax.scan(lambda x, layer: (body(x, layer), None), x, (params["layers"], numbers))
    return parts.head(params, x, batch)


def two_phase(parts, tx):
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(lambda params: whole_loss(parts, params, batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (loss, optax.tree.norm(grads))

    return step


def run(step, params, state, batch, steps=3):
    step = jax.jit(step)
    for _ in range(steps):
        params, state, metrics = step(params, state, batch)
    return params, state, tuple(metrics)


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


def routed(params):
    return jax.tree.map_with_path(lambda keys, _: "a" if "up" in str(keys) else "b", params)


@pytest.mark.parametrize(
    ("tx", "features"),
    [
        (optax.adamw(optax.linear_schedule(1e-2, 0, 9), weight_decay=0.1), D),
        (mj.optim.adamw8bit(1e-3), 2 * D),
        (mj.optim.adamw8bit(1e-3, block=128, least=128), 6 * D),  # rows of ``scale`` do not fill blocks
    ],
)
def test_equals_gradients_update_and_apply(tx, features):
    params, batch = problem(features=features)
    got = run(fused_step(make_parts(), tx), params, tx.init(params), batch)
    assert_close(got[::2], run(two_phase(make_parts(), tx), params, tx.init(params), batch)[::2], 2e-5)


def test_frugal_by_layers():
    params, batch = problem()
    tx = mj.optim.frugal(1e-3, density=0.25, update_gap=2)
    _, state, metrics = run(fused_step(make_parts(), tx), params, tx.init(params), batch, 4)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    expected = run(two_phase(make_parts(), tx), params, tx.init(params), batch, 4)[2]
    np.testing.assert_allclose(metrics[0], expected[0], rtol=1e-2)


def test_tied_embedding_two_optimizers_and_clipping_by_the_global_norm():
    params, batch = problem()
    tx = optax.partition({"a": optax.sgd(1e-2, momentum=0.9), "b": optax.lion(1e-3)}, routed)
    clipped = optax.chain(optax.clip_by_global_norm(0.5), tx)
    parts = make_parts(tied=True)
    got = run(fused_step(parts, tx, clip=0.5, keep="residuals"), params, tx.init(params), batch)
    expected = run(two_phase(parts, clipped), params, clipped.init(params), batch)
    assert expected[2][1] > 0.5
    assert_close((got[0], got[2]), (expected[0], expected[2]), 5e-5)


def temporaries(step, tx, layers):
    params, batch = problem()
    params["layers"] = jax.tree.map(lambda x: jnp.concatenate([x] * (layers // L)), params["layers"])
    state = tx.init(params)
    found = compiled_bytes(jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile())
    assert found.alias >= mj.core.nbytes((params, state))  # all is updated in place
    return found.temp


def test_full_gradients_never_exist():
    params, _ = problem()
    tx, layer, kept = optax.adamw(1e-3), mj.core.nbytes(params["layers"]) // L, B * D * 4
    outer = mj.core.nbytes(params) - L * layer
    for step, tensors in (
        (fused_step(make_parts(), tx), 1),  # of the size of a layer's input
        (fused_step(make_parts(), tx, keep="residuals", clip=0.5), 6),
    ):
        first, second = temporaries(step, tx, L), temporaries(step, tx, 2 * L)
        assert second - first <= L * (tensors * kept + 80) < L * layer
        # A layer's gradient, its params and moments as they were and, in part, as they become.
        assert first < 4.5 * layer + 2 * outer + (L + 8) * tensors * kept + 2048
    assert temporaries(two_phase(make_parts(), tx), tx, L) > L * layer


def test_bfloat16_params_and_an_own_apply_with_key_and_number_of_the_layer():
    params, batch = problem(jnp.bfloat16)

    def apply(params, grads, state, key, layer):
        moved = layer + jax.random.uniform(key)
        return jax.tree.map(lambda p, g: p + (moved + 0 * g).astype(p.dtype), params, grads), state

    key = jax.random.key(3)
    new, _, _ = jax.jit(fused_step(make_parts(), optax.identity(), apply=apply))(params, optax.EmptyState(), batch, key)
    expected = [i + jax.random.uniform(jax.random.fold_in(key, i)) for i in range(L)]
    np.testing.assert_allclose(new["layers"]["scale"][:, 0].astype(jnp.float32) - 1, expected, atol=4e-2)
    assert new["embed"].dtype == jnp.bfloat16


def test_the_layer_number_reaches_the_optimizer():
    def update(grads, state, params=None, *, layer, **extra):
        return jax.tree.map(lambda g: jnp.zeros_like(g) + layer.astype(g.dtype), grads), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params, batch = problem()
    new, _, _ = jax.jit(fused_step(make_parts(), tx))(params, (), batch)
    np.testing.assert_allclose(new["layers"]["scale"][:, 0], 1 + np.arange(L))


def test_a_model_by_its_stages():
    config = mj.models.LlamaConfig(32, 16, 24, 2, 2, 1, 8, tie_embeddings=True)
    params = mj.models.random_params(config, jax.random.key(0))
    model = mj.models.Model(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)

    def nll(params, hidden, tokens):
        weight, axis = model.head(params)
        logits = jnp.tensordot(hidden, weight, ((2,), (axis,)))[:, :-1]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2))

    def reference(params, state, tokens):
        loss, grads = jax.value_and_grad(lambda p: nll(p, model.hidden(p, tokens), tokens))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (loss, optax.tree.norm(grads))

    tx = optax.sgd(1.0)  # Adam would blow up the rounding of gradients near zero
    parts = parts_of_stages(model.stages, nll)
    got = run(fused_step(parts, tx), params, tx.init(params), tokens, 1)
    assert_close(got, run(reference, params, tx.init(params), tokens, 1), 2e-5)


def test_optimizers_that_are_not_leaf_by_leaf():
    params, batch = problem()
    for tx, message in (
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), "depends on the gradient of .* clip="),
        (optax.apply_if_finite(optax.sgd(1.0), 3), "depends on the gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_step(make_parts(), tx)(params, tx.init(params), batch)

    def norms(grads, state, params=None):
        return grads, jax.tree.map(jnp.linalg.norm, grads)

    tx = optax.GradientTransformation(lambda params: jax.tree.map(lambda p: jnp.zeros(()), params), norms)
    with pytest.raises(ValueError, match=r"state layers/down of shape \(\) is shared by the layers of layers/down"):
        fused_step(make_parts(), tx)(params, tx.init(params), batch)


def test_bad_input():
    params, batch = problem()
    tx = optax.sgd(1.0)
    parts = make_parts()
    state = tx.init(params)
    with pytest.raises(ValueError, match="keep must be"):
        fused_step(parts, tx, keep="all")
    with pytest.raises(ValueError, match="clip=0"):
        fused_step(parts, tx, clip=0)
    with pytest.raises(ValueError, match="no key 'blocks'"):
        fused_step(parts, tx, layers="blocks")(params, state, batch)
    with pytest.raises(ValueError, match="share a leading axis"):
        fused_step(parts, tx)({**params, "layers": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}, state, batch)
    with pytest.raises(TypeError, match="embed: trained leaves must be floats, got int32"):
        fused_step(parts, tx)({**params, "embed": jnp.arange(3)}, state, batch)
    view = mj.weights.quantize(params, mj.codecs.int8(group=8), where="head")
    with pytest.raises(TypeError, match="head: a weight view"):
        fused_step(parts, tx)(view, state, batch)
    with pytest.raises(ValueError, match="another structure"):
        fused_step(parts, tx)(params, optax.adam(1.0).init(params), batch)
    mixed = parts._replace(head=lambda p, x, b: parts.head(p, x, b) + jnp.sum(p["layers"]["scale"]))
    with pytest.raises(ValueError, match="head uses params at 'layers'"):
        fused_step(mixed, tx)(params, state, batch)
