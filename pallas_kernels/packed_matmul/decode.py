"""Hopper kernel that decodes a packed weight into bfloat16 at the speed of memory, for products of many rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels._bits import PLANES
from pallas_kernels.packed_matmul.formats import TILE, Format, decode_arrays
from pallas_kernels.packed_matmul.kernel import integers, level_bytes

_PER_THREAD = 8  # neighbouring output features that a thread handles


def _levels(thread: _mgpu.Thread, word: Any) -> list[list[Any]]:
    """Returns the NF4 levels of the codes of four bytes: ``[nibble][2]`` words, each of two neighbouring bytes."""
    halves = level_bytes(thread, word)
    return [[thread.ptx("prmt.b32", low, high, order) for high, low in halves] for order in (0x6240, 0x7351)]


def _write_tile(form: Format, n: int, thread: _mgpu.Thread, *memrefs: Any) -> None:
    """Decodes one tile; a thread handles `_PER_THREAD` features of every eighth byte row."""
    n_planes = len(form.rows)
    planes, metas, out = memrefs[:n_planes], memrefs[n_planes:-1], memrefs[-1]
    width = PLANES[form.bits][0]
    per_byte = 8 // width
    lane = thread.lane
    column = thread.mul(thread.bits_and(lane, 15), _PER_THREAD)
    first = thread.add(thread.mul(thread.warp, 2), thread.shift_right(lane, 4))  # 0 to 7
    block_rows = form.group // per_byte
    always = thread.less(lane, 32)

    def meta(ref: Any, group: int) -> list[Any]:
        offset = thread.add(thread.mul(column, 2), group * n * 2)
        return thread.load(ref, offset, 4)

    for block in range(TILE // form.group):
        scales = meta(metas[0], block)
        offsets = meta(metas[1], block) if form.affine else None
        for start in range(0, block_rows, 8):
            row = thread.add(first, block * block_rows + start)
            words = thread.load(planes[0], thread.add(thread.mul(row, n), column), 2)
            high_words = None
            if form.bits == 6:
                quarter = form.group // 4
                high_row = thread.add(first, block * quarter + start % quarter)
                high_words = thread.load(planes[1], thread.add(thread.mul(high_row, n), column), 2)
            levels = [_levels(thread, word) for word in words] if form.nf4 else None
            for place in range(per_byte):
                values = []
                for i in range(_PER_THREAD // 2):
                    word, byte = divmod(2 * i, 4)
                    if levels is not None:
                        value = levels[word][place][byte // 2]
                    else:
                        spread = 0x3120 if byte == 0 else 0x1302
                        pair = thread.ptx("prmt.b32", words[word], words[word], spread)
                        high, high_bit = None, 0
                        if high_words is not None:
                            high = thread.ptx("prmt.b32", high_words[word], high_words[word], spread)
                            high_bit = 2 * ((start + place * block_rows) // (form.group // 4))
                        value = integers(thread, form, pair, place * width, high, high_bit)
                    if offsets is None:
                        value = thread.ptx("mul.bf16x2", value, scales[i])
                    else:
                        value = thread.ptx("fma.rn.bf16x2", value, scales[i], offsets[i])
                    values.append(value)
                target = thread.add(
                    thread.mul(thread.add(first, block * form.group + place * block_rows + start), n * 2),
                    thread.mul(column, 2),
                )
                thread.store(out, target, values, always)


def decode(
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    offset: jax.Array | None,
    *,
    form: Format,
    interpret: bool = False,
) -> jax.Array:
    """Returns the dense weight.

    Args:
      planes: uint8 ``[k * width / 8, n]`` each; k and n are multiples of 128.
      scale: bfloat16 ``[k / group, n]``.
      offset: the same for affine formats, else None.
      form: the format.
      interpret: run in the interpreter on a CPU.

    Returns:
      bfloat16 ``[k, n]``.
    """
    n = scale.shape[1]
    k = scale.shape[0] * form.group
    metas = [scale] if offset is None else [scale, offset]
    groups = TILE // form.group

    def body(*refs: Any) -> None:
        i, j = lax.axis_index("row"), lax.axis_index("column")
        columns = pl.ds(j * TILE, TILE)
        counts = [*form.rows, *([groups] * len(metas)), TILE]
        tiles = [ref.at[pl.ds(i * count, count), columns] for ref, count in zip(refs, counts)]
        if interpret:
            values = [tile[...] for tile in tiles[:-1]]
            n_planes = len(form.rows)
            tiles[-1][...] = decode_arrays(
                form, tuple(values[:n_planes]), values[n_planes], values[-1] if form.affine else None
            )
        else:
            _mgpu.each_thread(functools.partial(_write_tile, form, n), tiles)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((k, n), jnp.bfloat16),
        grid=(k // TILE, n // TILE),
        grid_names=("row", "column"),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*planes, *metas)
