"""Hopper kernel for products of a few rows with a packed weight: codes become tensor-core operands in registers.

The weight is the left operand of wgmma: its 64 rows are output features, so that one row of activations costs 8 columns
and not 64. A stage of the pipeline holds 128 inputs for each compute warpgroup; the warpgroups of a block share the
inputs between them and add their sums at the end. A thread reads words of four neighbouring output features; the four
become rows r and r + 8 of two tiles, so nothing is exchanged between threads.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels._bits import NF4_LEVELS, PLANES
from pallas_kernels.packed_matmul.formats import TILE, Format, decode_arrays

MAX_ROWS = 64


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      warpgroups: 1 to 4, among which the tiles of a block go round.
      stages: tiles in flight; a multiple of ``warpgroups``.
      splits: blocks (1, 2 or 4, a cluster) that share the inputs of an output tile.
      parts: clusters that share them, each of which writes sums of its own for XLA to add up. Clusters of four leave
        multiprocessors idle, for those that may form one are no multiple of four on every card.
    """

    warpgroups: int
    stages: int
    splits: int
    parts: int = 1


# Registers a thread of the computing warpgroups, of what is left by the one that fetches.
_REGISTERS = {2: 232, 3: 152, 4: 104}


def magic(value: int) -> int:
    """Returns two bfloat16 numbers 128 + value as one word; the lowest 7 bits of 128 + v are v."""
    return int(np.asarray(128 + value, jnp.bfloat16).view(np.uint16)) * 0x10001


def level_bytes(thread: _mgpu.Thread, word: Any) -> list[tuple[Any, Any]]:
    """Returns the high and the low bytes of the NF4 levels of a word's codes, as bfloat16.

    Returns:
      For each half of the word, (high, low): words of a byte for each of the half's four codes, the lowest first.
    """
    ptx = thread.ptx
    patterns = np.asarray(NF4_LEVELS, jnp.bfloat16).view(np.uint16)
    tables = [
        [thread.const(int(w)) for w in part.astype(np.uint8).view("<u4")] for part in (patterns >> 8, patterns & 255)
    ]
    index = ptx("and.b32", word, 0x77777777)
    choice = ptx("lop3.b32", ptx("shr.b32", word, 1), 0x44444444, 0x32103210, 0xEA)
    found = []
    for half in (0, 1):
        if half:
            index, choice = ptx("shr.b32", index, 16), ptx("shr.b32", choice, 16)
        high, low = (
            ptx("prmt.b32", ptx("prmt.b32", t[0], t[1], index), ptx("prmt.b32", t[2], t[3], index), choice)
            for t in tables
        )
        found.append((high, low))
    return found


def integers(thread: _mgpu.Thread, form: Format, pair: Any, bit: int, high: Any, high_bit: int) -> Any:
    """Returns two integer codes, in the lowest bytes of the halves of ``pair``, as bfloat16 numbers.

    Args:
      pair: bytes of the first plane, and the bit at which the codes start in them.
      bit: see ``pair``.
      high: bytes of the second plane, of 6-bit codes, and the bit there.
      high_bit: see ``high``.
    """
    ptx = thread.ptx
    if form.bits == 8 and not form.affine:
        low = ptx("lop3.b32", pair, 0x007F007F, magic(0), 0xEA)
        return ptx("sub.bf16x2", low, ptx("lop3.b32", pair, 0x00800080, magic(0), 0xEA))
    if bit:
        pair = ptx("shr.b32", pair, bit)
    code = ptx("lop3.b32", pair, 0x000F000F, magic(0), 0xEA)
    if form.bits == 6:
        if high_bit != 4:
            high = ptx("shl.b32" if high_bit < 4 else "shr.b32", high, abs(4 - high_bit))
        code = ptx("lop3.b32", high, 0x00300030, code, 0xEA)
    return ptx("sub.bf16x2", code, thread.const(magic(0 if form.affine else 2 ** (form.bits - 1))))


class _Codes:
    """What one thread reads of a tile: the bytes of four output features, for any 16 inputs."""

    def __init__(self, thread: _mgpu.Thread, form: Format, planes: tuple[Any, ...]) -> None:
        self.thread, self.form, self.planes = thread, form, planes
        column = thread.add(thread.mul(thread.warp, 32), thread.mul(thread.row, 4))
        self.column = column
        self.offsets = []
        for odd in (0, 1):
            row = thread.add(thread.mul(thread.pair, 2), odd)
            self.offsets.append(thread.add(thread.mul(row, 128), thread.xor(column, thread.mul(row, 16))))
        self._words = functools.cache(self._load)
        self._pairs = functools.cache(self._pair)

    def _load(self, plane: int, rows: int) -> tuple[Any, Any]:
        """Returns the words of four features at byte rows ``rows + 2 pair`` and the next."""
        return tuple(
            self.thread.load(self.planes[plane], self.thread.add(offset, rows * 128))[0] for offset in self.offsets
        )

    def _pair(self, plane: int, rows: int, feature: int) -> Any:
        """Returns one feature's two bytes of `_load`, in the lowest bytes of the two halves of a word."""
        first, second = self._words(plane, rows)
        return self.thread.ptx("prmt.b32", first, second, feature * 0x11 | (feature + 4) * 0x1100)

    def place(self, plane: int, step: int) -> tuple[int, int]:
        """Returns the byte row and the bit at which a plane holds the 16 inputs of ``step``."""
        width, group = PLANES[self.form.bits][plane], self.form.group
        block, inside = divmod(step, group // 16)
        chunks = group * width // 8 // 16
        return block * (group * width // 8) + inside % chunks * 16, inside // chunks * width

    def integers(self, step: int, half: int, feature: int) -> Any:
        """Returns two codes of one feature, inputs ``16 step + 8 half + 2 pair`` and the next, as bfloat16 numbers."""
        row, bit = self.place(0, step)
        pair, high, high_bit = self._pairs(0, row + 8 * half, feature), None, 0
        if self.form.bits == 6:
            row, high_bit = self.place(1, step)
            high = self._pairs(1, row + 8 * half, feature)
        return integers(self.thread, self.form, pair, bit, high, high_bit)

    @functools.cache  # noqa: B019
    def _levels(self, row: int) -> list[list[Any]]:
        """Returns, for two byte rows (see `_load`), the levels of each feature's byte as a word ``[row][feature]``."""
        ptx, table = self.thread.ptx, self.planes[-1]
        bank = self.thread.mul(self.thread.lane, 4)
        found = []
        for word in self._words(0, row):
            places = [ptx("shl.b32", word, 7), *(ptx("shr.b32", word, 8 * feature - 7) for feature in (1, 2, 3))]
            found.append([self.thread.load(table, ptx("lop3.b32", p, 0x7F80, bank, 0xEA))[0] for p in places])
        return found

    def levels(self, step: int, half: int, feature: int) -> Any:
        """Returns two levels, as `integers` does codes."""
        row, bit = self.place(0, step)
        first, second = self._levels(row + 8 * half)
        return self.thread.ptx("prmt.b32", first[feature], second[feature], 0x7632 if bit else 0x5410)

    def scales(self, ref: Any, group: int) -> list[Any]:
        """Returns the bfloat16 scales of the four features in one group, each in both halves of a word."""
        offset = self.thread.add(self.thread.mul(self.column, 2), group * TILE * 2)
        words = self.thread.load(ref, offset, 2)
        return [
            self.thread.ptx("prmt.b32", words[i // 2], words[i // 2], 0x3232 if i % 2 else 0x1010) for i in range(4)
        ]


def _write_table(thread: _mgpu.Thread, memref: Any) -> None:
    """Writes the NF4 levels of every byte's two codes to memory ``[byte, lane]``, a column for each bank and lane."""
    for upper in (0, 128):
        byte = thread.add(thread.mul(thread.warp, 32), thread.lane, upper)
        high, low = level_bytes(thread, byte)[0]
        word = thread.ptx("prmt.b32", low, high, 0x5140)
        for i in range(32):
            bank = thread.bits_and(thread.add(thread.lane, i), 31)
            thread.write_shared(memref, thread.add(thread.mul(byte, 128), thread.mul(bank, 4)), word)
    thread.barrier()


def _decode_words(form: Format, thread: _mgpu.Thread, *memrefs: Any) -> np.ndarray:
    """Makes a thread's words of the transposed weight tile ``[features, inputs]``, scaled; see `_mgpu.fragment`."""
    n_planes = len(form.rows)
    codes = _Codes(thread, form, (*memrefs[:n_planes], *memrefs[-1:]) if form.nf4 else memrefs[:n_planes])
    words = np.empty((2, TILE // 8, 2), dtype=object)
    for group in range(TILE // form.group):
        scales = codes.scales(memrefs[n_planes], group)
        offsets = codes.scales(memrefs[n_planes + 1], group) if form.affine else None
        for step in range(group * form.group // 16, (group + 1) * form.group // 16):
            for half in range(2):
                for feature in range(4):
                    pair = (codes.levels if form.nf4 else codes.integers)(step, half, feature)
                    if offsets is None:
                        pair = thread.ptx("mul.bf16x2", pair, scales[feature])
                    else:
                        pair = thread.ptx("fma.rn.bf16x2", pair, scales[feature], offsets[feature])
                    words[feature // 2, 2 * step + half, feature % 2] = pair
    return words


def _held(values: jax.Array) -> jax.Array:
    """Returns the transposed tile with its features in the order in which threads hold them."""
    return values.reshape(TILE, 4, 8, 2, 2).transpose(3, 1, 4, 2, 0).reshape(TILE, TILE)


def _column(thread: _mgpu.Thread) -> Any:
    """Returns the first of the four output features that a thread holds."""
    return thread.add(thread.mul(thread.warp, 32), thread.mul(thread.row, 4))


def _write_sums(
    thread: _mgpu.Thread, words: np.ndarray, memref: Any, *, rows: int, features: int, wide: bool, mine: Any = None
) -> None:
    """Writes a thread's sums ``[features, rows]`` to ``[rows, features]`` of memory, four features at a time."""
    size = 4 if wide else 2
    column = _column(thread)
    for chunk in range(words.shape[1]):
        for odd in (0, 1):
            row = thread.add(thread.mul(thread.pair, 2), 8 * chunk + odd)
            values = [words[f // 2, chunk, f % 2, odd] for f in range(4)]
            if not wide:
                values = [thread.ptx("cvt.rn.bf16x2.f32", values[i + 1], values[i]) for i in (0, 2)]
            offset = thread.add(thread.mul(row, features * size), thread.mul(column, size))
            inside = thread.less(row, rows)
            thread.store(memref, offset, values, inside if mine is None else thread.both(inside, mine))


def _exchanged(thread: _mgpu.Thread, words: np.ndarray, splits: int) -> tuple[Any, list[int], Any, Any]:
    """Returns, for a sum over the blocks of a cluster, which block adds up a thread's words, and where they lie there.

    Each block adds up the features of ``4 / splits`` warps.

    Returns:
      (block, byte offset of each word from the start of a sender's part, of the thread within a word, bytes of a part).
    """
    warps = 4 // splits
    owner = thread.shift_right(thread.warp, warps.bit_length() - 1)
    within = thread.add(thread.mul(thread.bits_and(thread.warp, warps - 1), 128), thread.mul(thread.lane, 4))
    return owner, [i * warps * 128 for i in range(words.size)], within, words.size * warps * 128


def _send_sums(thread: _mgpu.Thread, words: np.ndarray, memref: Any, *, splits: int) -> None:
    owner, offsets, within, part = _exchanged(thread, words, splits)
    start = thread.add(thread.mul(thread.cluster_rank(), part), within)
    for offset, word in zip(offsets, words.reshape(-1)):
        thread.store_to_peer(memref, thread.add(start, offset), word, owner)


def _finish_sums(
    thread: _mgpu.Thread, received: Any, out: Any, *, splits: int, rows: int, features: int, wide: bool
) -> None:
    words = np.empty((2, -(-rows // 8), 2, 2), dtype=object)
    owner, offsets, within, part = _exchanged(thread, words, splits)
    for index, offset in zip(np.ndindex(words.shape), offsets):
        parts = [
            thread.load_after_barrier(received, thread.add(within, sender * part + offset)) for sender in range(splits)
        ]
        words[index] = functools.reduce(thread.add_floats, parts)
    mine = thread.equal(owner, thread.cluster_rank())
    _write_sums(thread, words, out, rows=rows, features=features, wide=wide, mine=mine)


def smem_bytes(m: int, form: Format, config: Config) -> int:
    """Returns the shared memory that a block of `matmul` takes, barriers aside."""
    metas = (2 if form.affine else 1) * 2 * TILE * (TILE // form.group)
    stage = sum(form.rows) * TILE + max(metas, 1024) + 2 * TILE * m
    table = 4 * 256 * 32 if form.nf4 else 0
    return config.stages * stage + (config.warpgroups - 1 + (config.splits > 1)) * 4 * TILE * m + table


def matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    offset: jax.Array | None,
    *,
    form: Format,
    config: Config,
    out_dtype: Any,
    interpret: bool = False,
) -> jax.Array:
    """Returns ``x @ weight``.

    Args:
      x: bfloat16 ``[m, k]`` with m up to `MAX_ROWS` and k a multiple of 128.
      planes: uint8 ``[k * width / 8, n]`` each, n a multiple of 128; packed in blocks of a group along axis 0.
      scale: bfloat16 ``[k / group, n]``.
      offset: the same for affine formats, else None.
      form: the format.
      config: how to cut the work.
      out_dtype: bfloat16 or float32, of the result.
      interpret: run in the interpreter on a CPU.

    Returns:
      ``[m, n]``.
    """
    rows_in, k = x.shape
    m = -(-rows_in // 8) * 8
    if interpret or rows_in > 8:  # the copy engine fills up fewer than 8 rows itself
        x = jnp.pad(x, ((0, m - rows_in), (0, 0)))
    n = scale.shape[1]
    warpgroups, stages, splits, n_parts = config
    tiles = k // TILE // (splits * n_parts)
    wide = out_dtype == jnp.float32 or n_parts > 1
    rows = form.rows
    groups = TILE // form.group
    metas = [scale] if offset is None else [scale, offset]
    n_in = 1 + len(rows) + len(metas)
    byte_rows, word_rows = _mgpu.swizzled(1), _mgpu.swizzled(2)
    counts = [*rows, *([groups] * len(metas))]

    def body(*refs: Any) -> None:
        inputs, out_ref, rest = refs[:n_in], refs[n_in], refs[n_in + 1 :]
        stage_refs, (sums_ref, received_ref, dense_ref, table_ref, full, empty, done) = rest[:n_in], rest[n_in:]
        columns = pl.ds(lax.axis_index("tile") * TILE, TILE)
        split, group_id = lax.axis_index("split"), lax.axis_index("wg")
        first = split * tiles
        if n_parts > 1 and not interpret:
            part = lax.axis_index("part")
            first, out_ref = first + part * splits * tiles, out_ref.at[part]

        @pl.when(group_id == warpgroups)
        def _fetch() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, tiles)
            def _each(i: Any) -> None:
                slot = lax.rem(i, stages)

                @pl.when(i >= stages)
                def _wait_for_room() -> None:
                    plgpu.barrier_wait(empty.at[slot])

                x_part = inputs[0].at[pl.ds(0, m), pl.ds((first + i) * TILE, TILE)]  # rows beyond x read as zeros
                parts = [ref.at[pl.ds((first + i) * c, c), columns] for ref, c in zip(inputs[1:], counts)]
                for source, target in zip([x_part, *parts], stage_refs):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        tables = [table_ref] if form.nf4 else []

        def weight_of(slot: Any) -> Any:
            sources = [ref.at[slot] for ref in stage_refs[1:]]
            if interpret:
                values = [ref[...] for ref in sources]
                dense = decode_arrays(
                    form, tuple(values[: len(rows)]), values[len(rows)], values[-1] if form.affine else None
                )
                dense_ref[group_id] = _held(dense)
                return dense_ref.at[group_id]  # the interpreter multiplies from shared memory only
            return _mgpu.fragment(
                (TILE, TILE),
                functools.partial(_decode_words, form),
                [*sources, *tables],
                [byte_rows] * len(rows) + [()] * (len(metas) + len(tables)),
            )

        def with_sums(acc: Any) -> None:
            @pl.loop(0, (tiles - group_id + warpgroups - 1) // warpgroups)
            def _each(j: Any) -> None:
                i = group_id + j * warpgroups
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, weight_of(slot), _mgpu.transposed(stage_refs[0].at[slot]))
                plgpu.wgmma_wait(0)

                @pl.when(i + stages < tiles)
                def _leave_room() -> None:
                    plgpu.barrier_arrive(empty.at[slot])

            sums = acc[...]

            if warpgroups > 1:

                @pl.when(group_id > 0)
                def _hand_over() -> None:
                    sums_ref[group_id - 1] = sums
                    plgpu.barrier_arrive(done)

            @pl.when(group_id == 0)
            def _gather() -> None:
                total = sums
                if warpgroups > 1:
                    plgpu.barrier_wait(done)
                    for other in range(warpgroups - 1):
                        total = total + plgpu.load(sums_ref.at[other], layout=_mgpu.WGMMA, optimized=False)
                if interpret:
                    natural = total.reshape(2, 4, 2, 8, m).transpose(4, 1, 3, 0, 2).reshape(m, TILE)
                    out_ref[split, :, columns] = natural
                elif splits > 1:
                    _mgpu.write_fragment(total, [received_ref], functools.partial(_send_sums, splits=splits))
                else:
                    write = functools.partial(_write_sums, rows=rows_in, features=n, wide=wide)
                    _mgpu.write_fragment(total, [out_ref.at[:, columns]], write)

        @pl.when(group_id < warpgroups)
        def _multiply() -> None:
            if warpgroups > 1:
                plgpu.set_max_registers(_REGISTERS[warpgroups], action="increase")
            if form.nf4 and not interpret:  # every warpgroup writes the same words and waits for its own threads only
                _mgpu.each_thread(_write_table, tables)
            pl.run_scoped(with_sums, plgpu.ACC((TILE, m), jnp.float32))

        if splits > 1 and not interpret:
            _mgpu.each_thread(lambda thread: thread.cluster_barrier(), [])

            @pl.when(group_id == 0)
            def _finish() -> None:
                finish = functools.partial(_finish_sums, splits=splits, rows=rows_in, features=n, wide=wide)
                _mgpu.each_thread(finish, [received_ref, out_ref.at[:, columns]])

    blocks: dict[str, Any] = {
        "grid": (n // TILE, n_parts),
        "grid_names": ("tile", "part"),
        "cluster": (splits,),
        "cluster_names": ("split",),
    }
    sums_shape: tuple[int, ...] = (rows_in, n)
    sums_dtype = jnp.float32 if wide else out_dtype
    if n_parts > 1:
        sums_shape = (n_parts, *sums_shape)
    if interpret:
        blocks = {"grid": (n // TILE, splits * n_parts), "grid_names": ("tile", "split")}
        sums_shape, sums_dtype = (splits * n_parts, m, n), jnp.float32
    small = (1, 8, 8)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(sums_shape, sums_dtype),
        **blocks,
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((stages, m, TILE), jnp.bfloat16, transforms=word_rows),
            *(plgpu.SMEM((stages, count, TILE), jnp.uint8, transforms=byte_rows) for count in rows),
            *(plgpu.SMEM((stages, groups, TILE), jnp.bfloat16) for _ in metas),
            plgpu.SMEM((warpgroups - 1, TILE, m) if warpgroups > 1 else small, jnp.float32),
            plgpu.SMEM((1, TILE, m) if splits > 1 else small, jnp.float32),
            plgpu.SMEM((warpgroups, TILE, TILE) if interpret else small, jnp.bfloat16),
            plgpu.SMEM((256, 32) if form.nf4 else (8, 8), jnp.uint32),
            plgpu.Barrier(num_arrivals=n_in, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=max(1, warpgroups - 1)),
        ),
        compiler_params=_mgpu.explicit_layouts(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x, *planes, *metas)
    return jnp.sum(out, axis=0)[:rows_in].astype(out_dtype) if out.ndim == 3 else out
