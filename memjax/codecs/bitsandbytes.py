"""NF4 weights as bitsandbytes stores them, to and from `Packed`; codes and scales are only laid out anew.

bitsandbytes flattens the ``[out, in]`` weight, cuts it into blocks of 64, and packs two neighbours into a byte, the
first in the high bits. The scales of 256 consecutive blocks share a second-level scale. Here a block is packed by
halves (element j and j + 32 in one byte), and scales stay ``[out, in / 64]``.
Source: bitsandbytes, `functional.py` and `csrc/kernels.cu`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax.codecs.nf4 import SECOND_BLOCK, NestedScale, Nf4, second_blocks
from memjax.codecs.packed import Packed


class BitsAndBytes(NamedTuple):
    """A weight quantized by bitsandbytes; the arguments of `from_bitsandbytes`.

    Attributes:
      weight: uint8 ``[out * in / 2, 1]``, two codes a byte, the first in the high bits.
      absmax: float32 ``[out * in / block]``, or uint8 where they are nested.
      shape: ``(out, in)``.
      nested_absmax: float32 ``[ceil(out * in / block / 256)]`` or None.
      nested_offset: the mean that was taken off the scales before nesting, or None.
      block: elements per scale.
    """

    weight: np.ndarray
    absmax: np.ndarray
    shape: tuple[int, ...]
    nested_absmax: np.ndarray | None
    nested_offset: float | None
    block: int


def from_bitsandbytes(
    weight: np.ndarray,
    absmax: np.ndarray,
    shape: tuple[int, ...],
    nested_absmax: np.ndarray | None = None,
    nested_offset: float | None = None,
    block: int = 64,
    dtype: Any = "float32",
) -> Packed:
    """Lays the parts of a bitsandbytes NF4 weight out as `Packed`; nothing is decoded or rounded.

    Where blocks of 256 scales do not fall on whole rows, their second-level scales are repeated so often that each
    covers a rectangle: for ``in / block`` scales in a row, one for every ``gcd(256, in / block)`` of them.

    Args:
      weight: uint8, ``out * in / 2`` bytes in any shape.
      absmax: float32 scales, or uint8 codes of nested scales, ``[out * in / block]``.
      shape: ``(out, in)``.
      nested_absmax, nested_offset: as in `BitsAndBytes`.
      block: elements per scale.
      dtype: dtype of the array that the codes stand for.

    Returns:
      `Packed` of ``[out, in]`` with numpy leaves and groups along axis -1.

    Raises:
      ValueError: parts that do not fit the shape, or rows that are no whole number of blocks.
    """
    if len(shape) != 2 or min(shape) <= 0 or shape[1] % block or block % 2:
        raise ValueError(f"expected a weight [out, in] whose rows are whole blocks of {block}, got shape {shape}")
    rows, columns = shape[0], shape[1] // block
    nested = nested_absmax is not None
    groups = rows * columns
    _check("weight", weight, np.uint8, groups * block // 2)
    _check("absmax", absmax, np.uint8 if nested else np.float32, groups)
    pairs = np.stack([weight.reshape(-1) >> 4, weight.reshape(-1) & 15], axis=-1).reshape(rows, columns, 2, block // 2)
    plane = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, shape[1] // 2)
    absmax = absmax.reshape(rows, columns)
    if nested_absmax is None:
        return Packed((plane,), absmax.view(np.uint32), None, Nf4(block, False), (-1,), jnp.dtype(dtype))
    if nested_offset is None:
        raise ValueError("nested scales need the nested_offset that was taken off them")
    _check("nested_absmax", nested_absmax, np.float32, -(-groups // SECOND_BLOCK))
    along = math.gcd(SECOND_BLOCK, columns)
    across = math.gcd(SECOND_BLOCK // columns, rows) if along == columns else 1
    if groups <= SECOND_BLOCK:
        along, across = columns, rows
    flat = np.arange(groups).reshape(rows, columns)[::across, ::along] // SECOND_BLOCK
    scale = NestedScale(
        absmax,
        nested_absmax.reshape(-1)[flat].view(np.uint32),
        np.full((1, 1), nested_offset, np.float32).view(np.uint32),
    )
    natural = second_blocks((rows, columns), (-1,), None) == (across, along)
    codec = Nf4(block, True, None if natural else (along, across))
    return Packed((plane,), scale, None, codec, (-1,), jnp.dtype(dtype))


def to_bitsandbytes(packed: Packed) -> BitsAndBytes:
    """Returns the parts of a bitsandbytes NF4 weight; inverse of `from_bitsandbytes`.

    Scales whose second-level blocks are not those of bitsandbytes are returned decoded, in float32.

    Raises:
      ValueError: codes of another format, or not of one matrix with groups along its last axis (transpose first).
    """
    codec = packed.codec
    if not isinstance(codec, Nf4):
        raise ValueError(f"expected NF4 codes, got {codec}")
    if packed.axes != (-1,) or packed.ndim != 2:
        raise ValueError(
            f"bitsandbytes keeps [out, in] weights with blocks along the last axis, got shape {packed.shape} with "
            f"groups along {packed.axes}: index the stack or transpose first"
        )
    rows, columns = packed.shape[0], packed.counts[0]
    plane = np.asarray(packed.planes[0]).reshape(rows, columns, 1, -1)
    codes = np.concatenate([plane & 15, plane >> 4], axis=2).reshape(-1, 2)
    weight = (codes[:, 0] << 4 | codes[:, 1])[:, None]
    if codec.double:
        nested, mean = (np.asarray(bits).view(np.float32) for bits in packed.scale[1:])
        every = nested.repeat(rows // nested.shape[0], 0).repeat(columns // nested.shape[1], 1).reshape(-1)
        first = every[::SECOND_BLOCK]
        if (first.repeat(SECOND_BLOCK)[: every.size] == every).all():
            absmax = np.asarray(packed.scale.codes).reshape(-1)
            return BitsAndBytes(weight, absmax, packed.shape, first.copy(), float(mean[0, 0]), codec.group)
    absmax = np.asarray(codec.scales(packed.scale)).reshape(-1)
    return BitsAndBytes(weight, absmax, packed.shape, None, None, codec.group)


def _check(name: str, array: np.ndarray, dtype: Any, size: int) -> None:
    if array.dtype != dtype or array.size != size:
        raise ValueError(f"expected {name} of {size} {np.dtype(dtype).name}, got {array.size} {array.dtype}")
