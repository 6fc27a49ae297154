"""Counter-hash random bits, planar bit packing and code tables: plain `jax.numpy`, for kernels and for all else."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits per code -> bits per element of each uint8 plane, least significant bits of the code first."""

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of the 4-bit NormalFloat (QLoRA, 2023), by code."""


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that lets every input bit reach every output bit (lowbias32, hash-prospector)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def seed_words(seed: Any) -> tuple[jax.Array, jax.Array]:
    """Returns two mixed uint32 words, the form of a seed that `hash_bits` uses.

    Args:
      seed: a `jax.random` key, an integer below 2**64, an integer scalar, or integer words ``[n]``.

    Raises:
      TypeError: a seed of another type.
      ValueError: an array of seeds or keys.
    """
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        low, high = int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF
        words = [np.uint32(low), np.uint32(high)] if high else [np.uint32(low)]
    elif hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape:
            raise ValueError(f"expected one random key, got keys of shape {seed.shape}")
        words = list(jax.random.key_data(seed).reshape(-1).astype(jnp.uint32))
    elif hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jnp.integer):
        if seed.ndim > 1:
            raise ValueError(f"expected a scalar seed or seed words [n], got shape {seed.shape}")
        words = list(jnp.asarray(seed).reshape(-1).astype(jnp.uint32))
    else:
        raise TypeError(f"expected a random key, an integer or an integer array as seed, got {type(seed).__name__}")
    a, b = jnp.asarray(np.uint32(0x9E3779B9)), jnp.asarray(np.uint32(0x85EBCA6B))
    for word in words:
        a = _mix(a ^ word)
        b = _mix(b + a)
    return a, b


def hash_bits(words: tuple[jax.Array, jax.Array], counter: jax.Array) -> jax.Array:
    """Returns random bits that depend on nothing but the seed and the counter.

    For one seed this is a bijection of the counter: each of the 2**32 values comes once in a period.

    Args:
      words: two uint32 words of `seed_words`, scalars or broadcastable to ``counter``.
      counter: uint32 ``[...]``.

    Returns:
      uint32 ``[...]``.
    """
    a, b = words
    return _mix(_mix(counter ^ a) + b)


def flat_counter(shape: tuple[int, ...]) -> jax.Array:
    """Returns the row-major index of every element of ``shape`` as uint32, made of iotas only."""
    counter = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        counter = counter + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return counter


def random_bits(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 random bits of ``shape``; far cheaper than threefry and free to fuse into the consumer.

    Not for cryptography. Element i is ``hash_bits(seed_words(seed), i)`` with i the row-major index.

    Args:
      seed: as in `seed_words`.
      shape: at most 2**32 elements.

    Raises:
      ValueError: a shape of more than 2**32 elements, where the bits would repeat.
    """
    if math.prod(shape) > 2**32:
        raise ValueError(f"shape {tuple(shape)} has more than 2**32 elements; use one seed per slice")
    return hash_bits(seed_words(seed), flat_counter(tuple(shape)))


def uniform(bits: jax.Array) -> jax.Array:
    """Returns float32 multiples of 2**-24, uniform in [0, 1), from uint32 random bits (their upper 24)."""
    return (bits >> np.uint32(8)).astype(jnp.int32).astype(jnp.float32) * np.float32(2**-24)


def normal(bits: jax.Array) -> jax.Array:
    """Returns float32 standard normal numbers, within 5.4 deviations, from uint32 random bits."""
    centered = 2 * uniform(bits) + np.float32(2**-24 - 1)  # odd multiples of 2**-24 within (-1, 1)
    return np.float32(math.sqrt(2)) * lax.erf_inv(centered)


def round_to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down in size with the probability of the distance.

    What bfloat16 represents stays as it is, infinities and NaN too, and what is finite stays finite.

    Args:
      x: float32 ``[...]``.
      noise: uint32 ``[...]``, random below ``2**16``.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    bits = bits + jnp.where(size < 0x7F7F0000, noise, np.uint32(0))
    bits = jnp.where(size > 0x7F800000, bits | np.uint32(0x00400000), bits)
    return lax.bitcast_convert_type((bits >> np.uint32(16)).astype(jnp.uint16), jnp.bfloat16)


def _split(x: jax.Array, axis: int, *sizes: int) -> jax.Array:
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def pack(codes: jax.Array, bits: int, axis: int, block: int) -> tuple[jax.Array, ...]:
    """Packs codes into bytes, plane by plane.

    Within a block, element j of a plane with k elements per byte sits in byte ``j % (block / k)``, at bit
    ``(8 / k) * (j // (block / k))``: contiguous slices are shifted and joined, nothing moves between lanes.
    For 4 bits and a block of 32 this is the order of GGUF. Other widths take a plane per power of two (6 bits:
    4 + 2).

    Args:
      codes: uint8 ``[..., n, ...]`` below ``2**bits``.
      bits: 1 to 8.
      axis: the axis that is packed.
      block: elements per block; divides n.

    Returns:
      One uint8 array ``[..., n * plane_bits / 8, ...]`` per plane.

    Raises:
      ValueError: blocks that do not divide the axis or do not fill whole bytes.
    """
    size = codes.shape[axis]
    if size % block:
        raise ValueError(f"axis {axis} of size {size} does not divide into blocks of {block}")
    planes, low = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        if block % per_byte:
            raise ValueError(
                f"blocks of {block} elements along axis {axis} of size {size} cannot be packed at {bits} "
                f"bits: a block must be a multiple of {per_byte}"
            )
        field = (codes >> np.uint8(low)) & np.uint8(2**width - 1)
        parts = _split(field, axis, size // block, per_byte, block // per_byte)
        position = axis % codes.ndim + 1
        shifted = (lax.index_in_dim(parts, i, position, keepdims=False) << np.uint8(i * width) for i in range(per_byte))
        joined = functools.reduce(operator.or_, shifted)
        planes.append(joined.reshape(*codes.shape[: position - 1], size // per_byte, *codes.shape[position:]))
        low += width
    return tuple(planes)


def unpack(planes: tuple[jax.Array | np.ndarray, ...], bits: int, axis: int, block: int) -> jax.Array:
    """Inverse of `pack`: bytes are broadcast on a new axis and shifted, which fuses into the consumer.

    Returns:
      uint8 codes ``[..., n, ...]``.
    """
    fields, low = [], 0
    for plane, width in zip(map(jnp.asarray, planes), PLANES[bits], strict=True):
        per_byte = 8 // width
        position = axis % plane.ndim + 1
        field = plane
        if per_byte > 1:
            blocks = plane.shape[axis] * per_byte // block
            parts = _split(plane, axis, blocks, 1, block // per_byte)
            shape = tuple(per_byte if i == position else 1 for i in range(parts.ndim))
            shift = lax.broadcasted_iota(jnp.uint8, shape, position) * np.uint8(width)
            field = ((parts >> shift) & np.uint8(2**width - 1)).reshape(
                *plane.shape[: position - 1], blocks * block, *plane.shape[position:]
            )
        fields.append(field << np.uint8(low) if low else field)
        low += width
    return functools.reduce(operator.or_, fields)
