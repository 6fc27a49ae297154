import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import models
from tests.models.checkpoints import checkpoint, reference

MODEL = "llama3"


def _generate(prompt, **options):
    model = checkpoint(MODEL)
    return np.asarray(models.generate(model, model.params, prompt, **options))


def test_sampling_follows_the_key_and_top_k():
    prompt = reference(MODEL)["tokens"][:, :8]
    draw = dict(max_new_tokens=8, temperature=1.5, top_k=4)
    one = _generate(prompt, key=jax.random.key(1), **draw)
    np.testing.assert_array_equal(one, _generate(prompt, key=jax.random.key(1), **draw))
    assert (one != _generate(prompt, key=jax.random.key(2), **draw)).any()
    model = checkpoint(MODEL)
    logits = jax.jit(model.logits)(model.params, one[:, :-1])[:, 7:]
    best = jnp.argsort(-logits, axis=-1)[..., :4]
    assert (best == one[:, 8:, None]).any(-1).all()
    assert len({*(np.argmax(best == one[:, 8:, None], -1)).ravel().tolist()}) > 1


def test_samples_have_the_probabilities_of_the_logits():
    model, prompt = checkpoint(MODEL), reference(MODEL)["tokens"][:1, :8]
    many = np.repeat(prompt, 4000, axis=0)
    drawn = _generate(many, max_new_tokens=1, temperature=0.7, key=jax.random.key(0))[:, -1]
    expected = jax.nn.softmax(model.logits(model.params, prompt)[0, -1] / 0.7)
    found = np.bincount(drawn, minlength=model.config.vocab_size) / len(drawn)
    assert np.abs(found - expected).max() < 0.03 < float(expected.max())


def test_top_one_is_greedy_and_one_token_is_enough():
    expected = reference(MODEL)
    prompt = expected["tokens"][:, :8]
    got = _generate(prompt, max_new_tokens=1, temperature=1.0, top_k=1, key=jax.random.key(0))
    np.testing.assert_array_equal(got, expected["greedy"][:, :9])
    np.testing.assert_array_equal(_generate(prompt[:, :1], max_new_tokens=1)[:, :1], prompt[:, :1])


def test_an_ended_row_is_filled_with_the_end_token():
    expected = reference(MODEL)["greedy"]
    eos = int(expected[0, 10])
    got = _generate(expected[:, :8], max_new_tokens=8, eos=[eos, 1_000_000])
    for row, want in zip(got, expected):
        at = np.flatnonzero(want[8:] == eos)
        end = 8 + at[0] if at.size else 16
        np.testing.assert_array_equal(row[:end], want[:end])
        assert (row[end:] == eos).all()
    assert (got[0, 10:] == eos).all() and (got[0, 8:10] != eos).all()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            np.zeros((1, 60), np.int32),
            dict(max_new_tokens=5),
            "60 prompt tokens and 5 new ones exceed .* context of 64",
        ),
        (np.zeros((4,), np.int32), dict(max_new_tokens=1), r"\[batch, sequence\] .* got shape \(4,\)"),
        (np.zeros((1, 0), np.int32), dict(max_new_tokens=1), "at least one token"),
        (np.zeros((1, 4)), dict(max_new_tokens=1), "must be integers .* dtype float32"),
        (np.full((1, 4), 96), dict(max_new_tokens=1), "lie in 96..96, outside the vocabulary 0..95"),
        (np.zeros((1, 4), np.int32), dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (np.zeros((1, 4), np.int32), dict(max_new_tokens=1, temperature=1.0), "needs key="),
        (np.zeros((1, 4), np.int32), dict(max_new_tokens=1, temperature=-1.0), "must not be negative, got -1.0"),
        (np.zeros((1, 4), np.int32), dict(max_new_tokens=1, top_k=97), "top_k must be 1 to 96, got 97"),
    ],
)
def test_bad_calls_say_what_is_wrong(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        _generate(prompt, **options)


def test_an_encoder_cannot_generate():
    model = checkpoint("bert")
    with pytest.raises(ValueError, match="is an encoder and cannot generate"):
        models.generate(model, model.params, np.zeros((1, 4), np.int32), max_new_tokens=1)
