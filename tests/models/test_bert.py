import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import models
from memjax.models import bert
from tests.models.checkpoints import ENCODERS, FOLDER, checkpoint, reference


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_equal_transformers(name):
    model, expected = checkpoint(name), reference(name)
    hidden = jax.jit(model.hidden)(model.params, expected["tokens"], mask=expected["mask"])
    kept = expected["mask"].astype(bool)
    np.testing.assert_allclose(hidden[kept], expected["hidden"][kept], atol=1e-4)


def test_padding_changes_nothing():
    model, expected = checkpoint("roberta"), reference("roberta")
    length = int(expected["mask"][1].sum())
    apply = jax.jit(model.hidden)
    padded = apply(model.params, expected["tokens"], mask=expected["mask"])
    alone = apply(model.params, expected["tokens"][1:, :length])
    np.testing.assert_allclose(padded[1:, :length], alone, atol=1e-5)
    vectors = models.sentence_embedding(padded, expected["mask"])
    np.testing.assert_allclose(vectors[1:], models.sentence_embedding(alone), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)


def test_token_types_count_from_where_they_differ():
    model, tokens = checkpoint("bert"), jnp.asarray(reference("bert")["tokens"])
    types = jnp.zeros_like(tokens).at[:, 10:].set(1)
    apply = jax.jit(model.hidden)
    table = model.params["embeddings"]["token_type"]["embedding"]
    swapped = {**model.params["embeddings"], "token_type": {"embedding": table[::-1]}}
    mixed = apply(model.params, tokens, token_types=types)
    opposite = apply({**model.params, "embeddings": swapped}, tokens, token_types=1 - types)
    np.testing.assert_allclose(mixed, opposite, atol=1e-6)
    assert float(jnp.abs(mixed - apply(model.params, tokens, token_types=0 * types)).max()) > 0.1


def test_older_names_of_norm_weights():
    assert bert.plain_name("bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
    assert bert.plain_name("encoder.layer.3.output.LayerNorm.beta") == "encoder.layer.3.output.LayerNorm.bias"


def test_bad_calls_say_what_is_wrong():
    model, tokens = checkpoint("bert"), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="70 tokens do not fit the encoder's 64 positions"):
        model.hidden(model.params, jnp.zeros((1, 70), jnp.int32))
    with pytest.raises(ValueError, match=r"mask must have the shape of tokens \(1, 4\), got \(4,\)"):
        model.hidden(model.params, tokens, mask=jnp.ones(4))
    with pytest.raises(ValueError, match="segment_ids, positions and mlp_chunk are for decoders"):
        model.hidden(model.params, tokens, segment_ids=tokens)
    with pytest.raises(ValueError, match="is an encoder and has no logits"):
        model.logits(model.params, tokens)
    with pytest.raises(ValueError, match="is an encoder and has no output head"):
        model.head(model.params)
    with pytest.raises(ValueError, match="hidden_size 32 is not a multiple of num_heads 5"):
        dataclasses.replace(model.config, num_heads=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deberta"}, "model_type 'deberta' is not a supported encoder; supported: bert, roberta"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new', but only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    config = json.loads((FOLDER / "bert" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        bert.config_from_hf(config | change)
