"""Small codes of every element of an array, packed along its last axis."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax.codecs import Codec, fused
from pallas_kernels._bits import pack, unpack
from pallas_kernels.codec import Form

_Array = jax.Array | jax.ShapeDtypeStruct
BLOCK = 128
"""Elements that share bytes; shards of the last axis that are multiples of it stay apart."""


def pack_codes(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Packs uint8 ``codes [..., n]`` below ``2**bits`` into planes, ``bits / 8`` bytes each where 8 divides n."""
    missing = -codes.shape[-1] % 8
    if missing:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    return pack(codes, bits, -1, math.gcd(codes.shape[-1], BLOCK))


def unpack_codes(planes: tuple[jax.Array, ...], bits: int, size: int) -> jax.Array:
    """Returns the uint8 codes ``[..., size]`` that `pack_codes` was given."""
    padded = size + -size % 8
    return unpack(planes, bits, -1, math.gcd(padded, BLOCK))[..., :size]


def group_of(codec: Codec, x: _Array) -> int:
    """Returns how many elements of the last axis of ``x`` share a scale."""
    return x.shape[-1] if codec.group == "channel" else int(codec.group)


def kernel_form(codec: Codec, x: _Array, unsupported: Callable[..., str | None]) -> Form | None:
    """Returns what the kernels call ``codec``, or None where one that makes codes of ``x`` does not run.

    Args:
      codec: of a residual.
      x: ``[..., n]``, float.
      unsupported: (form, shape, dtype) -> why a kernel cannot take such an array, or None.
    """
    form = codec.kernel_form(group_of(codec, x))
    if form is None or not fused.takes(form, x.shape, x.dtype) or unsupported(form, x.shape, x.dtype):
        return None
    return form
