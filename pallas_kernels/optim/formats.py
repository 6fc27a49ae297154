"""Dynamic 8-bit and 4-bit codes: levels that are spaced evenly within a power of ten, more of them in the higher ones.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022); Li et al., "Memory Efficient Optimizers
with 4-bit States" (2023).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TINY = 1e-12
"""The least scale of a block."""


@functools.cache
def dynamic_levels(bits: int, signed: bool) -> np.ndarray:
    """Returns the float32 levels ``[2**bits]`` of the dynamic map, in order.

    Of n powers of ten, n = bits - 1, the i-th from 0 is divided into ``2**i`` (unsigned ``2**(i + 1)``) equal parts
    between ``10**(i - n)`` and ``10**(i - n + 1)``; their middles are levels, with both signs if signed, and so are 0
    and 1.
    """
    decades = bits - 1
    levels = [0.0, 1.0]
    for i in range(decades):
        ends = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - decades + 1) * (ends[:-1] + ends[1:]) / 2
        levels += [*middles, *(-middles if signed else [])]
    return np.sort(np.array(levels)).astype(np.float32)


class Segments(NamedTuple):
    """The nearest level at or above zero as a line per segment of [0, 1]: ``min(round(slope * a + start), last)``.

    Segment 0 is what is nearest to zero, then come the powers of ten, then what is nearest to one. The result counts
    the levels from zero.

    Attributes:
      thresholds: float32 ``[s - 1]``, where segments after the first begin.
      slope, start, last: float32 ``[s]``.
    """

    thresholds: np.ndarray
    slope: np.ndarray
    start: np.ndarray
    last: np.ndarray


def zero_code(bits: int, signed: bool) -> int:
    """Returns the code of zero."""
    return 2 ** (bits - 1) - 1 if signed else 0


@functools.cache
def segments(bits: int, signed: bool) -> Segments:
    """Returns the segments of the dynamic map."""
    levels = dynamic_levels(bits, signed)[zero_code(bits, signed) :].astype(np.float64)
    sizes = [2 ** (i if signed else i + 1) for i in range(bits - 1)]
    firsts = np.cumsum([1, *sizes])
    lasts = np.array([0, *(firsts[1:] - 1), len(levels) - 1])
    middles = (levels[lasts[:-1]] + levels[lasts[:-1] + 1]) / 2
    slopes = np.array([size / 0.9 * 10.0 ** (bits - 2 - i) for i, size in enumerate(sizes)])
    starts = firsts[:-1] - slopes * levels[firsts[:-1]]
    parts = (middles, [0, *slopes, 0], [0, *starts, lasts[-1]], lasts)
    return Segments(*(np.asarray(part).astype(np.float32) for part in parts))


def nearest_code(x: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Returns the uint8 codes of the levels nearest to float32 ``x`` within [-1, 1] ([0, 1] if not signed)."""
    lines = segments(bits, signed)
    size = jnp.abs(x)
    slope, start, last = (jnp.full_like(size, part[0]) for part in lines[1:])
    for i, threshold in enumerate(lines.thresholds):
        above = size >= threshold
        slope, start, last = (
            jnp.where(above, part[i + 1], held) for part, held in zip(lines[1:], (slope, start, last))
        )
    count = jnp.minimum(jnp.round(size * slope + start), last)
    if not signed:
        return count.astype(jnp.uint8)
    return jnp.maximum(jnp.where(x < 0, -count, count) + zero_code(bits, True), 0).astype(jnp.uint8)
