"""Integer codes with a scale, and where asked an offset, per group of consecutive elements."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs.packed import Codec, check_group, check_scale_dtype, from_bits, round_steps, scale_bits, to_bits
from memjax.codecs.search import least_squares
from pallas_kernels.codec import Form


@dataclasses.dataclass(frozen=True)
class Grouped(Codec):
    """Signed codes times a scale (``symmetric``), or unsigned codes times a scale plus an offset.

    The scale (and offset) is rounded to ``scale_dtype`` first and codes are chosen for the rounded value, so
    no group is off by a common factor. A group of zeros has scale 1 and decodes to exact zeros.

    Symmetric, nearest: the element m of largest size is given the code ``-2**(bits - 1)``, so the scale is
    ``-m / 2**(bits - 1)`` and carries a sign. On Gaussian data in groups of 64 its mean squared error is 0.60, 0.76,
    0.85, 0.93 and 0.95 (2, 3, 4, 6 and 8 bits) of that of the grid ``2 |m| / (2**bits - 1)``, and 0.30, 0.58, 0.78,
    0.95 and 0.99 of that of the grid ``|m| / (2**(bits - 1) - 1)``. Errors are at most half a step, but elements within
    half a step of ``-m`` fall off the short end of the grid: off by one step at most (1.5 at 8 bits with bfloat16
    scales). With ``search`` the range is then shrunk where that lowers the squared error of the group, at 2 bits to
    0.81 and at 4 bits to 0.90 of it on the same data; what lies beyond is clipped. With an offset, ranges that leave up
    to a sixteenth of the codes unused are tried too: weights decoded from 4 bits with an offset fall onto the grid of
    60 of 63 steps, so 6 bits in the checkpoint's own groups keep them but for the rounding of the scale.
    Encoding what was decoded gives the same codes, if the dtype decoded to holds the scale.

    Symmetric, stochastic: the scale is ``|m| / (2**(bits - 1) - 1)`` rounded up, so nothing is clipped and
    the expectation of every element is its value.

    With an offset: the offset is the least element rounded down, and the scale spans the rest, rounded up, so
    nothing is clipped and errors are at most half a step. Encoding what was decoded into float32 gives the
    same codes where these two roundings moved the ends of the group by less than half a step: at 4 bits
    unless the group is narrow and far from zero, at 8 bits only with float16 or float32 scales.

    Bits per element: ``bits + s / group``, or ``bits + 2 s / group`` with an offset; s is the width of
    ``scale_dtype``.
    """

    bits: int
    group: int | str
    symmetric: bool
    scale_dtype: str
    search: bool = False

    def __post_init__(self) -> None:
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)

    def kernel_form(self, group: int) -> Form | None:
        known = self.bits in (2, 4, 8) and self.scale_dtype == "bfloat16" and not self.search
        return Form(self.bits, group, self.symmetric) if known else None

    @property
    def limit(self) -> float:
        largest = float(jnp.finfo(self.scale_dtype).max)
        if not self.symmetric:
            return largest / 2
        return min(largest * (2 ** (self.bits - 1) - 1), float(np.finfo(np.float32).max))

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        high, low = jnp.max(x, axes, keepdims=True), jnp.min(x, axes, keepdims=True)
        if self.search:
            if noise is not None:
                raise ValueError(f"{self} clips, so stochastic rounding would not be unbiased; use search=False")
            center = jnp.zeros((), x.dtype) if self.symmetric else jnp.mean(x, axes, keepdims=True)

            def propose(factor: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                shrink = jnp.minimum(factor, 1)
                low_end, high_end = (end + (1 - shrink) * (center - end) for end in (low, high))
                return self._range(low_end, high_end + (factor - shrink) * (high - low), noise)

            def squared_error(stored: tuple[jax.Array, jax.Array | None]) -> jax.Array:
                values = self._steps(x, *stored, None) * from_bits(stored[0], self.scale_dtype)
                if stored[1] is not None:
                    values = values + from_bits(stored[1], self.scale_dtype)
                return jnp.sum((values - x) ** 2, axes, keepdims=True)

            steps_wide = 2**self.bits - 1
            spare = () if self.symmetric else range(1, steps_wide // 16 + 1)
            scale, offset = least_squares(propose, squared_error, [steps_wide / (steps_wide - i) for i in spare])
        else:
            scale, offset = self._range(low, high, noise)
        steps = self._steps(x, scale, offset, noise)
        if not self.symmetric:
            return steps.astype(jnp.uint8), scale, offset
        half = 2 ** (self.bits - 1)
        codes = (steps + half).astype(jnp.uint8)
        return codes ^ np.uint8(half) if self.bits == 8 else codes, scale, None

    def _range(self, low: jax.Array, high: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Returns the bit patterns of the scale and offset of groups that reach from ``low`` to ``high``."""
        if not self.symmetric:
            offset = to_bits(low, self.scale_dtype, "down")
            span = high - from_bits(offset, self.scale_dtype)
            return scale_bits(span / (2**self.bits - 1), self.scale_dtype, "up"), offset
        half = 2 ** (self.bits - 1)
        if noise is None:
            return scale_bits(jnp.where(-low > high, low, high) / -half, self.scale_dtype, "nearest"), None
        return scale_bits(jnp.maximum(high, -low) / (half - 1), self.scale_dtype, "up"), None

    def _steps(self, x: jax.Array, scale: jax.Array, offset: jax.Array | None, noise: jax.Array | None) -> jax.Array:
        """Returns the integers, float32, that times scale plus offset stand for ``x``."""
        if offset is None:
            half = 2 ** (self.bits - 1)
            return jnp.clip(round_steps(x / from_bits(scale, self.scale_dtype), noise), -half, half - 1)
        steps = (x - from_bits(offset, self.scale_dtype)) / from_bits(scale, self.scale_dtype)
        return jnp.clip(round_steps(steps, noise), 0, 2**self.bits - 1)


def int8(group: int | str = 64, symmetric: bool = True, scale_dtype: str = "bfloat16", search: bool = False) -> Grouped:
    """Returns the 8-bit grouped codec.

    Args:
      group: consecutive elements that share a scale, or ``"channel"`` for all of the group axes.
      symmetric: signed codes and no offset; False stores an offset per group.
      scale_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
      search: choose every group's scale for the least squared error, among 48 ranges from the group's own down to
        0.27 of it (with an offset also up to 1.07 of it); takes about 50 times as long.
    """
    return Grouped(8, group, symmetric, scale_dtype, search)


def int6(group: int | str = 64, symmetric: bool = True, scale_dtype: str = "bfloat16", search: bool = False) -> Grouped:
    """Returns the 6-bit grouped codec; arguments as in `int8`."""
    return Grouped(6, group, symmetric, scale_dtype, search)


def int4(group: int | str = 64, symmetric: bool = True, scale_dtype: str = "bfloat16", search: bool = False) -> Grouped:
    """Returns the 4-bit grouped codec; arguments as in `int8`."""
    return Grouped(4, group, symmetric, scale_dtype, search)


def int3(group: int | str = 64, symmetric: bool = True, scale_dtype: str = "bfloat16", search: bool = False) -> Grouped:
    """Returns the 3-bit grouped codec; arguments as in `int8`."""
    return Grouped(3, group, symmetric, scale_dtype, search)


def int2(group: int | str = 64, symmetric: bool = True, scale_dtype: str = "bfloat16", search: bool = False) -> Grouped:
    """Returns the 2-bit grouped codec; arguments as in `int8`."""
    return Grouped(2, group, symmetric, scale_dtype, search)
