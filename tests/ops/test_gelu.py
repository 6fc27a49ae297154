"""GELU and SiLU from their output: the derivative's floor in every dtype, gradients, and what is kept."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import ops
from memjax.ops.gelu import derivative_of_output, inverse_of
from tests.ops.checks import assert_matches, kept_beside, total_bytes
from tests.random_views import array

FUNCTIONS = {
    "gelu": (ops.gelu, functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": (functools.partial(ops.gelu, approximate=True), functools.partial(jax.nn.gelu, approximate=True)),
    "silu": (ops.silu, jax.nn.silu),
}


@functools.cache
def curve(name):
    """Returns a dense grid of inputs, exact in every dtype near the minimum, with outputs and slopes in float64."""
    minimum = inverse_of(name).x_min
    x = np.concatenate([np.linspace(-30, 30, 60001), np.linspace(minimum - 0.1, minimum + 0.1, 20001), [-1e4, 0, 1e4]])
    with jax.enable_x64(True):
        grid = {t: jnp.asarray(np.asarray(jnp.asarray(x, t), np.float64)) for t in ("float32", "bfloat16", "float16")}
        fn = FUNCTIONS[name][1]
        return {t: jax.tree.map(np.asarray, (x, *jax.jvp(fn, (x,), (jnp.ones_like(x),)))) for t, x in grid.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_derivative_is_within_the_floor_of_the_stored_dtype(name):
    inverse = inverse_of(name)
    for dtype, (near, far) in {"float32": (1e-4, 4e-5), "bfloat16": (0.0212, 0.0212), "float16": (8e-3, 8e-3)}.items():
        x, y, slope = curve(name)[dtype]
        stored = jnp.asarray(y, dtype).astype(jnp.float32)
        error = np.abs(np.asarray(derivative_of_output(stored, x >= inverse.x_min, inverse), np.float64) - slope)
        assert error.max() < near
        assert error[np.abs(x - inverse.x_min) > 0.02].max() < far
        even = slice(0, 60001)
        rms = np.sqrt(np.average(error[even] ** 2, weights=np.exp(-(x[even] ** 2) / 2)))
        assert rms < {"float32": 1e-5, "bfloat16": 0.0029, "float16": 0.001}[dtype]


def test_the_minimum_is_where_it_is_known_to_be():
    assert math.isclose(inverse_of("gelu").x_min, -0.7517915246935645, abs_tol=1e-12)
    assert math.isclose(inverse_of("gelu").y_min, -0.16997120747990369, abs_tol=1e-12)
    assert math.isclose(inverse_of("silu").y_min, -0.2784645427610738, abs_tol=1e-12)


def test_a_fit_without_the_square_root_would_miss_the_floor():
    inverse = inverse_of("gelu")
    x, y, slope = curve("gelu")["float32"]
    left = (x < inverse.x_min) & (x > -4)
    straight = np.polynomial.Chebyshev.fit(y[left], slope[left], len(inverse.falling) - 1)
    assert np.abs(straight(y[left]) - slope[left]).max() > 5e-3


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 4e-5), (jnp.bfloat16, 4e-3), (jnp.float16, 1e-3)])
def test_values_and_gradients(name, dtype, tolerance):
    fn, plain = FUNCTIONS[name]
    x = 2 * array(0, 40, 50).astype(dtype)
    assert_matches(fn, plain, (x,), tolerance)
    assert_matches(functools.partial(fn, residual="input"), plain, (x,), min(tolerance, 3e-3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keeps_its_output_and_one_bit_an_element(name):
    fn, _ = FUNCTIONS[name]
    x, w = array(0, 6, 64, dtype=jnp.bfloat16), array(1, 64, 8, dtype=jnp.bfloat16)
    y, kept = kept_beside(fn, (x,))
    assert sum(leaf is y for leaf in kept) == 1 and total_bytes(kept) == y.nbytes + x.size / 8
    _, with_product = kept_beside(lambda x, w: fn(x) @ w, (x, w))
    assert total_bytes(with_product) == total_bytes(kept)
    plain = FUNCTIONS[name][1]
    assert total_bytes(kept_beside(lambda x, w: plain(x) @ w, (x, w))[1]) >= 2 * y.nbytes
    assert not kept_beside(functools.partial(fn, residual="input"), (x,))[1]


def test_nan_stays_visible_and_arguments_are_checked():
    x = jnp.asarray([0.5, jnp.nan, jnp.inf])
    slope = jax.grad(lambda x: ops.gelu(x).sum())(x)
    assert jnp.isnan(slope[1]) and slope[2] == 1
    with pytest.raises(ValueError, match="residual must be"):
        ops.silu(x, residual="mask")
    with pytest.raises(ValueError, match="scalar"):
        ops.gelu(jnp.float32(1))
