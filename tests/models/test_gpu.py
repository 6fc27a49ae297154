"""The attention that is chosen (cuDNN's, but for packed segments) against XLA's, in the models, in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import models
from tests.models.checkpoints import FOLDER, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


def _value_and_gradient(model, tokens, attention, **options):
    def total(params):
        hidden = model.hidden(params, tokens, attention=attention, **options).astype(jnp.float32)
        return (hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))).sum(), hidden

    return jax.jit(jax.grad(total, has_aux=True))(model.params)


def _compare(model, tokens, **options):
    (chosen_gradient, chosen), (xla_gradient, xla) = (
        _value_and_gradient(model, tokens, attention, **options) for attention in (None, "xla")
    )
    text = jax.jit(lambda p: model.hidden(p, tokens, **options)).lower(model.params).as_text()
    assert ("cudnn" in text) == (options.get("segment_ids") is None)
    assert float(jnp.abs(chosen - xla).mean()) < 0.02 * float(jnp.abs(xla).mean())
    for a, b in zip(jax.tree.leaves(chosen_gradient), jax.tree.leaves(xla_gradient)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # A shift of all keys changes no softmax: the gradient of their bias is rounding alone.
        assert np.linalg.norm(a - b) <= 0.05 * max(np.linalg.norm(b), 1)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_windows"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_decoders(name, packed, remat):
    model, tokens = models.load(FOLDER / name), jnp.asarray(reference(name)["tokens"])
    segments = jnp.broadcast_to(jnp.repeat(jnp.asarray([4, 1, 2]), 8), tokens.shape) if packed else None
    _compare(model, tokens, segment_ids=segments, remat=remat)


def test_encoder():
    expected = reference("bert")
    _compare(models.load(FOLDER / "bert"), jnp.asarray(expected["tokens"]), mask=jnp.asarray(expected["mask"]))


@pytest.mark.parametrize("name", ["llama3", "qwen2_windows"])
def test_generation_in_float32_and_bfloat16(name):
    expected = reference(name)["greedy"]
    with jax.default_matmul_precision("highest"):
        model = models.load(FOLDER / name, dtype="float32")
        tokens = models.generate(model, model.params, expected[:, :8], max_new_tokens=8)
    np.testing.assert_array_equal(tokens, expected)
    model = models.load(FOLDER / name)
    tokens = models.generate(model, model.params, expected[:, :8], max_new_tokens=8)
    logits = jax.jit(model.logits)(model.params, tokens)
    chosen = jnp.take_along_axis(logits[:, 7:-1], tokens[:, 8:, None], axis=-1)[..., 0]
    assert float((logits[:, 7:-1].max(-1) - chosen).max()) < 0.1
