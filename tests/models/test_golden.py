"""Published numbers of the packaged SmolLM2-135M-Instruct (Q4_1) and all-MiniLM-L6-v2, in float32."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import models
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view
from memjax.weights import lift, nbytes
from tests.models.weights import minilm_path, smollm2_path

pytestmark = pytest.mark.packaged_weights
WINDOW_TOKENS = 513
KJV_FIRST_TWO = 1.3949  # of the same windows as the published 2.096 over sixteen


@pytest.fixture(scope="session")
def smollm2():
    return models.load(smollm2_path(), dtype="float32", weights="dense")


@pytest.fixture(scope="session")
def smollm2_packed():
    return models.load(smollm2_path(), dtype="float32")


@pytest.fixture(scope="session")
def minilm():
    return models.load(minilm_path(), dtype="float32")


def _nll(logits, tokens):
    """Mean negative log-likelihood of tokens[:, 1:] given logits of all positions."""
    logp = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()


PROMPTS = {
    "The capital of France is": ([504, 3575, 282, 4649, 314], 3.6916),
    "In the beginning God created the heaven and the earth.": (
        [788, 260, 3616, 1839, 2312, 260, 10419, 284, 260, 3103, 30],
        3.9205,
    ),
}


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts(smollm2, text):
    ids, nll = PROMPTS[text]
    assert smollm2.tokenizer.encode(text) == ids
    tokens = jnp.asarray([ids])
    logits = jax.jit(smollm2.logits)(smollm2.params, tokens)
    assert float(_nll(logits, tokens)) == pytest.approx(nll, abs=1e-4)
    if len(ids) == 5:
        values, best = jax.lax.top_k(logits[0, -1], 3)
        assert best.tolist() == [7042, 260, 4528]
        np.testing.assert_allclose(values, [17.371, 14.889, 13.245], atol=2e-3)
        assert [smollm2.tokenizer.decode([token]) for token in best] == [" Paris", " the", " London"]


def test_packed_weights_give_the_same_logits_and_the_published_story(smollm2, smollm2_packed):
    tokens = jnp.asarray([PROMPTS["The capital of France is"][0]])
    dense = jax.jit(smollm2.logits)(smollm2.params, tokens)
    packed = jax.jit(lift(smollm2_packed.logits))(smollm2_packed.params, tokens)
    np.testing.assert_allclose(packed, dense, atol=1e-4)
    prompt = smollm2_packed.tokenizer.encode("Once upon a time, there was a little")
    out = models.generate(smollm2_packed, smollm2_packed.params, jnp.asarray([prompt]), max_new_tokens=18)
    story = " girl named Emma who loved to play in the sun. She would often go to the beach"
    assert smollm2_packed.tokenizer.decode(out[0, len(prompt) :]).startswith(story)


def test_packed_sizes(smollm2, smollm2_packed):
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008
    views = {path: leaf for path, leaf in leaf_paths(smollm2_packed.params) if is_view(leaf)}
    assert len(views) == 8
    matrices = sum(leaf.size for leaf in views.values()) - views["embed_tokens/embedding"].size
    norms = 4 * 61 * 576
    assert nbytes(smollm2_packed.params) == matrices * 20 // 32 + 49152 * 576 * 34 // 32 + norms


def _windows(model, count):
    spec = importlib.util.find_spec("memjax.recipes")
    text = (pathlib.Path(spec.submodule_search_locations[0]) / "corpus" / "kjv.txt").read_text()
    ids = model.tokenizer.encode(text[: 3000 * count])
    return jnp.asarray(ids[: WINDOW_TOKENS * count]).reshape(count, WINDOW_TOKENS)


def _mean_nll(model, tokens):
    def score(params, tokens):
        return _nll(model.logits(params, tokens[None]), tokens[None])

    score = jax.jit(score)
    return float(np.mean([score(model.params, window) for window in tokens]))


def test_king_james_first_windows(smollm2):
    assert _mean_nll(smollm2, _windows(smollm2, 2)) == pytest.approx(KJV_FIRST_TWO, abs=1e-3)


@pytest.mark.slow
def test_king_james_perplexity(smollm2):
    assert _mean_nll(smollm2, _windows(smollm2, 16)) == pytest.approx(2.096, abs=1e-3)


def test_minilm_sentences(minilm):
    sentences = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "A cheetah is running behind its prey.",
    ]
    ids = [minilm.tokenizer.encode(sentence) for sentence in sentences]
    length = max(map(len, ids))
    tokens = np.array([row + [0] * (length - len(row)) for row in ids])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    assert tokens[0, 0] == 101 and tokens[0, len(ids[0]) - 1] == 102
    hidden = jax.jit(minilm.hidden)(minilm.params, tokens, mask=mask)
    vectors = models.sentence_embedding(hidden, mask)
    np.testing.assert_allclose(vectors[0] @ vectors[1:].T, [0.7553, -0.1050, 0.1419], atol=1e-4)
    first = [0.03324, 0.00441, -0.00628, 0.04838, -0.13870, -0.03362]
    np.testing.assert_allclose(vectors[0, :6], first, atol=1e-4)
    pooler = 384 * 384 + 384
    assert sum(leaf.size for leaf in jax.tree.leaves(minilm.params)) == 22_713_216 - pooler
