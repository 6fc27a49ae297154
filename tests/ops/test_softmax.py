"""Softmax: gradients, rows that sum to zero from codes too, and what is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, ops
from tests.ops.checks import assert_matches, kept_beside, total_bytes
from tests.random_views import array

CODECS = [codecs.int8(group=32), codecs.int4(group=32), codecs.int4(group=32, symmetric=False)]


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3), (jnp.float16, 2e-3)])
def test_values_and_gradients(dtype, tolerance):
    x = 3 * array(0, 4, 5, 64).astype(dtype)
    assert_matches(ops.softmax, functools.partial(jax.nn.softmax, axis=-1), (x,), tolerance)
    y, kept = kept_beside(ops.softmax, (x,))
    assert len(kept) == 1 and kept[0] is y


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_gradients_from_codes_sum_to_zero(codec):
    x, dy = (3 * array(0, 40, 64)).at[:, 50:].set(-jnp.inf), 1 + array(1, 40, 64)
    fn = functools.partial(ops.softmax, residual=codec)
    y, kept = kept_beside(fn, (x,))
    np.testing.assert_array_equal(y, jax.nn.softmax(x))
    assert total_bytes(kept) == x.size * codec.bits_per_element() / 8
    (exact,), (coded,) = jax.vjp(jax.nn.softmax, x)[1](dy), jax.vjp(fn, x)[1](dy)
    assert jnp.abs(coded.sum(-1)).max() < 1e-6
    assert 0 < jnp.linalg.norm(coded - exact) < (0.03 if codec.bits == 8 else 0.3) * jnp.linalg.norm(exact)
    assert (coded[:, 50:] == 0).all()


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="residual must be"):
        ops.softmax(jnp.ones((2, 32)), residual="input")
