"""Hopper kernels for RMSNorm: forward, with the codes of what is normalised, and backward, which reads them.

A row is shared by the 1, 2 or 4 warps that its units occupy, so that it stays in registers from its reading to the
writing of what depends on all of it; the other warps of the block have rows of their own. Backward, a block goes down
the rows in strides of the whole grid, sums the gradient of the gain on its way, and reads a row while it handles the
one before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels.codec import words
from pallas_kernels.codec.formats import SPAN, Codes, Form
from pallas_kernels.norm import reference

DTYPE = "bfloat16"
WARPS = 4
MAX_UNIT_ELEMENTS = 64
"""Elements of a row that a thread can hold in registers with all that backward needs of them."""


class Cut(NamedTuple):
    """How a row is cut.

    Attributes:
      warps: of a block that share a row.
      units: of each of their threads.
    """

    warps: int
    units: int

    @property
    def rows(self) -> int:
        """Rows that a block handles at a time."""
        return WARPS // self.warps


def cut_row(size: int, form: Form) -> Cut | None:
    """Returns how to cut rows of so many elements, or None where whole units do not fill them or they are too long."""
    for warps in (4, 2, 1):
        units, rest = divmod(size, form.unit * 32 * warps)
        if units and not rest:
            return Cut(warps, units) if units * form.unit <= MAX_UNIT_ELEMENTS else None
    return None


class _Row:
    """A thread's part of rows of one size: where it lies, and sums over it."""

    def __init__(self, thread: Any, form: Form, size: int, cut: Cut, sums: Any) -> None:
        self.thread, self.form, self.size, self.cut, self.sums = thread, form, size, cut, sums
        shift = cut.warps.bit_length() - 1
        self.row = thread.shift_right(thread.warp, shift) if shift else thread.warp
        self.where = words.place(thread, form, thread.bits_and(thread.index, 32 * cut.warps - 1))
        self.threads = 32 * cut.warps
        self.step = self.threads * form.unit

    def pointer(self, memref: Any, itemsize: int) -> Any:
        """Returns the address of the part's first element in a row of a dense array."""
        start = self.thread.pointer(memref, self.thread.mul(self.where.element, itemsize))
        return self.thread.advance(start, self.row, self.size * itemsize)

    def code_pointers(self, memrefs: Any) -> list[Any]:
        return self.down(words.code_pointers(self.thread, self.where, memrefs), self.row, self.code_bytes())

    def code_bytes(self) -> list[int]:
        """Returns the bytes of a row's codes, scales and offsets."""
        groups = self.size // self.form.group * 2
        return [self.size * self.form.bits // 8, groups, groups]

    def down(self, pointers: list[Any], rows: Any, sizes: list[int]) -> list[Any]:
        """Returns the addresses some rows further down; ``sizes`` are the bytes of a row."""
        return [self.thread.advance(pointer, rows, size) for pointer, size in zip(pointers, sizes)]

    def read_gain(self, pointer: Any, unit: int) -> list[list[Any]]:
        return words.read_unit(self.thread, self.form, "float32", pointer, unit * self.step, once=False)

    def sum(self, terms: list[Any], turn: Any) -> Any:
        """Returns the sum of the row's terms; ``turn`` is a word, 0 and 1 in turns."""
        thread = self.thread
        total = functools.reduce(functools.partial(thread.ptx, "add.f32"), terms)
        total = words.sum_lanes(thread, total)
        if self.cut.warps == 1:
            return total
        start = thread.mul(turn, 4 * WARPS)
        thread.write_shared(self.sums, thread.add(start, thread.mul(thread.warp, 4)), total)
        thread.barrier()
        start = thread.add(start, thread.mul(self.row, 4 * self.cut.warps))
        parts = [thread.load_after_barrier(self.sums, thread.add(start, 4 * i)) for i in range(self.cut.warps)]
        return functools.reduce(functools.partial(thread.ptx, "add.f32"), parts)


def forward_rows(form: Form, size: int, cut: Cut, eps: float, thread: Any, *memrefs: Any) -> None:
    """The program of a thread: its part of one row."""
    x, gain, y, *packed, rstd, sums = memrefs
    ptx = thread.ptx
    part = _Row(thread, form, size, cut, sums)
    source, target = (part.pointer(ref, 2) for ref in (x, y))
    gains = thread.pointer(gain, thread.mul(part.where.element, 4))
    read = [words.read_unit(thread, form, DTYPE, source, i * part.step) for i in range(cut.units)]
    squares = []
    for unit in read:
        for span in unit:
            values = words.floats(thread, DTYPE, span)
            total = ptx("mul.f32", values[0], values[0])
            for value in values[1:]:
                total = ptx("fma.rn.f32", value, value, total)
            squares.append(total)
    mean = ptx("mul.f32", part.sum(squares, thread.const(0)), 1 / size)
    inverse = ptx("rsqrt.approx.f32", ptx("add.f32", mean, eps))
    thread.write(thread.pointer(rstd, thread.mul(part.row, 4)), 0, [inverse])
    outs = part.code_pointers(packed)
    for i, unit in enumerate(read):
        normalized, results = [], []
        for span, gain_span in zip(unit, part.read_gain(gains, i)):
            values = [ptx("mul.f32", value, inverse) for value in words.floats(thread, DTYPE, span)]
            results.append([ptx("mul.f32", value, g) for value, g in zip(values, gain_span)])
            normalized.append(words.pack_floats(thread, DTYPE, values))
        words.write_unit(thread, form, DTYPE, target, i * part.step, results)
        made, found = words.encode_unit(thread, form, DTYPE, normalized, None)
        words.write_codes(thread, form, part.where, outs, i * part.threads, made, found)


def backward_rows(form: Form, size: int, cut: Cut, thread: Any, *operands: Any) -> None:
    """The program of a thread: its part of as many rows as the last word says.

    They are ``stride * Cut.rows`` apart; the stride and the first (times `Cut.rows`) are the words before.
    """
    *memrefs, first, stride, count = operands
    dy, *packed, rstd, gain, dx, d_gain, sums = memrefs
    ptx = thread.ptx
    part = _Row(thread, form, size, cut, sums)
    slopes, targets = (part.pointer(ref, 2) for ref in (dy, dx))
    codes = part.code_pointers(packed)
    inverses = thread.pointer(rstd, thread.mul(part.row, 4))
    gains_at = thread.pointer(gain, thread.mul(part.where.element, 4))
    code_bytes = part.code_bytes()
    last = ptx("sub.u32", count, 1)

    def row_of(i: Any) -> Any:
        """Returns how far down the i-th row is, from the first of all."""
        row = ptx("mad.lo.u32", i, stride, first)
        return thread.mul(row, cut.rows) if cut.rows > 1 else row

    def read(row: Any) -> list[Any]:
        """Reads all that belongs to a row, as a flat list of words."""
        source = thread.advance(slopes, row, 2 * size)
        sources = part.down(codes, row, code_bytes)
        found = []
        for i in range(cut.units):
            found += [w for span in words.read_unit(thread, form, DTYPE, source, i * part.step) for w in span]
            made, unit_range = words.read_codes(thread, form, sources, i * part.threads)
            found += [*made, unit_range.scale] + ([] if form.symmetric else [unit_range.offset])
        return [*found, *thread.read(thread.advance(inverses, row, 4), 0, 1, once=False)]

    def unit_of(held: list[Any], i: int) -> list[tuple[Any, Any, Any]]:
        """Returns (dy, normalised value, gain) of the elements of a unit, in the order of memory and spans."""
        count = form.spans * SPAN // 2
        each = count + (3 if form.symmetric else 4)
        mine = held[i * each : (i + 1) * each]
        found = words.Range(mine[count + 2], None, None if form.symmetric else mine[count + 3], None)
        values = words.decode_unit(thread, form, mine[count : count + 2], found)
        flat = [value for span in values for value in span]
        gains = [g for span in part.read_gain(gains_at, i) for g in span]
        return list(zip(words.floats(thread, DTYPE, mine[:count]), flat, gains))

    def step(i: Any, carry: list[Any]) -> list[Any]:
        held, totals = carry[:held_words], carry[held_words:]
        following = read(row_of(ptx("min.u32", thread.add(i, 1), last)))
        terms = []
        for u in range(cut.units):
            for value, normalized, g in unit_of(held, u):
                terms.append((ptx("mul.f32", value, g), normalized))
        total = ptx("mul.f32", *terms[0])
        for slope, normalized in terms[1:]:
            total = ptx("fma.rn.f32", slope, normalized, total)
        mean = ptx("mul.f32", part.sum([total], thread.bits_and(i, 1)), 1 / size)
        inverse = held[-1]
        less = ptx("mul.f32", ptx("mul.f32", mean, inverse), -1.0)
        target = thread.advance(targets, row_of(i), 2 * size)
        sums_after: list[Any] = []
        for u in range(cut.units):
            results = []
            for value, normalized, g in unit_of(held, u):
                slope = ptx("mul.f32", ptx("mul.f32", value, g), inverse)
                results.append(ptx("fma.rn.f32", normalized, less, slope))
                sums_after.append(ptx("fma.rn.f32", value, normalized, totals[len(sums_after)]))
            spans = [results[j * SPAN : (j + 1) * SPAN] for j in range(form.spans)]
            words.write_unit(thread, form, DTYPE, target, u * part.step, spans)
        return [*following, *sums_after]

    held = read(row_of(thread.const(0)))
    held_words = len(held)
    carry = thread.loop(count, step, [*held, *[thread.const(0)] * (cut.units * form.unit)])
    totals = carry[held_words:]
    target = part.pointer(d_gain, 4)
    for u in range(cut.units):
        mine = totals[u * form.unit : (u + 1) * form.unit]
        spans = [mine[j * SPAN : (j + 1) * SPAN] for j in range(form.spans)]
        words.write_unit(thread, form, "float32", target, u * part.step, spans)


def forward(
    x: jax.Array, gain: jax.Array, *, eps: float, form: Form, interpret: bool = False
) -> tuple[jax.Array, Codes, jax.Array]:
    """Returns the result, the codes, and ``1 / rms`` of every row.

    Args:
      x: bfloat16 ``[T, D]`` that `cut_row` cuts, T a multiple of its rows.
      gain: float32 ``[D]``.
      eps: added to the mean square.
      form: the format.
      interpret: run in the interpreter on a CPU.
    """
    tokens, size = x.shape
    cut = cut_row(size, form)
    assert cut is not None
    rows, blocks = cut.rows, tokens // cut.rows
    codes = jax.ShapeDtypeStruct((blocks, rows, size * form.bits // 8), jnp.uint8)
    groups = jax.ShapeDtypeStruct((blocks, rows, size // form.group), jnp.uint16)
    packed = [codes, groups] if form.symmetric else [codes, groups, groups]

    def body(x_ref: Any, gain_ref: Any, *rest: Any) -> None:
        *outs, sums = rest
        block = lax.axis_index("block")
        tiles = [ref.at[block] for ref in outs]
        if interpret:
            made = reference.forward(x_ref[block], gain_ref[...], eps, form)
            for tile, value in zip(tiles, jax.tree.leaves(made)):
                tile[...] = value
        else:
            program = functools.partial(forward_rows, form, size, cut, eps)
            _mgpu.each_thread(program, [x_ref.at[block], gain_ref, *tiles, sums])

    y, *parts, rstd = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((blocks, rows, size), x.dtype),
            *packed,
            jax.ShapeDtypeStruct((blocks, rows), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=(plgpu.SMEM((2 * WARPS,), jnp.float32),),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x.reshape(blocks, rows, size), gain)
    return y.reshape(x.shape), Codes(*(part.reshape(tokens, -1) for part in parts)), rstd.reshape(-1)


def backward(
    dy: jax.Array,
    made: Codes,
    rstd: jax.Array,
    gain: jax.Array,
    *,
    form: Form,
    blocks: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``x``, bfloat16 ``[T, D]``, and of the gain, float32 ``[D]``.

    Args:
      dy: bfloat16 ``[T, D]``.
      made: codes that `forward` made.
      rstd: float32 ``[T]`` of `forward`.
      gain: float32 ``[D]``.
      form: the format.
      blocks: that go down the rows; at most ``T / Cut.rows``.
      interpret: run in the interpreter on a CPU.
    """
    tokens, size = dy.shape
    cut = cut_row(size, form)
    assert cut is not None
    strips = tokens // cut.rows
    operands = [part.reshape(strips, cut.rows, -1) for part in (dy, *jax.tree.leaves(made))]

    def body(*refs: Any) -> None:
        *ins, rstd_ref, gain_ref, dx_ref, d_gain_ref, sums = refs
        block = lax.axis_index("block")
        if interpret:
            d_gain_ref[block] = jnp.zeros((cut.rows, size), jnp.float32)
            for i in range(-(-strips // blocks)):

                @pl.when(block + i * blocks < strips)
                def _one(strip: Any = block + i * blocks) -> None:
                    values = [ref[strip] for ref in ins]
                    made = Codes(*values[1:])
                    dx_ref[strip], part = reference.backward(values[0], made, rstd_ref[strip], gain_ref[...], form)
                    d_gain_ref[block, 0] += part

        else:
            count = lax.div(strips - block + (blocks - 1), jnp.int32(blocks))
            _mgpu.each_thread(
                functools.partial(backward_rows, form, size, cut),
                [*ins, rstd_ref, gain_ref, dx_ref, d_gain_ref.at[block], sums],
                [block, jnp.int32(blocks), count],
            )

    dx, d_gain = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((strips, cut.rows, size), dy.dtype),
            jax.ShapeDtypeStruct((blocks, cut.rows, size), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=(plgpu.SMEM((2 * WARPS,), jnp.float32),),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands, rstd.reshape(strips, cut.rows), gain)
    return dx.reshape(dy.shape), jnp.sum(d_gain, axis=(0, 1))
