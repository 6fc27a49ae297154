"""GELU and SiLU that keep their output, which the next product keeps anyway, and one bit per element.

Both functions fall to a minimum and rise from there, so output and side determine the input, and with it the
derivative. With s = sqrt(y - minimum), the derivative is a smooth function of s right of the minimum and of
sqrt(1 - s / s_end) left of it; each is a Chebyshev series fitted here.

Source: Accelerating Transformer-Based Model Training through Memory Footprint Reduction (Tempo), 2022. The idea is
Tempo's; its own fit is in y, where the derivative has a square root's end at the minimum, and is off by 0.02 there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.core import packing
from memjax.ops.once import once
from memjax.ops.packing import pack_codes, unpack_codes
from memjax.ops.wide import wide

Residual = Literal["output", "input"]

DEGREE = 16
"""Of the series; errors are below 2e-5 on the right and 2e-6 on the left."""


def gelu(x: jax.Array, *, approximate: bool = False, residual: Residual | None = None) -> jax.Array:
    """Returns GELU(x).

    With residual="output" the error of the derivative is that of the rounded output: at most 1e-4 in float32, 0.022 in
    bfloat16 and 0.008 in float16, all reached next to the minimum at x = -0.75 only.

    Args:
      x: float ``[...]``, of one axis or more.
      approximate: the tanh form.
      residual: what backward is given: "output" keeps the result, so that an operation that keeps it too shares it,
        and one bit per element; "input" keeps ``x`` and is exact. None: "output", but "input" where `memjax.remat`
        packs residuals.

    Returns:
      ``[...]`` in the dtype of ``x``; values and gradients are computed in float32.

    Raises:
      ValueError: another ``residual``, a scalar x.
    """
    return _checked("gelu_tanh" if approximate else "gelu", x, residual)


def silu(x: jax.Array, *, residual: Residual | None = None) -> jax.Array:
    """Returns ``x * sigmoid(x)``; as `gelu`, with its minimum at x = -1.28."""
    return _checked("silu", x, residual)


def _checked(name: str, x: jax.Array, residual: Residual | None) -> jax.Array:
    if residual is None:
        residual = "input" if packing.value else "output"
    if residual not in ("output", "input"):
        raise ValueError(f"residual must be 'output' or 'input', got {residual!r}")
    if x.ndim == 0:
        raise ValueError("expected an array of one axis or more, got a scalar")
    return _activation(x, name, residual)


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _activation(x: jax.Array, name: str, residual: Residual) -> jax.Array:
    return _FUNCTIONS[name](wide(x)).astype(x.dtype)


def _forward(x: jax.Array, name: str, residual: Residual) -> tuple[jax.Array, Any]:
    y = _activation(x, name, residual)
    if residual == "input":
        return y, x
    rising = wide(once(x)) >= inverse_of(name).x_min
    return y, (y, pack_codes(rising.astype(jnp.uint8), 1))


def _backward(name: str, residual: Residual, kept: Any, dy: jax.Array) -> tuple[jax.Array]:
    if residual == "input":
        slope = jax.jvp(_FUNCTIONS[name], (wide(kept),), (jnp.ones_like(wide(kept)),))[1]
    else:
        y, planes = kept
        slope = derivative_of_output(wide(y), unpack_codes(planes, 1, y.shape[-1]) != 0, inverse_of(name))
    return ((wide(dy) * slope).astype(dy.dtype),)


_activation.defvjp(_forward, _backward)


# ---- the derivative as a function of the output ---------------------------------------------------------------------


class Inverse(NamedTuple):
    """The derivative of an activation by its output.

    Attributes:
      x_min, y_min: the minimum.
      s_end: sqrt(y - y_min) from which on the derivative is 1, and its limit on the left, where y is 0.
      rising, falling: Chebyshev coefficients ``[DEGREE + 1]`` on either side, in the variables of
        `derivative_of_output`.
    """

    x_min: float
    y_min: float
    s_end: tuple[float, float]
    rising: tuple[float, ...]
    falling: tuple[float, ...]


def derivative_of_output(y: jax.Array, rising: jax.Array, inverse: Inverse) -> jax.Array:
    """Returns the derivative, float32 ``[...]``, at outputs ``y`` right (where ``rising``) or left of the minimum."""
    s = jnp.sqrt(jnp.maximum(y - inverse.y_min, 0.0))
    end, left_end = inverse.s_end
    t = jnp.where(rising, s * (1 / end), jnp.sqrt(jnp.maximum(1 - s * (1 / left_end), 0.0)))
    t = 2 * jnp.minimum(t, 1.0) - 1
    after = later = jnp.zeros_like(t)
    for right, left in zip(inverse.rising[:0:-1], inverse.falling[:0:-1]):  # Clenshaw's recurrence
        after, later = jnp.where(rising, right, left) + 2 * t * after - later, after
    slope = jnp.where(rising, inverse.rising[0], inverse.falling[0]) + t * after - later
    return jnp.where(rising & (s >= end), 1.0, slope)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu64(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    phi = (1 + _erf(x / math.sqrt(2))) / 2
    return x * phi, phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh64(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factor = math.sqrt(2 / math.pi)
    t = np.tanh(factor * (x + 0.044715 * x**3))
    return x * (1 + t) / 2, (1 + t) / 2 + x / 2 * (1 - t * t) * factor * (1 + 3 * 0.044715 * x * x)


def _silu64(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sigmoid = 1 / (1 + np.exp(-x))
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


_FLOAT64 = {"gelu": (_gelu64, 4.7), "gelu_tanh": (_gelu_tanh64, 4.5), "silu": (_silu64, 13.0)}
"""Values and derivatives, and the x from which on the derivative is 1 within 4e-5."""


@functools.cache
def inverse_of(name: str) -> Inverse:
    """Returns the fit for "gelu", "gelu_tanh" or "silu"."""
    fn, x_end = _FLOAT64[name]

    def bisect(is_above: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
        for _ in range(80):
            middle = (low + high) / 2
            above = is_above(middle)
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return (low + high) / 2

    x_min = bisect(lambda x: fn(x)[1] > 0, np.array(-3.0), np.array(0.0))
    y_min = fn(x_min)[0]

    def root_of_rise(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(fn(x)[0] - y_min, 0))

    def exceeds(s: np.ndarray, x: np.ndarray) -> np.ndarray:
        return root_of_rise(x) > s

    nodes = np.polynomial.chebyshev.chebpts1(4 * DEGREE)
    unit = (nodes + 1) / 2
    ends = float(root_of_rise(np.array(x_end))), math.sqrt(-y_min)
    series = []
    for s, far in ((ends[0] * unit, x_end), (ends[1] * (1 - unit**2), -40.0)):
        x = bisect(functools.partial(exceeds, s), np.full_like(s, x_min), np.full_like(s, far))
        series.append(tuple(np.polynomial.chebyshev.chebfit(nodes, fn(x)[1], DEGREE).tolist()))
    return Inverse(float(x_min), float(y_min), ends, *series)
