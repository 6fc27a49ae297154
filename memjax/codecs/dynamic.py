"""Codes for numbers that span many powers of ten: the dynamic map, and evenly spaced levels without zero.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022); Li et al., "Memory Efficient Optimizers
with 4-bit States" (2023).
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs.packed import Codec, check_group, to_bits
from pallas_kernels.optim.formats import TINY, dynamic_levels, nearest_code


@dataclasses.dataclass(frozen=True)
class _Blockwise(Codec):
    bits: int
    group: int | str
    symmetric: bool
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_group(self.group)

    @property
    def limit(self) -> float:
        return float(np.finfo(np.float32).max)

    @abc.abstractmethod
    def nearest(self, x: jax.Array) -> jax.Array:
        """Returns the uint8 codes nearest to float32 ``x``, whose largest size is 1."""

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if noise is not None:
            raise ValueError(f"{self} rounds to the nearest level only: encode without a key")
        scale = jnp.maximum(jnp.max(jnp.abs(x), axes, keepdims=True), TINY)
        return self.nearest(x / scale), to_bits(scale, self.scale_dtype), None


class Dynamic(_Blockwise):
    """Levels spaced evenly within a power of ten, twice as many in the next higher one, with 0 and 1; nearest.

    At 8 bits they span seven powers of ten, at 4 bits three. The scale is the largest size in the block, float32.
    ``symmetric`` codes have a sign. Bits per element: ``bits + 32 / group``.
    """

    def nearest(self, x: jax.Array) -> jax.Array:
        return nearest_code(x, self.bits, self.symmetric)

    def values(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(dynamic_levels(self.bits, self.symmetric))[codes.astype(jnp.int32)]


class Positive(_Blockwise):
    """Evenly spaced levels ``1 / 2**bits`` to 1, for numbers of which none may become zero; nearest.

    The scale is the largest element of the block, float32. Bits per element: ``bits + 32 / group``.
    """

    def nearest(self, x: jax.Array) -> jax.Array:
        steps = 2**self.bits
        return jnp.clip(jnp.round(x * steps) - 1, 0, steps - 1).astype(jnp.uint8)

    def values(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(jnp.float32) + 1) / np.float32(2**self.bits)


def dynamic(bits: int = 8, group: int | str = 256, signed: bool = True) -> Dynamic:
    """Returns the dynamic codec.

    Args:
      bits: 8 or 4.
      group: consecutive elements that share a scale, or ``"channel"`` for all of the group axes.
      signed: whether elements have signs; False takes none below zero.

    Raises:
      ValueError: other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"dynamic codes have 4 or 8 bits, got {bits}")
    return Dynamic(bits, group, signed)


def positive(bits: int = 4, group: int | str = 128) -> Positive:
    """Returns the codec of evenly spaced levels without zero; arguments as in `dynamic`, 1 to 8 bits."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, got {bits}")
    return Positive(bits, group, False)
