"""Few-bit derivatives: known errors of the tables, optimality by brute force, exactness where slopes are few."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import ops
from memjax.ops.few_bit import ACTIVATIONS
from tests.ops.checks import assert_matches, kept_beside, total_bytes
from tests.random_views import array


@functools.cache
def slopes_on_normal_inputs(name):
    x = jnp.linspace(-8, 8, 40001)
    slope = jax.jvp(ACTIVATIONS[name], (x,), (jnp.ones_like(x),))[1]
    return np.asarray(x, np.float64), np.asarray(slope, np.float64)


def rms_error(levels, slopes, weight):
    nearest = np.abs(slopes[:, None] - levels).min(1)
    return np.sqrt(np.average(nearest**2, weights=weight))


@pytest.mark.parametrize(
    "name, levels, expected",
    [
        ("gelu", "optimal", (0.196, 0.089, 0.0436, 0.0215)),
        ("silu", "optimal", (0.179, 0.089, 0.0440, 0.0218)),
        ("gelu", "even", (0.295, 0.105, 0.048, 0.023)),
        ("silu", "even", (0.339, 0.113, 0.049, 0.023)),
    ],
)
def test_errors_of_the_tables_on_normal_inputs(name, levels, expected):
    x, slopes = slopes_on_normal_inputs(name)
    for bits, wanted in enumerate(expected, 1):
        table = ops.derivative_levels(name, bits, levels=levels)
        assert len(table) == 2**bits
        assert rms_error(table, slopes, np.exp(-x * x / 2)) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2])
def test_levels_are_optimal(bits):
    inputs = 1.5 * np.random.default_rng(0).standard_normal(14)
    _, slopes = jax.jvp(ACTIVATIONS["gelu"], (jnp.asarray(inputs),), (jnp.ones(14),))
    values = np.sort(np.asarray(slopes, np.float64))
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts))
        for cuts in itertools.combinations(range(1, 14), 2**bits - 1)
    )
    levels = ops.derivative_levels("gelu", bits, inputs=inputs)
    assert rms_error(levels, values, np.ones(14)) ** 2 * 14 == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hard_tanh", "hard_sigmoid"])
def test_one_bit_is_exact_where_there_are_two_slopes(name):
    fn = ops.few_bit_activation(name, 1)
    x = 4 * array(0, 7, 13)
    exact = jax.vjp(ACTIVATIONS[name], x)
    coded = jax.vjp(fn, x)
    np.testing.assert_array_equal(coded[0], exact[0])
    np.testing.assert_array_equal(coded[1](x), exact[1](x))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gradients_are_those_of_the_nearest_level(bits):
    x, dy = 2 * array(0, 5, 64, dtype=jnp.bfloat16), array(1, 5, 64, dtype=jnp.bfloat16)
    fn, levels = ops.few_bit_activation("silu", bits), ops.derivative_levels("silu", bits)
    y, back = jax.jit(lambda x, dy: (fn(x), jax.vjp(fn, x)[1](dy)))(x, dy)
    wide = x.astype(jnp.float32)
    value, slope = jax.jvp(jax.nn.silu, (wide,), (jnp.ones_like(wide),))
    nearest = levels[np.abs(np.asarray(slope)[..., None] - levels).argmin(-1)]
    np.testing.assert_array_equal(y, value.astype(jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(back[0], np.float32), np.asarray(dy, np.float32) * nearest, 2**-8, 1e-6)
    kept = kept_beside(fn, (x,))[1]
    assert total_bytes(kept) == x.size * bits / 8


def test_a_function_of_ones_own_and_its_inputs():
    inputs = 0.3 * np.random.default_rng(0).standard_normal(4000) + 1
    cube = lambda x: x**3  # noqa: E731
    own = ops.derivative_levels(cube, 4, inputs=inputs)
    slopes = 3 * inputs**2
    assert rms_error(own, slopes, np.ones(4000)) < rms_error(
        ops.derivative_levels(cube, 4, levels="even", inputs=inputs), slopes, np.ones(4000)
    )
    fn = ops.few_bit_activation(cube, 4, inputs=inputs)
    assert_matches(fn, cube, (jnp.asarray(inputs.reshape(50, 80), jnp.float32),), (1e-6, 0.06))


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="unknown activation 'swish2'; known: relu"):
        ops.few_bit_activation("swish2", 2)
    with pytest.raises(ValueError, match="bits=5"):
        ops.few_bit_activation("gelu", 5)
    with pytest.raises(ValueError, match="levels must be"):
        ops.derivative_levels("gelu", 2, levels="uniform")
    with pytest.raises(ValueError, match="finite"):
        ops.derivative_levels("gelu", 2, inputs=[1.0, np.nan])
