"""Small codes of every element of an array, packed along its last axis."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels._bits import pack, unpack

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
