"""Grouped integer codes by plain `jax.numpy`: what the kernels compute, line by line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._bits import flat_counter, hash_bits, pack, uniform, unpack
from pallas_kernels.codec.formats import Codes, Form


def bits_down(x: jax.Array) -> jax.Array:
    """Returns the bfloat16 bit patterns of float32 numbers, rounded to the next that is not above."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    below = bits + jnp.where(bits >> 31 == 1, np.uint32(0xFFFF), np.uint32(0))
    return (below >> 16).astype(jnp.uint16)


def step_bits(step: jax.Array) -> jax.Array:
    """Returns bfloat16 bit patterns of steps, not below them (an exact step stays); of zero, 1."""
    bits = lax.bitcast_convert_type(jnp.abs(step * np.float32(1 - 2**-20)), jnp.uint32)
    bits = (jnp.minimum(bits, np.uint32(0x7FC00000)) + np.uint32(0xFFFF)) >> 16
    return jnp.where(bits == 0, np.uint32(0x3F80), bits).astype(jnp.uint16)


def floats(bits: jax.Array) -> jax.Array:
    """Returns the float32 values of bfloat16 bit patterns."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def encode(x: jax.Array, words: tuple[jax.Array, jax.Array] | None, form: Form, first: Any = 0) -> Codes:
    """Returns the codes of groups of the last axis.

    Args:
      x: floating-point ``[..., n]``.
      words: two uint32 words of `pallas_kernels._bits.seed_words` for stochastic rounding, or None.
      form: the format.
      first: counter of the first element for stochastic rounding; the others follow in order.
    """
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, form.group)
    low, high = jnp.min(groups, -1, keepdims=True), jnp.max(groups, -1, keepdims=True)
    half = 2 ** (form.bits - 1)
    offset = None
    if not form.symmetric:
        offset = bits_down(low)
        scale = step_bits((high - floats(offset)) / (2**form.bits - 1))
    elif words is None:
        largest = jnp.where(-low > high, low, high) / -half
        scale = lax.bitcast_convert_type(largest.astype(jnp.bfloat16), jnp.uint16)
        scale = jnp.where((scale & 0x7FFF) == 0, np.uint16(0x3F80), scale)
    else:
        scale = step_bits(jnp.maximum(high, -low) / (half - 1))
    steps = (groups if offset is None else groups - floats(offset)) / floats(scale)
    if words is None:
        steps = jnp.round(steps)
    else:
        counter = flat_counter(x.shape) + jnp.asarray(first).astype(jnp.uint32)
        noise = uniform(hash_bits(words, counter)).reshape(groups.shape)
        steps = jnp.floor(steps) + (noise < steps - jnp.floor(steps))
    if form.symmetric:
        codes = (jnp.clip(steps, -half, half - 1) + half).astype(jnp.uint8)
        codes = codes ^ np.uint8(half) if form.bits == 8 else codes
    else:
        codes = jnp.clip(steps, 0, 2**form.bits - 1).astype(jnp.uint8)
    (plane,) = pack(codes.reshape(x.shape), form.bits, -1, form.group)
    return Codes(plane, scale.squeeze(-1), None if offset is None else offset.squeeze(-1))


def decode(made: Codes, form: Form, dtype: Any) -> jax.Array:
    """Returns the array ``[..., n]`` in ``dtype``."""
    codes, scale, offset = made
    numbers = unpack((codes,), form.bits, -1, form.group).reshape(*scale.shape, form.group)
    if form.symmetric and form.bits == 8:
        values = lax.bitcast_convert_type(numbers, jnp.int8).astype(jnp.float32)
    else:
        values = numbers.astype(jnp.float32) - (2 ** (form.bits - 1) if form.symmetric else 0)
    values = values * floats(scale)[..., None]
    if offset is not None:
        values = values + floats(offset)[..., None]
    return values.reshape(*scale.shape[:-1], -1).astype(dtype)
