"""8-bit floating point e4m3 with a scale per group: four exponent bits, three fraction bits, no infinities.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.codecs.packed import Codec, check_group, check_scale_dtype, from_bits, round_steps, scale_bits

_LARGEST = 448.0
_LEAST_EXPONENT = -6
_FRACTION_BITS = 3


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """Codes are the bit patterns of float8_e4m3fn; ``8 + s / group`` bits per element.

    The scale, of s bits, is the largest size in the group over 448. Errors are at most 1/16 of an element's size
    (and a step of the rounded scale at the end of the range), or ``scale * 2**-10`` where that is more. A group of
    zeros has scale 1.
    """

    group: int | str
    scale_dtype: str

    bits = 8
    symmetric = True

    def __post_init__(self) -> None:
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)

    @property
    def limit(self) -> float:
        return min(float(jnp.finfo(self.scale_dtype).max) * _LARGEST, float(np.finfo(np.float32).max))

    def values(self, codes: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        step = jnp.max(jnp.abs(x), axes, keepdims=True) / _LARGEST
        scale = scale_bits(step, self.scale_dtype, "nearest" if noise is None else "up")
        scaled = x / from_bits(scale, self.scale_dtype)
        if noise is not None:
            exponent = jnp.maximum(jnp.frexp(scaled)[1] - 1, _LEAST_EXPONENT) - _FRACTION_BITS
            scaled = jnp.ldexp(round_steps(jnp.ldexp(scaled, -exponent), noise), exponent)
        rounded = jnp.clip(scaled, -_LARGEST, _LARGEST).astype(jnp.float8_e4m3fn)
        return lax.bitcast_convert_type(rounded, jnp.uint8), scale, None


def fp8(group: int | str = "channel", scale_dtype: str = "bfloat16") -> Fp8:
    """Returns the e4m3 codec.

    Args:
      group: consecutive elements that share a scale, or ``"channel"`` for all of the group axes.
      scale_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """
    return Fp8(group, scale_dtype)
