"""NF4: 4-bit codes for levels at quantiles of a normal distribution, and double quantization of their scales.

Levels, codes and scales are those of bitsandbytes. Sources: Dettmers et al., QLoRA, 2023; the 8-bit map of the
scales is from Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.codecs.packed import Codec, blocked, from_bits, spread, to_bits
from pallas_kernels._bits import NF4_LEVELS

SECOND_BLOCK = 256
"""Scales that share a second-level scale."""

LEVELS = np.array(NF4_LEVELS, np.float32)
"""The values of the codes 0 to 15, float32."""


def _dynamic_map() -> np.ndarray:
    """Returns the sorted signed 8-bit map: linear fractions under seven powers of ten, 0 and 1; float32 [256].

    The ends of the fractions are rounded once, as torch's linspace rounds them, so that every bit agrees.
    """
    values: list[np.ndarray] = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        count = 2**i + 1
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
        k = np.arange(count)
        ends = np.where(k < count // 2, float(np.float32(0.1)) + step * k, 1 - step * (count - 1 - k))
        ends = ends.astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


DYNAMIC_MAP = _dynamic_map()
"""The values of the codes 0 to 255 of the scales, float32."""

_LEVEL_BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
_DYNAMIC_BOUNDS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / np.float32(2)


class NestedScale(NamedTuple):
    """Scales that are quantized themselves: ``DYNAMIC_MAP[codes] * absmax + mean``.

    Attributes:
      codes: uint8 ``[..., n / group, ...]``, one per group.
      absmax: bit patterns of float32, uint32 ``[..., n / group / rows, ..., m / columns, ...]``; each element is
        shared by a rectangle of groups, ``rows`` along the group axes and ``columns`` along the others.
      mean: bit patterns of float32, uint32; one per matrix, all axes but the batch axes of size 1.
    """

    codes: jax.Array | np.ndarray
    absmax: jax.Array | np.ndarray
    mean: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Nf4(Codec):
    """The level nearest to an element over its block's largest size (`LEVELS`); a block of zeros has code 7.

    Between two levels the lower one holds up to and including their midpoint. Without ``double`` a block keeps its
    largest size in float32: ``4 + 32 / group`` bits per element, 4.5 at 64.

    With ``double``, the mean over the matrix is taken off these sizes and the rest is kept in 8 bits, with a float32
    scale for every 256 of them: ``4 + 8 / group + 32 / (256 group)`` bits per element, 4.127 at 64, and 32 bits per
    matrix (the group axes and all axes from the first of them on, at least the last two; axes before are a batch).
    The 256 run along the group axes first, then along the others, as in bitsandbytes on the ``[out, in]`` weight, so
    codes and scales are the same but for the last bit of the mean, which the order of the summation decides.
    Where such a run would not be a rectangle of whole rows and columns, ``second`` or, where that is None, the
    largest rectangle of at most 256 whose sides divide the axes (the one with most groups of one column among equals)
    takes its place; codes of elements do not depend on it.
    """

    group: int
    double: bool
    second: tuple[int, int] | None = None

    bits = 4
    symmetric = True
    scale_dtype = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group <= 0:
            raise ValueError(f"block must be a positive integer, got {self.group!r}")

    @property
    def limit(self) -> float:
        return float(np.finfo(np.float32).max) / 2**32  # the sum of all scales of a matrix stays finite

    def values(self, codes: jax.Array) -> jax.Array:
        """Returns the level of each code, by halving the table at each bit.

        Fifteen selects and no gather: it stays elementwise, so that any consumer, loop or matmul, can absorb it.
        """
        table = [lax.full_like(codes, level, jnp.float32) for level in LEVELS]
        for bit in range(4):
            is_set = (codes >> np.uint8(bit)) & np.uint8(1) != 0
            table = [lax.select(is_set, above, below) for below, above in zip(table[::2], table[1::2])]
        return table[0]

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if noise is not None:
            raise ValueError(f"{self} rounds to the nearest level, got a key for stochastic rounding; use int4 or int8")
        absmax = jnp.max(jnp.abs(x), axes, keepdims=True)
        scaled = x * _reciprocal(absmax)
        codes = sum((scaled > bound).astype(jnp.uint8) for bound in _LEVEL_BOUNDS)
        return codes, to_bits(absmax, "float32"), None

    def store_scales(self, scale: jax.Array, axes: tuple[int, ...]) -> Any:
        if not self.double:
            return scale
        scale = from_bits(scale, "float32")
        matrix = range(-matrix_ndim(scale.ndim, axes), 0)
        blocks = second_blocks(scale.shape, axes, self.second)
        rough = jnp.mean(scale, tuple(matrix), keepdims=True)
        mean = rough + jnp.mean(scale - rough, tuple(matrix), keepdims=True)
        counts = tuple(scale.shape[axis] // block for axis, block in zip(matrix, blocks))
        rest, elements = blocked(scale - mean, tuple(matrix), counts)
        absmax = jnp.max(jnp.abs(rest), elements, keepdims=True)
        codes = jnp.searchsorted(_DYNAMIC_BOUNDS, jnp.clip(rest * _reciprocal(absmax), -1, 1))
        return NestedScale(
            codes.astype(jnp.uint8).reshape(scale.shape),
            to_bits(absmax.squeeze(elements), "float32"),
            to_bits(mean, "float32"),
        )

    def scales(self, scale: Any) -> jax.Array:
        if not self.double:
            return from_bits(scale, "float32")
        values = jnp.take(DYNAMIC_MAP, scale.codes.astype(jnp.int32), mode="clip")
        absmax, mean = (spread(from_bits(bits, "float32"), values.shape) for bits in scale[1:])
        # The maximum keeps product and sum apart, with a rounding each as in bitsandbytes. Without the barrier the
        # lookup may be fused into the decoding and done for every element.
        return lax.optimization_barrier(jnp.maximum(values * absmax, np.finfo(np.float32).min) + mean)

    def bits_per_element(self, group: int | None = None) -> float:
        """Returns the stored bits per element; with ``double``, of whole second blocks and without the mean."""
        size = self.group if group is None else group
        return 4 + (8 + 32 / SECOND_BLOCK if self.double else 32) / size


def nf4(block: int = 64, double: bool = True) -> Nf4:
    """Returns the NF4 codec.

    Args:
      block: consecutive elements that share a scale, an even number.
      double: quantize the scales, too.
    """
    return Nf4(block, double)


def _reciprocal(x: jax.Array) -> jax.Array:
    """Returns ``1 / x`` rounded on its own, so that a product with it has bitsandbytes' two roundings."""
    return lax.optimization_barrier(1 / jnp.maximum(x, np.finfo(np.float32).tiny))


def matrix_ndim(ndim: int, axes: tuple[int, ...]) -> int:
    """Returns the number of trailing axes that are one matrix: those from the first of ``axes``, at least two."""
    return min(ndim, max(2, -min(axes)))


def second_blocks(shape: tuple[int, ...], axes: tuple[int, ...], second: tuple[int, int] | None) -> tuple[int, ...]:
    """Returns how many groups a second-level block covers along each axis of the matrix, in the order of the array.

    Args:
      shape: shape of the scales.
      axes: negative numbers of the group axes.
      second: groups along ``axes`` and along the other axes; None for the largest that fit in `SECOND_BLOCK`.

    Raises:
      ValueError: no such block divides the axes.
    """
    matrix = range(-matrix_ndim(len(shape), axes), 0)
    others = tuple(axis for axis in matrix if axis not in axes)
    fitting = [
        (rows * columns, rows, dict(zip((*axes, *others), (*along, *across))))
        for rows, along in _runs(tuple(shape[axis] for axis in axes))
        for columns, across in _runs(tuple(shape[axis] for axis in others))
        if ((rows, columns) == second if second else rows * columns <= SECOND_BLOCK)
    ]
    if not fitting:
        raise ValueError(f"second-level blocks of {second} groups do not divide scales of shape {shape} along {axes}")
    best = max(fitting, key=lambda entry: entry[:2])[2]
    return tuple(best[axis] for axis in matrix)


def _runs(sizes: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields runs of consecutive elements that divide axes of ``sizes``: their elements, and extent along each axis."""
    if not sizes:
        yield 1, ()
    for i, size in enumerate(sizes):
        for extent in range(1, min(size, SECOND_BLOCK) + 1):
            if size % extent == 0:
                yield extent * math.prod(sizes[i + 1 :]), (*(1,) * i, extent, *sizes[i + 1 :])
