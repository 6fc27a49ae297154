"""Activations that keep a code of their derivative, 1 to 4 bits per element, in place of their input.

The levels are those of least mean squared error for the distribution of derivatives, found by dynamic programming
over their values; intervals of the input, as the paper has them, cannot share a level between the two sides of an
activation that is not monotone. Source: Few-bit Backward: Quantized Gradients of Activation Functions for Memory
Footprint Reduction, 2022. With evenly spaced levels these are the derivative codes of S2A: Structure to Activation,
2025, as reconstructed here from its abstract: no code of it is public.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.ops.once import once
from memjax.ops.packing import pack_codes, unpack_codes
from memjax.ops.wide import wide

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
"""Activations by name; the derivatives of the first five take two values, which one bit tells exactly."""

_Activation = str | Callable[[jax.Array], jax.Array]


def few_bit_activation(
    activation: _Activation,
    bits: int,
    *,
    inputs: Any = None,
    levels: Literal["optimal", "even"] = "optimal",
) -> Callable[[jax.Array], jax.Array]:
    """Returns an activation of which backward is given a code of the derivative only.

    Forward is exact. Each call keeps ``bits / 8`` bytes per element.

    Args:
      activation: a name in `ACTIVATIONS`, or a function that acts on every element by itself.
      bits: 1 to 4.
      inputs: numbers ``[...]`` that are distributed as the activation's inputs; None: standard normal.
      levels: "optimal" makes the mean squared error of the derivative least; "even" spaces the levels evenly from the
        least to the greatest derivative.

    Returns:
      A function of a float array ``[..., n]`` that returns one like it.

    Raises:
      ValueError: an unknown name, bits outside 1 to 4, inputs that are not finite.
    """
    fn = _function(activation)
    table = tuple(float(level) for level in derivative_levels(activation, bits, inputs=inputs, levels=levels))

    @jax.custom_vjp
    def coded(x: jax.Array) -> jax.Array:
        return fn(wide(x)).astype(x.dtype)

    def forward(x: jax.Array) -> tuple[jax.Array, Any]:
        y, slope = jax.jvp(fn, (wide(x),), (jnp.ones_like(wide(x)),))
        code, slope = jnp.zeros(x.shape, jnp.uint8), once(slope)
        for below, above in itertools.pairwise(table):
            code += slope > (below + above) / 2
        return y.astype(x.dtype), pack_codes(code, bits)

    def backward(planes: Any, dy: jax.Array) -> tuple[jax.Array]:
        code = unpack_codes(planes, bits, dy.shape[-1])
        slope = jnp.full(dy.shape, table[0], wide(dy).dtype)
        for i, level in enumerate(table[1:], 1):
            slope = jnp.where(code >= i, level, slope)
        return ((wide(dy) * slope).astype(dy.dtype),)

    coded.defvjp(forward, backward)
    return coded


def derivative_levels(
    activation: _Activation,
    bits: int,
    *,
    inputs: Any = None,
    levels: Literal["optimal", "even"] = "optimal",
) -> np.ndarray:
    """Returns the levels that stand for an activation's derivative.

    Args:
      activation, bits, inputs, levels: as in `few_bit_activation`.

    Returns:
      float64 ``[n]``, ascending; n is ``2**bits``, or fewer where the derivative takes fewer values.

    Raises:
      ValueError: as `few_bit_activation`.
    """
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"bits={bits} must be 1, 2, 3 or 4")
    if levels not in ("optimal", "even"):
        raise ValueError(f"levels must be 'optimal' or 'even', got {levels!r}")
    if inputs is None:
        x = (np.arange(2**14) + 0.5) * 2**-10 - 8
        weight = np.exp(-x * x / 2)
    else:
        x = np.asarray(inputs, np.float64).reshape(-1)
        if not x.size or not np.isfinite(x).all():
            raise ValueError("inputs must be finite numbers, at least one")
        weight = np.ones_like(x)
    fn, x32 = _function(activation), jnp.asarray(x, jnp.float32)
    slopes = np.asarray(jax.jvp(fn, (x32,), (jnp.ones_like(x32),))[1], np.float64)
    distinct = np.unique(slopes)
    if len(distinct) <= 2**bits:
        return distinct
    if levels == "even":
        return np.linspace(distinct[0], distinct[-1], 2**bits)
    return _least_squares_levels(slopes, weight, 2**bits)


def _function(activation: _Activation) -> Callable[[jax.Array], jax.Array]:
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def _least_squares_levels(values: np.ndarray, weight: np.ndarray, count: int, bins: int = 1024) -> np.ndarray:
    """Returns the ``count`` levels of least weighted squared distance to ``values``, up to a bin of their range.

    ``cost[j]`` is the least cost of the first j bins with k levels; a level's bins are consecutive.
    """
    low, high = values.min(), values.max()
    index = np.minimum(((values - low) / (high - low) * bins).astype(int), bins - 1)
    moments = [np.bincount(index, weight * values**power, bins) for power in range(3)]
    zeroth, first, second = (np.concatenate([[0.0], np.cumsum(m)]) for m in moments)
    mass = zeroth[None] - zeroth[:, None]  # [from, to]
    total = first[None] - first[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = second[None] - second[:, None] - np.where(mass > 0, total**2 / mass, 0)
    within = np.where(np.tri(bins + 1, k=-1, dtype=bool), np.inf, np.maximum(spread, 0))
    cost, starts = within[0], []
    for _ in range(count - 1):
        candidates = cost[:, None] + within
        starts.append(candidates.argmin(0))
        cost = candidates.min(0)
    ends = [bins]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    edges = np.asarray([0, *sorted(ends)])
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.diff(first[edges]) / np.diff(zeroth[edges])
    return np.sort(levels[np.isfinite(levels)])
