import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.recipes.loss import chunked_cross_entropy

B, S, D, V = 2, 7, 8, 40


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (B, S, D))
    head = jax.random.normal(keys[1], (D, V))
    labels = jax.random.randint(keys[2], (B, S), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.6, (B, S)).astype(jnp.float32)
    return hidden, head, labels, weights


def naive(hidden, head, labels, weights):
    log_p = jax.nn.log_softmax(hidden @ head)
    return -(jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0] * weights).sum()


@pytest.mark.parametrize("chunk", [1, 4, 5, 1000])
def test_values_and_gradients_equal_naive(chunk):
    hidden, head, labels, weights = inputs()

    def chunked(hidden, head):
        return chunked_cross_entropy(hidden, head, labels, weights, chunk=chunk)

    (total, count), grads = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(hidden, head)
    expected, expected_grads = jax.value_and_grad(naive, argnums=(0, 1))(hidden, head, labels, weights)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == weights.sum()
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_weights_count_every_label_and_bfloat16_accumulates_in_float32():
    hidden, head, labels, _ = inputs()
    total, count = chunked_cross_entropy(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), labels, chunk=3)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
    np.testing.assert_allclose(total, naive(*rounded, labels, jnp.ones((B, S))), rtol=1e-5)
    assert count == B * S and total.dtype == jnp.float32


def test_large_logits_stay_finite():
    hidden, head, labels, weights = inputs()
    total, _ = chunked_cross_entropy(hidden * 1e4, head, labels, weights, chunk=4)
    np.testing.assert_allclose(total, naive(hidden * 1e4, head, labels, weights), rtol=1e-6)


def test_logits_of_all_tokens_never_exist():
    tokens, width, vocabulary, chunk = 4096, 16, 1024, 128
    hidden = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    head = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def temp_bytes(chunk):
        grad = jax.grad(lambda h, w, y: chunked_cross_entropy(h, w, y, chunk=chunk)[0], argnums=(0, 1))
        return jax.jit(grad).lower(hidden, head, labels).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(chunk) < 4 * chunk * vocabulary * 4 + 4 * tokens * width * 4
    assert temp_bytes(tokens) >= tokens * vocabulary * 4


def test_bad_shapes():
    hidden, head, labels, weights = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        chunked_cross_entropy(hidden, head.T, labels)
    with pytest.raises(ValueError, match="must have the shape of the labels"):
        chunked_cross_entropy(hidden, head, labels, weights[0])
    with pytest.raises(ValueError, match="chunk=0"):
        chunked_cross_entropy(hidden, head, labels, chunk=0)
