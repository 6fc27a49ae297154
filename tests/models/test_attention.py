"""Decoders under masks: which tokens are seen, what is kept for backward, and generation."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import models
from memjax.attention import masks
from memjax.models.llama import LlamaConfig

CONFIG = LlamaConfig(48, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=4096)
B, S = 2, 40
WINDOW = masks.window(6, 0) | masks.sink(2)


def make_model(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = models.random_params(config, jax.random.key(0))
    return models.Model(config, jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, params))


MODEL = make_model()
TOKENS = jax.random.randint(jax.random.key(1), (B, S), 0, 48)


def hidden(model, tokens=TOKENS, **options):
    return jax.jit(lambda params: model.hidden(params, tokens, **options))(model.params)


@pytest.mark.parametrize("layers", [None, (True, False)])
def test_a_window_as_a_mask_is_the_models_own(layers):
    own = make_model(sliding_window=7, window_layers=layers)
    narrow = hidden(own)
    assert float(jnp.abs(narrow - hidden(MODEL)).max()) > 0.1
    np.testing.assert_allclose(hidden(own, attention=masks.full()), narrow, atol=1e-5)
    if layers is None:
        np.testing.assert_allclose(hidden(MODEL, attention=masks.window(6, None)), narrow, atol=1e-5)
        np.testing.assert_allclose(hidden(own, attention=masks.window(9, 0)), narrow, atol=1e-5)


def test_a_mask_and_segments_are_joined():
    ids = jnp.asarray([[5] * 16 + [2] * 24] * B)
    packed = hidden(MODEL, segment_ids=ids, attention=WINDOW)
    alone = hidden(MODEL, TOKENS[:, :16], attention=WINDOW)
    np.testing.assert_allclose(packed[:, :16], alone, atol=1e-5)
    chunks = hidden(MODEL, segment_ids=ids, attention=masks.chunked(8))
    np.testing.assert_allclose(
        chunks[:, 8:16], hidden(MODEL, TOKENS[:, 8:16], positions=ids[:, :8] + 3 + jnp.arange(8)), atol=1e-5
    )


def test_a_policy_is_asked_in_every_layer():
    def policy(q, k):
        assert q.shape == (B, S, 4, 8) and k.shape == (B, S, 2, 8)
        early = jnp.einsum("bshd,bthd->bhst", q[:, :, ::2], k) > 0
        return masks.array(early) | masks.window(0, 0)

    def by_hand(q, k):
        return masks.array(jnp.ones((S, S), bool)) & WINDOW

    np.testing.assert_allclose(hidden(MODEL, attention=by_hand), hidden(MODEL, attention=WINDOW), atol=1e-5)
    assert float(jnp.abs(hidden(MODEL, attention=policy) - hidden(MODEL)).max()) > 0.1


def test_a_prompt_is_seen_through_every_mask():
    prefix = jax.random.normal(jax.random.key(2), (3, 32))
    near = masks.window(4, 0)
    shown = hidden(MODEL, prefix=prefix, attention=near)
    np.testing.assert_allclose(shown, hidden(MODEL, prefix=prefix, attention=near | masks.sink(3)), atol=1e-5)
    changed = hidden(MODEL, prefix=2 * prefix, attention=near)
    assert float(jnp.abs(shown - changed)[:, -1].max()) > 0.01


@pytest.mark.parametrize("remat", ["none", "full-8bit"])
def test_gradients_are_those_of_plain_attention(remat):
    def gradient(attention):
        def loss(params):
            return (MODEL.hidden(params, TOKENS, remat=remat, attention=attention) * jnp.sin(jnp.arange(32.0))).sum()

        return jax.jit(jax.grad(loss))(MODEL.params)

    def policy(q, k):
        return masks.array(jnp.ones((S, S), bool))

    plain = gradient(None)
    for attention in (masks.full(), policy) if remat == "none" else (masks.full(),):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(attention))):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()))


def test_nothing_grows_with_the_square_of_the_sequence():
    size, layers = 4096, 5
    model = models.Model(dataclasses.replace(CONFIG, num_layers=layers))
    params, tokens = models.abstract(model.config), jax.ShapeDtypeStruct((1, size), jnp.int32)

    def loss(params, tokens, ids):
        return model.hidden(params, tokens, segment_ids=ids, attention=WINDOW, remat="full").sum()

    text = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", text)}
    assert max(np.prod(shape) for shape in shapes) <= max(layers * size * 32, 4 * 512 * 512)
    lists = {shape for shape in shapes if shape[-2:] == (8, 8)}
    assert lists and all(shape[0] == 1 for shape in lists if len(shape) == 4)  # not one for each layer


def test_generation_keeps_to_the_mask():
    prompt = TOKENS[:, :20]
    tokens = models.generate(MODEL, MODEL.params, prompt, max_new_tokens=12, attention=WINDOW)
    best = jax.jit(lambda params: MODEL.logits(params, tokens, attention=WINDOW).argmax(-1))(MODEL.params)
    np.testing.assert_array_equal(tokens[:, 20:], best[:, 19:-1])
    assert (tokens != models.generate(MODEL, MODEL.params, prompt, max_new_tokens=12)).any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'cudnn' cannot tell segments apart"):
        MODEL.hidden(MODEL.params, TOKENS, segment_ids=TOKENS, attention="cudnn")
    with pytest.raises(ValueError, match=r"attention must be 'xla', 'cudnn', a mask, .* got 3"):
        MODEL.hidden(MODEL.params, TOKENS, attention=3)
    with pytest.raises(ValueError, match="expected facts about 40 queries, got 7"):
        MODEL.hidden(MODEL.params, TOKENS, attention=masks.segments(np.zeros(7, int)))
