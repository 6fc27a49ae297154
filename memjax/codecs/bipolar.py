"""Bipolar integers: n bits that stand for the odd integers from ``-(2**n - 1)`` to ``2**n - 1``, times a scale.

Bit i adds ``2**i`` where it is set and takes it away where it is not, so every bit plane has the same sign rule, and
products of planes need no special case. With u the unsigned code the integer is ``2 u - (2**n - 1)``: an unsigned
grid whose zero point lies half-way between two codes.
Source: Ma et al., Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores, 2025.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs.packed import Codec, check_group, check_scale_dtype, from_bits, round_steps, to_bits
from memjax.codecs.search import least_squares


@dataclasses.dataclass(frozen=True)
class Bipolar(Codec):
    """Odd integers times a scale; ``bits + s / group`` bits per element, s the width of ``scale_dtype``.

    The scale is ``|m| / (2**bits - 1)`` with m the element of largest size, so both ends of the grid are used and
    nothing is clipped; errors are at most one scale, half the distance between two values. Zero is not on the grid:
    it decodes to plus one scale, except in a group of zeros, whose scale is 0.
    """

    bits: int
    group: int | str
    scale_dtype: str
    search: bool = False

    symmetric = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(1, 9):
            raise ValueError(f"bits must be 1 to 8, got {self.bits!r}")
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)

    @property
    def limit(self) -> float:
        largest = float(jnp.finfo(self.scale_dtype).max)
        return min(largest * (2**self.bits - 1), float(np.finfo(np.float32).max))

    def values(self, codes: jax.Array) -> jax.Array:
        return to_bipolar(codes, self.bits).astype(jnp.float32)

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        step = jnp.max(jnp.abs(x), axes, keepdims=True) / (2**self.bits - 1)

        def codes(scale: jax.Array) -> jax.Array:
            steps = (x / jnp.where(scale == 0, 1.0, scale) + (2**self.bits - 1)) / 2
            steps = jnp.floor(steps + 0.5) if noise is None else round_steps(steps, noise)
            return jnp.clip(steps, 0, 2**self.bits - 1)

        if not self.search:
            scale = to_bits(step, self.scale_dtype, "nearest" if noise is None else "up")
            return codes(from_bits(scale, self.scale_dtype)).astype(jnp.uint8), scale, None
        if noise is not None:
            raise ValueError(f"{self} clips, so stochastic rounding would not be unbiased; use search=False")

        def squared_error(bits: jax.Array) -> jax.Array:
            scale = from_bits(bits, self.scale_dtype)
            return jnp.sum(((2 * codes(scale) - (2**self.bits - 1)) * scale - x) ** 2, axes, keepdims=True)

        scale = least_squares(lambda factor: to_bits(factor * step, self.scale_dtype), squared_error)
        return codes(from_bits(scale, self.scale_dtype)).astype(jnp.uint8), scale, None


def bipolar(bits: int, group: int | str = 64, scale_dtype: str = "bfloat16", search: bool = False) -> Bipolar:
    """Returns the codec of bipolar integers.

    Args:
      bits: 1 to 8.
      group: consecutive elements that share a scale, or ``"channel"`` for all of the group axes.
      scale_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
      search: choose every group's scale for the least squared error, as in `int8`.
    """
    return Bipolar(bits, group, scale_dtype, search)


def to_bipolar(codes: jax.Array, bits: int) -> jax.Array:
    """Returns the odd integers, int32, that unsigned ``codes`` below ``2**bits`` stand for.

    A signed integer v, whose unsigned code is ``v + 2**(bits - 1)``, becomes ``2 v + 1``: ``s v + z`` is
    ``(s / 2) (2 v + 1) + (z - s / 2)``.
    """
    return 2 * jnp.asarray(codes).astype(jnp.int32) - (2**bits - 1)


def from_bipolar(integers: Any, bits: int) -> jax.Array:
    """Returns the uint8 codes of odd integers ``-(2**bits - 1) .. 2**bits - 1``; inverse of `to_bipolar`."""
    return ((jnp.asarray(integers) + (2**bits - 1)) // 2).astype(jnp.uint8)
