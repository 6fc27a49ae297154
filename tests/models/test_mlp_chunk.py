"""MLPs in chunks of tokens: the same values, gradients and residuals, less held at a time, dropout of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters, codecs, models, remat, weights
from memjax.core import compiled_bytes
from memjax.recipes.report import residual_bytes
from tests.models.checkpoints import checkpoint, reference

TINY = models.LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
)
MODEL = models.Model(TINY)
TOKENS = jax.random.randint(jax.random.key(1), (2, 32), 0, 40)


def noisy(tree, scale=0.1):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = (jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves))
    return structure.unflatten([leaf + scale * some for leaf, some in zip(leaves, noise)])


PARAMS = noisy(models.random_params(TINY, jax.random.key(0)))


def of_hidden(hidden):
    return (hidden * jnp.cos(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)).sum()


def loss_of(params, policy, chunk):
    return of_hidden(MODEL.hidden(params, TOKENS, remat=policy, mlp_chunk=chunk))


def same(found, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [
        ("full", 24),
        *(pytest.param(policy, 24, marks=pytest.mark.slow) for policy in ("none", "dots", "full-4bit", "offload")),
        pytest.param("linear-4bit", 16, marks=pytest.mark.slow),
    ],
)
def test_values_gradients_and_what_policies_keep_are_those_of_whole_mlps(policy, chunk):
    whole, parts = (jax.jit(jax.value_and_grad(lambda p, c=c: loss_of(p, policy, c)))(PARAMS) for c in (None, chunk))
    same(parts, whole)
    kept = [residual_bytes(lambda p, c=c: (loss_of(p, policy, c), None), PARAMS) for c in (None, chunk)]
    assert kept[1] == kept[0] if policy != "none" else kept[1] < kept[0]


def test_residuals_that_are_packed_are_an_mlps_input_in_8_bits():
    def rows(chunk):
        stages = MODEL.stages(TOKENS, mlp_chunk=chunk)
        layer = jax.tree.map(lambda leaf: leaf[0], stages.layers(PARAMS))
        return remat.report(stages.block, layer, stages.embed(PARAMS), policy=remat.NAMED["4bit"][0].store).rows

    whole, parts = ({row.residual.name: row.action for row in rows(chunk)} for chunk in (None, 24))
    assert parts["block_middle"] == "8-bit" and parts.items() < whole.items()
    assert {"linear_out#3", "linear_out#4"} <= whole.keys() - parts.keys()


@pytest.mark.parametrize("method", [adapters.lora, pytest.param(adapters.dora, marks=pytest.mark.slow)])
def test_adapters_on_packed_weights(method):
    base = weights.quantize(PARAMS, codecs.int4(group=32), "**/*_proj/kernel")
    adapter = method(rank=2, targets="**/*_proj/kernel")
    frozen, theta = adapter.prepare(jax.random.key(0), base)
    theta = noisy(theta)

    def run(chunk):
        loss = weights.lift(lambda params: loss_of(params, "full", chunk))
        return jax.jit(jax.value_and_grad(lambda theta: loss(adapter.attach(frozen, theta))))(theta)

    same(run(24), run(None))


@pytest.mark.parametrize("method", [adapters.lora, pytest.param(adapters.dora, marks=pytest.mark.slow)])
def test_chunks_drop_other_elements_and_backward_drops_the_same(method):
    model = models.Model(TINY, PARAMS).first_layers(1)
    adapter = method(rank=2, targets="**/{gate,up,down}_proj/kernel", dropout=0.5)
    frozen, theta = adapter.prepare(jax.random.key(0), model.params)
    theta, tokens = noisy(theta, 0.3), jnp.full((1, 32), 7)  # of one token attention makes equal rows

    def halves(theta, policy):
        run = weights.lift(lambda params: model.hidden(params, tokens, remat=policy, mlp_chunk=16))
        hidden = run(adapter.attach(frozen, theta, jax.random.key(3)))
        return of_hidden(hidden), jnp.split(hidden[0], 2)

    run = jax.jit(jax.value_and_grad(halves, has_aux=True), static_argnums=1)
    ((_, (first, second)), slopes), (_, again) = run(theta, "none"), run(theta, "full")
    assert float(jnp.abs(first - second).max()) > 0.01
    same(again, slopes)


def test_an_mlp_is_held_for_a_chunk_at_a_time():
    config = models.LlamaConfig(32, 32, 512, 2, 2, 1, 16)
    model, tokens = models.Model(config), jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def temp(chunk):
        def loss(params, tokens):
            return of_hidden(model.hidden(params, tokens, remat="full", mlp_chunk=chunk))

        return compiled_bytes(jax.jit(jax.grad(loss)).lower(models.abstract(config), tokens).compile()).temp

    saved = temp(None) - temp(64)
    # At least gate, up, their product and the gradients of all three, of the tokens that are not in the chunk.
    assert 6 * 512 * (512 - 64) * 4 <= saved < 11 * 512 * (512 - 64) * 4


def test_encoders_and_chunks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="mlp_chunk=0 must be at least 1"):
        MODEL.hidden(PARAMS, TOKENS, mlp_chunk=0)
    bert = checkpoint("bert")
    with pytest.raises(ValueError, match="mlp_chunk are for decoders"):
        bert.hidden(bert.params, jnp.asarray(reference("bert")["tokens"]), mlp_chunk=4)
