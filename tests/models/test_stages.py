"""Models cut at their blocks, what every block gives, and soft prompts."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import models
from tests.models.checkpoints import checkpoint, reference


def tokens_of(name, count=12):
    return jnp.asarray(reference(name)["tokens"])[:, :count]


@pytest.mark.parametrize("name", ["qwen2_windows", "bert"])
def test_stages_make_the_model(name):
    model, tokens = checkpoint(name), tokens_of(name)

    @jax.jit
    def by_hand(params):
        stages = model.stages(tokens)
        x, each = stages.embed(params), []
        layers = stages.layers(params)
        for i in range(model.config.num_layers):
            x = stages.block(jax.tree.map(operator.itemgetter(i), layers), x)
            each.append(x)
        return (stages.finish(params, x), jnp.stack(each)), model.hiddens(params, tokens, remat="full")

    (hidden, blocks), collected = by_hand(model.params)
    np.testing.assert_allclose(hidden, jax.jit(model.hidden)(model.params, tokens), atol=1e-5)
    np.testing.assert_allclose(collected[0], hidden, atol=1e-5)
    np.testing.assert_allclose(collected[1], blocks, atol=1e-5)


def test_a_prompt_of_embedded_tokens_equals_these_tokens():
    model, tokens = checkpoint("mistral"), tokens_of("mistral")
    hard = jnp.broadcast_to(jnp.asarray([3, 9, 4]), (len(tokens), 3))
    both = jnp.concatenate([hard, tokens], axis=1)
    expected, blocks = jax.jit(model.hiddens)(model.params, both)
    prefix = model.params["embed_tokens"]["embedding"][hard[0]]
    hidden = jax.jit(lambda prefix: model.hidden(model.params, tokens, prefix=prefix))
    np.testing.assert_allclose(hidden(prefix), expected[:, 3:], atol=1e-5)
    deep = jnp.concatenate([prefix[None], blocks[:-1, 0, :3]])
    np.testing.assert_allclose(hidden(deep), expected[:, 3:], atol=1e-5)
    assert float(jnp.abs(hidden(deep.at[1].set(0)) - expected[:, 3:]).max()) > 1e-2

    generated = models.generate(model, model.params, tokens[:, :4], max_new_tokens=4, prefix=deep)
    np.testing.assert_array_equal(generated, models.generate(model, model.params, both[:, :7], max_new_tokens=4)[:, 3:])


def test_every_packed_document_sees_the_prompt():
    model, tokens = checkpoint("llama3"), tokens_of("llama3")[:1]
    prefix = 0.5 * jax.random.normal(jax.random.key(0), (2, model.config.hidden_size))
    apply = jax.jit(model.hidden)
    together = apply(model.params, tokens, prefix=prefix, segment_ids=jnp.asarray([[3] * 4 + [1] * 4 + [2] * 4]))
    separate = apply(model.params, tokens.reshape(3, 4), prefix=prefix)
    np.testing.assert_allclose(together, separate.reshape(together.shape), atol=1e-5)


def test_a_prompt_of_an_encoder_is_attended_like_tokens():
    model, tokens = checkpoint("bert"), tokens_of("bert")[:1]
    inputs = jax.jit(lambda params: model.stages(tokens).embed(params))(model.params)
    apply = jax.jit(model.hidden)
    expected = apply(model.params, tokens)[:, :8]
    actual = apply(model.params, tokens[:, :8], prefix=inputs[0, 8:], mask=jnp.ones((1, 8)))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_refusals():
    model, tokens = checkpoint("mistral"), tokens_of("mistral")
    width = model.config.hidden_size
    with pytest.raises(ValueError, match="prefix must be"):
        model.hidden(model.params, tokens, prefix=jnp.zeros((2, width + 1)))
    with pytest.raises(ValueError, match="prefix must be"):
        model.stages(tokens, prefix=jnp.zeros((7, 2, width)))
    with pytest.raises(ValueError, match="sliding window"):
        model.hidden(model.params, tokens, prefix=jnp.zeros((2, width)), segment_ids=jnp.zeros_like(tokens))
    with pytest.raises(ValueError, match="for encoders"):
        model.stages(tokens, mask=tokens)
    with pytest.raises(ValueError, match="context"):
        models.generate(model, model.params, tokens, max_new_tokens=1, prefix=jnp.zeros((10**6, width)))
