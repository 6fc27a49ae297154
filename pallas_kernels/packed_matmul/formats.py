"""The formats of packed weights, by plain `jax.numpy`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._bits import NF4_LEVELS, PLANES, unpack

TILE = 128
"""Inputs and output features of a tile, of which a weight's sizes must be multiples."""


class Format(NamedTuple):
    """How codes are to be read.

    Attributes:
      bits: 4, 6 or 8.
      group: inputs that share a scale: 32, 64 or 128; codes are packed in blocks of as many.
      nf4: whether codes are indices of the 16 levels of NF4; else integers.
      affine: whether codes are unsigned and have an offset per group; else they are signed.
    """

    bits: int
    group: int
    nf4: bool = False
    affine: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        """Bytes per plane that `TILE` inputs of one output feature take."""
        return tuple(TILE * width // 8 for width in PLANES[self.bits])


def decode_arrays(form: Format, planes: tuple[jax.Array, ...], scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    """Returns the weight, bfloat16 ``[k, n]``: each code's value times its scale (plus its offset), rounded once."""
    codes = unpack(planes, form.bits, 0, form.group)
    if form.nf4:
        values = jnp.zeros(codes.shape, jnp.float32)
        for code, level in enumerate(NF4_LEVELS):
            values = jnp.where(codes == code, level, values)
        values = values.astype(jnp.bfloat16)
    elif form.affine:
        values = codes.astype(jnp.bfloat16)
    elif form.bits == 8:
        values = lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.bfloat16)
    else:
        values = (codes.astype(jnp.int32) - 2 ** (form.bits - 1)).astype(jnp.bfloat16)
    spread = functools.partial(jnp.repeat, repeats=form.group, axis=0)
    if offset is None:
        values = values * spread(scale)
    else:
        wide = values.astype(jnp.float32) * spread(scale).astype(jnp.float32) + spread(offset).astype(jnp.float32)
        values = wide.astype(jnp.bfloat16)
    return values
