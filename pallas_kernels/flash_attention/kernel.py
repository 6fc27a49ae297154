"""Hopper kernels for block-sparse attention: the forward pass, and the attention mass of each key.

Forward (after FlashAttention-3, 2024): blocks take tiles of 128 query rows in turn, long ones first. One warpgroup
fetches keys and values by the tile's list; two multiply, 64 rows each. Such a warpgroup starts ``S = Q K^T`` of a step
and then ``P V`` of the step before, and takes the exponentials of S while the second product runs; a pair of barriers
makes the two warpgroups take turns at S, so that one computes while the tensor cores work for the other. Both have the
same list, hence the same number of steps.

    registers a thread, of 232:   S or its exponentials   P as operand   accumulator   together
      D = Dv = 64,  128 keys             64                   32             32           128
      D = Dv = 128, 128 keys             64                   32             64           160
      D = 192, Dv = 192, 64 keys         32                   16             96           144
      D = Dv = 256, 64 keys              32                   16            128           176
    shared memory of a block, KiB:     Q     K and V     staged output   together, of 227
      D = Dv = 64,  4 stages           16      128             32              176
      D = Dv = 128, 2 stages           32      128             32              192
      D = Dv = 192, 3 stages           48      144             32              224
      D = Dv = 256, 2 stages           64      128             32              224

Floor: ``2 (D + Dv)`` FLOPs and one exponential for every visited element and query head; at D = 128 the exponentials
take half the time of the products, at D = 64 as long. Widths such as 96 are not padded: their tiles are 64 bytes wide.
On an H100 with D = 128, causal at S 8192 runs at 630 TFLOP/s of what is visited, window 1024 at S 16384 at 540.

Facts that a mask reads about keys (documents, say) travel with the keys; those about queries are loaded once a tile.
Where lists are not those of positions, heads take turns, so that their keys stay in the L2 cache: random blocks of all
heads at once ran at the speed of HBM.

`column_sums` keeps 128 keys of a key head in place, 64 a warpgroup, and goes over the queries of the list of every
head of the group: ``2 D`` FLOPs and an exponential for every visited element. Keys are the rows of its tiles, so that a
key's sum stays within four threads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels._bits import seed_words
from pallas_kernels.flash_attention.lists import BlockList, Elements, heads_together
from pallas_kernels.flash_attention.scores import Reduce, ScoreMod, no_kernel_for, stays

BLOCK = 128
"""Rows of the tile that a block holds: queries of `forward`, keys of `column_sums`."""
SHARED_BYTES = 232448 - 2048
LOG2E = math.log2(math.e)
_HALF = BLOCK // 2
_ROWS = _mgpu.WGMMA.reduce(1)
_COLUMNS = _mgpu.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      step: keys (of `column_sums`: queries) that a step multiplies with; divides the lists' blocks, a multiple of 64.
      stages: steps whose operands are in shared memory, at least 2.
      turns: whether a warpgroup starts a step when the other one's scores are there.
    """

    step: int
    stages: int
    turns: bool = True


def _row_bytes(*widths: int) -> int:
    """Returns how wide the tiles of shared memory are for arrays of 16-bit rows."""
    return 128 if all(width % 64 == 0 for width in widths) else 64


def smem_bytes(config: Config, head_dim: int, value_dim: int = 0, words: int = 0) -> int:
    """Returns the shared memory of a block, barriers aside; of `column_sums` where there are no values."""
    staged = 4 * _HALF * _row_bytes(value_dim) if value_dim else 0
    return 2 * BLOCK * head_dim + config.stages * config.step * (2 * (head_dim + value_dim) + 4 * words) + staged


def heuristic(head_dim: int, value_dim: int = 0, block: int = 128, words: int = 0) -> Config:
    """Returns how to cut the work.

    Args:
      head_dim: D.
      value_dim: Dv; 0 for `column_sums`.
      block: keys per block of the lists (of `column_sums`: queries).
      words: 32-bit numbers that are loaded for each of them.
    """
    step = 128 if block % 128 == 0 else 64
    if value_dim > 128 or smem_bytes(Config(step, 2), head_dim, value_dim, words) > SHARED_BYTES:
        step = 64
    stages, most = 2, 4 if value_dim else 2  # `column_sums` gains nothing by more
    while stages < most and smem_bytes(Config(step, stages + 1), head_dim, value_dim, words) <= SHARED_BYTES:
        stages += 1
    return Config(step, stages)


def unsupported(
    q: Any,
    k: Any,
    v: Any = None,
    *,
    blocks: tuple[int, int],
    pages: Any = None,
    score_mod: ScoreMod | None = None,
    keys_have_lists: bool = False,
) -> str | None:
    """Returns why the Mosaic GPU kernels cannot take the operands, or None if they can.

    Args:
      q: ``[B, S, H, D]``, anything with a shape and a dtype.
      k: ``[B, T, Hk, D]``, or pages ``[n, page, Hk, D]``.
      v: ``[B, T, Hk, Dv]`` or pages; None for `column_sums`.
      blocks: queries and keys per block of the lists.
      pages: page numbers ``[B, T / page]`` or None.
      score_mod: what is applied to scores, or None.
      keys_have_lists: whether the lists are those of key blocks, as for `column_sums`.
    """
    arrays = [q, k] if v is None else [q, k, v]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or any(x.dtype != q.dtype for x in arrays):
        return f"arrays of {', '.join(str(x.dtype) for x in arrays)}; the kernels take bfloat16 or float16 alone"
    widths = [x.shape[-1] for x in arrays[1:]]
    if any(width % 32 or not 0 < width <= 256 for width in widths):
        return f"heads of {' and '.join(map(str, widths))}; the kernels take multiples of 32 up to 256"
    fixed, moving = blocks[::-1] if keys_have_lists else blocks
    if fixed != BLOCK or moving % 64:
        sides = ("keys", "queries") if keys_have_lists else ("queries", "keys")
        return f"blocks of {fixed} {sides[0]} and {moving} {sides[1]}; the kernels take {BLOCK} and multiples of 64"
    if pages is not None and k.shape[1] != blocks[1]:
        return f"pages of {k.shape[1]} keys; the kernels take pages of a block's {blocks[1]}"
    if score_mod is not None and (reason := no_kernel_for(score_mod)):
        return f"a score_mod that {reason}; the kernels take simple operations on its arguments alone"
    return None


def tile_order(total: jax.Array, batch: int, heads: int, together: int) -> jax.Array:
    """Returns which tile comes when, as numbers ``(batch * heads + head) * N + place in the list's side``.

    So many pairs of batch and head are gone through at a time, so that what they read stays in the L2 cache. Among
    them tiles come by length, by turns falling and rising, so that neighbours are alike; the last ones fall.

    Args:
      total: int32 ``[B|1, H|Hk|1, N]``, how long the lists are.
      batch, heads: B and H (of `column_sums`: Hk) of the tiles.
      together: pairs that are gone through at a time; divides their number.

    Returns:
      int32 ``[B H N]``.
    """
    n, chunks = total.shape[2], batch * heads // together
    if total.shape[:2] == (1, 1):
        rows = jnp.argsort(-total.reshape(n), stable=True)
        inside = jnp.broadcast_to((rows[:, None] + n * jnp.arange(together)).reshape(1, -1), (chunks, together * n))
    else:
        each = jnp.repeat(total, heads // total.shape[1], 1)
        lengths = jnp.broadcast_to(each, (batch, heads, n)).reshape(chunks, together * n)
        inside = jnp.argsort(-lengths, axis=1, stable=True)
    chunk = jnp.arange(chunks)[:, None]
    turned = jnp.where((chunks - 1 - chunk) % 2 == 0, inside, inside[:, ::-1])
    return (turned + chunk * together * n).reshape(-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Which tile a block computes when: rounds over `tile_order`, every other one backwards.

    The longest sum of a block's tiles is then within 2 % of the mean for causal masks, windows, documents and random
    blocks at S = 8k to 32k.

    Attributes:
      heads: H (of `column_sums`: Hk) of the tiles.
      places: N of the lists.
      tiles: how many there are.
      groups: blocks that run at a time.
    """

    heads: int
    places: int
    tiles: int
    groups: int

    def count(self, group: Any) -> Any:
        """Returns how many tiles a block computes."""
        rounds, left = divmod(self.tiles, self.groups)
        place = group if rounds % 2 == 0 else self.groups - 1 - group
        return rounds + jnp.where(place < left, 1, 0)

    def tile(self, i: Any, group: Any, order: Any) -> tuple[Any, Any, Any]:
        """Returns batch, head and place in the list's side of a block's i-th tile."""
        tile = order[i * self.groups + jnp.where(lax.rem(i, 2) == 0, group, self.groups - 1 - group)]
        pair = lax.div(tile, self.places)
        return lax.div(pair, self.heads), lax.rem(pair, self.heads), lax.rem(tile, self.places)


def _pad(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis % x.ndim] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value) if size > x.shape[axis] else x


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _of_head(shape: tuple[int, ...], b: Any, h: Any, heads: int) -> tuple[Any, Any]:
    """Returns where the facts ``[B|1, H|Hk|1, ...]`` of batch b and query head h are."""
    return b if shape[0] > 1 else 0, lax.div(h, heads // shape[1]) if shape[1] > 1 else 0


def _along_rows(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, (0,))


def _along_columns(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, (1,))


def _filled(value: Any, shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What is done with a tile of products; its rows are queries, or keys with ``keys_are_rows``."""

    scale: float
    softcap: float | None
    score_mod: ScoreMod | None
    elements: Elements
    heads: int
    queries: int
    keys: int
    block: tuple[int, int]
    keys_are_rows: bool

    def positions(self, shape: tuple[int, ...], q0: Any, k0: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of the queries and the keys of a tile."""
        axes = (1, 0) if self.keys_are_rows else (0, 1)
        q, k = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_mgpu.WGMMA) for axis in axes)
        return q + q0, k + k0

    def natural(self, s: jax.Array, b: Any, h: Any, q0: Any, k0: Any) -> tuple[jax.Array, float]:
        """Returns scores before the mask, and the factor that makes them exponents of 2."""
        if self.softcap is None and self.score_mod is None and self.scale > 0:
            return s, self.scale * LOG2E
        s = s * self.scale
        if self.softcap is not None:
            # tanh(u) = 1 - 2 / (1 + exp(2 u)): the processor's own tanh has 11 bits.
            s = self.softcap - 2 * self.softcap / (1.0 + jnp.exp2(s * (2 * LOG2E / self.softcap)))
        if self.score_mod is not None:
            q, k = self.positions(s.shape, q0, k0)
            # Positions that there are not might give NaN, which no mask takes back.
            s = self.score_mod(s, b, h, jnp.minimum(q, self.queries - 1), jnp.minimum(k, self.keys - 1))
        return s, LOG2E

    def place(self, ref: Any, b: Any, h: Any, start: Any, size: int) -> tuple[Any, ...]:
        """Returns where facts ``[B|1, H|Hk|1, ...]`` are that batch b and query head h read."""
        return (*_of_head(ref.shape, b, h, self.heads), pl.ds(start, size))

    def fixed(self, refs: Any, b: Any, h: Any, start: Any) -> list[jax.Array]:
        """Loads facts about the 64 rows of a tile, which stay the same from step to step."""
        return [plgpu.load(ref.at[self.place(ref, b, h, start, _HALF)], layout=_ROWS, optimized=False) for ref in refs]

    def moving(self, refs: Any, slot: Any) -> list[jax.Array]:
        """Loads facts about the columns of a step's tile from shared memory."""
        return [plgpu.load(ref.at[slot], layout=_COLUMNS) for ref in refs]

    def words(self, shape: tuple[int, int], bits_ref: Any, pointer: Any, q0: Any, k0: Any) -> Any:
        """Loads a tile's words of its bit table, one vector along the keys for 32 queries."""
        bq, bk = self.block
        queries, keys = shape[::-1] if self.keys_are_rows else shape
        first, places = lax.div(lax.rem(q0, bq), 32), pl.ds(lax.rem(k0, bk), keys)
        layout = _ROWS if self.keys_are_rows else _COLUMNS
        return [
            plgpu.load(bits_ref.at[pointer, first + i, places], layout=layout, optimized=False)
            for i in range(queries // 32)
        ]

    def masked(self, s: jax.Array, loaded: Any, q0: Any, k0: Any) -> jax.Array:
        """Returns the scores of a partial block's tile, -inf where the mask is false or there is no key.

        ``loaded`` are its `facts`, its `words` and its flags.
        """
        shape = s.shape
        facts, words, flags = loaded
        along_q, along_k = (_along_columns, _along_rows) if self.keys_are_rows else (_along_rows, _along_columns)
        q, k = self.positions(shape, q0, k0)
        truths = []
        if self.elements.bits is not None:
            inside = lax.rem(q, self.block[0])
            word = along_k(words[0], shape)
            first = lax.rem(q0, self.block[0])
            for i, vector in enumerate(words[1:]):
                word = jnp.where(inside < first + 32 * (i + 1), word, along_k(vector, shape))
            truths.append(lax.shift_right_logical(word, inside & 31) & 1 != 0)
        elif self.elements.test is not None:
            rows = tuple(along_q(x, shape) for x in facts[0])
            columns = tuple(along_k(x, shape) for x in facts[1])
            truths.append(self.elements.test(q, k, rows, columns, flags))
        if self.keys % self.block[1]:
            truths.append(k < self.keys)
        if not truths:
            return s
        return jnp.where(functools.reduce(lambda a, b: a & b, truths), s, -jnp.inf)


def _online(
    s: jax.Array, factor: float, peak: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes scores into a running softmax in powers of 2.

    Returns:
      The new largest exponent and sum of a row, the factor of what was summed before, and the exponentials.
    """
    new = jnp.maximum(peak, jnp.max(s, axis=1) * factor)
    base = jnp.where(new == -jnp.inf, 0.0, new)
    shrink = jnp.exp2(peak - base)
    p = jnp.exp2(s * factor - _along_rows(base, s.shape))
    return new, total * shrink + jnp.sum(p, axis=1), shrink, p


class _Lists:
    """Reads lists in GMEM: the refs of index, full, total and, where there are some, flags and pointers."""

    def __init__(self, refs: list[Any], lists: BlockList, heads: int) -> None:
        self.shape, self.heads = lists.full.shape, heads
        names = ["index", "full", "total", *(name for name in ("flags", "pointer") if getattr(lists, name) is not None)]
        self.refs = dict(zip(names, refs, strict=True))

    def counts(self, b: Any, h: Any, n: Any) -> tuple[Any, Any]:
        place = (*_of_head(self.shape, b, h, self.heads), n)
        return self.refs["full"][place], self.refs["total"][place]

    def entry(self, name: str, b: Any, h: Any, n: Any, j: Any) -> Any:
        """Returns a number of the list's j-th entry, or None where lists have none such."""
        return self.refs[name][(*_of_head(self.shape, b, h, self.heads), n, j)] if name in self.refs else None


def _list_arrays(lists: BlockList) -> list[jax.Array]:
    return [jnp.asarray(x) for x in lists if x is not None]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    by_query: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    sink: jax.Array | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    pages: jax.Array | None = None,
    config: Config | None = None,
    multiprocessors: int = 132,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns block-sparse attention and the logarithm of each row's sum of exponentials.

    Args:
      q: bfloat16 or float16 ``[B, S, H, D]``, D a multiple of 32 up to 256.
      k: the same dtype ``[B, T, Hk, D]``, or with ``pages`` ``[n, page, Hk, D]``.
      v: the same dtype ``[B, T, Hk, Dv]`` or pages.
      by_query: the lists of the query blocks.
      elements: the mask of partial blocks.
      blocks: (128, keys per block, a multiple of 64).
      scale: of the scores.
      softcap: cap of the scaled scores or None.
      score_mod: ``(s, b, h, q, k) -> s`` of elementwise operations, or None.
      sink: float32 ``[H]``, one more logit for each row, or None.
      dropout: probability of dropping an element.
      seed: of dropout, as `_bits.seed_words` takes it.
      pages: int32 ``[B, T / page]``, the page of each block of keys, or None.
      config: how to cut the work; None decides by the sizes.
      multiprocessors: of the device.
      interpret: run in the interpreter on a CPU.

    Returns:
      ``[B, S, H, Dv]`` in the dtype of q, zeros in rows without keys, and float32 ``[B, S, H]``, -inf (with a sink,
      the sink) in such rows.
    """
    batch, queries, heads, head_dim = q.shape
    key_heads, value_dim = k.shape[2], v.shape[3]
    keys = k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    block_keys = blocks[1]
    config = config or heuristic(head_dim, value_dim, block_keys, len(elements.columns))
    step_keys, stages, parts = config.step, config.stages, block_keys // config.step
    dtype = q.dtype
    lists_shape = by_query.full.shape
    rounded = lists_shape[2] * BLOCK
    tiles = batch * heads * lists_shape[2]
    work = _Work(heads, lists_shape[2], tiles, min(multiprocessors, tiles))
    scores = _Scores(scale, softcap, score_mod, elements, heads, queries, keys, blocks, keys_are_rows=False)

    # The copy engine takes whole tiles of 8 rows and leaves out what lies beyond an array; the interpreter does not.
    q = _pad(q, 1, rounded if interpret else _up(queries, 8))
    if pages is None:
        k, v = (_pad(x, 1, _up(keys, block_keys if interpret else 8)) for x in (k, v))
    rows = [_pad(jnp.asarray(x), 2, rounded) for x in elements.rows]
    columns = [_pad(jnp.asarray(x), 2, _up(keys, block_keys)) for x in elements.columns]
    bits = [] if elements.bits is None else [lax.bitcast_convert_type(jnp.asarray(elements.bits), jnp.int32)]
    sharing = heads // key_heads
    together = heads_together(by_query, elements, batch * heads, sharing, 2 * keys * (head_dim + value_dim))
    order = tile_order(jnp.asarray(by_query.total), batch, heads, together)
    sinks = [] if sink is None else [sink.astype(jnp.float32)]
    words = list(seed_words(seed)) if dropout else []
    seeds = [jnp.stack(words)] if words else []
    list_arrays = _list_arrays(by_query)
    operands = [q, k, v, order, *list_arrays, *rows, *columns, *bits, *sinks, *seeds]
    operands += [] if pages is None else [pages.astype(jnp.int32)]
    chunk = 64 if value_dim % 64 == 0 else 32

    def body(*refs: Any) -> None:
        remaining = iter(refs)
        q_ref, k_ref, v_ref, order_ref = (next(remaining) for _ in range(4))
        lists = _Lists([next(remaining) for _ in list_arrays], by_query, heads)
        row_refs, column_refs = ([next(remaining) for _ in facts] for facts in (rows, columns))
        bits_ref: Any = next(remaining) if bits else None
        sink_ref: Any = next(remaining) if sinks else None
        seed_ref: Any = next(remaining) if seeds else None
        pages_ref: Any = next(remaining) if pages is not None else None
        out_ref, lse_ref, q_smem, k_smem, v_smem, staging, facts_smem, *barriers = remaining
        q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        mine = work.count(group)

        @pl.when(worker == 2)
        def _fetch() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def tile(i: Any, start: Any) -> Any:
                b, h, n = work.tile(i, group, order_ref)
                key_head = lax.div(h, heads // key_heads)
                _, total = lists.counts(b, h, n)
                count = total * parts

                @pl.when(i > 0)
                def _wait_for_q() -> None:
                    plgpu.barrier_wait(q_empty)

                for half in range(2):
                    source = q_ref.at[b, pl.ds(n * BLOCK + half * _HALF, _HALF), h]
                    plgpu.copy_gmem_to_smem(source, q_smem.at[half], q_full)

                @pl.loop(0, count)
                def _step(j: Any) -> None:
                    slot, old = lax.rem(start + j, stages), start + j >= stages
                    block = lists.entry("index", b, h, n, lax.div(j, parts))
                    first_key = block * block_keys + lax.rem(j, parts) * step_keys
                    if pages_ref is None:
                        source = (b, pl.ds(first_key, step_keys), key_head)
                    else:
                        source = (pages_ref[b, block], pl.ds(lax.rem(j, parts) * step_keys, step_keys), key_head)
                    for ref, smem, full, empty in (
                        (k_ref, k_smem, k_full, k_empty),
                        (v_ref, v_smem, v_full, v_empty),
                    ):

                        @pl.when(old)
                        def _wait_for_room(empty: Any = empty) -> None:
                            plgpu.barrier_wait(empty.at[slot])

                        plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot], full.at[slot])
                        if ref is k_ref:
                            for known, held in zip(column_refs, facts_smem, strict=True):
                                theirs = known.at[scores.place(known, b, h, first_key, step_keys)]
                                plgpu.copy_gmem_to_smem(theirs, held.at[slot], full.at[slot])

                return start + count

            steps = lax.fori_loop(0, mine, tile, jnp.int32(0))

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(step: Any) -> None:
                for empty in (k_empty, v_empty):
                    plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

            plgpu.barrier_wait(q_empty)

        def my_turn() -> None:
            if config.turns:
                plgpu.barrier_wait(turn.at[worker])

        def pass_turn() -> None:
            if config.turns:
                plgpu.barrier_arrive(turn.at[1 - worker])

        def write(out: jax.Array, b: Any, h: Any, row: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for place in range(value_dim // chunk):
                if place > 1:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                staged = staging.at[worker, place % 2]
                staged[...] = out[:, place * chunk : (place + 1) * chunk].astype(dtype)
                plgpu.commit_smem()
                columns = pl.ds(place * chunk, chunk)
                plgpu.copy_smem_to_gmem(staged, out_ref.at[b, pl.ds(row, _HALF), h, columns])

        def compute(i: Any, start: Any) -> Any:
            b, h, n = work.tile(i, group, order_ref)
            full, total = lists.counts(b, h, n)
            full, count = full * parts, total * parts
            row = n * BLOCK + worker * _HALF
            shape = (_HALF, step_keys)

            def slot_of(j: Any) -> Any:
                return lax.rem(start + j, stages)

            row_facts = scores.fixed(row_refs, b, h, row)

            def prepare(j: Any) -> Any:
                """Loads what a partial step's mask needs, to be there when the products are."""
                place = lax.div(j, parts)
                k0 = lists.entry("index", b, h, n, place) * block_keys + lax.rem(j, parts) * step_keys
                pointer = lists.entry("pointer", b, h, n, place)
                words = None if bits_ref is None else scores.words(shape, bits_ref, pointer, row, k0)
                return k0, (words, lists.entry("flags", b, h, n, place))

            def take(slot: Any, needed: bool) -> list[jax.Array]:
                """Loads facts about the keys of a step whose product is complete, and gives its keys back."""
                columns = scores.moving(facts_smem, slot) if needed else []
                if interpret:
                    plgpu.commit_smem()  # on a device every thread arrives for itself, after its reads
                plgpu.barrier_arrive(k_empty.at[slot])
                return columns

            def soften(s: jax.Array, partial: bool | Any, prepared: Any, columns: Any, peak: Any, total: Any) -> Any:
                k0, known = prepared
                loaded = ((row_facts, columns), *known)
                s, factor = scores.natural(s, b, h, row, k0)
                if partial is True:
                    s = scores.masked(s, loaded, row, k0)
                elif partial is not False:
                    s = lax.cond(partial, lambda s: scores.masked(s, loaded, row, k0), lambda s: s, s)
                return _online(s, factor, peak, total)

            def dropped(p: jax.Array, k0: Any) -> jax.Array:
                if not dropout:
                    return p
                q_places, k_places = scores.positions(shape, row, k0)
                seed_pair = (seed_ref[0], seed_ref[1])
                kept = stays(seed_pair, dropout, heads, keys, b, h, q_places, k_places)
                return jnp.where(kept, p, 0.0)

            def only_index(j: Any) -> Any:
                if score_mod is None and not dropout:
                    return jnp.int32(0), (None, None)
                place = lax.div(j, parts)
                return lists.entry("index", b, h, n, place) * block_keys + lax.rem(j, parts) * step_keys, (None, None)

            def first(_: Any, carry: Any) -> Any:
                _, peak, sums = carry
                prepared = prepare(0)
                slot = slot_of(0)

                def multiply(acc: Any) -> jax.Array:
                    my_turn()
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.wgmma(acc, q_smem.at[worker], _mgpu.transposed(k_smem.at[slot]))
                    return acc[...]

                s = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32)))
                pass_turn()
                columns = take(slot, True)
                peak, sums, _, p = soften(s, full == 0, prepared, columns, peak, sums)
                return dropped(p, prepared[0]).astype(dtype), peak, sums

            def next_step(j: Any, carry: Any, partial: bool) -> Any:
                out, p, peak, sums = carry
                prepared = prepare(j) if partial else only_index(j)
                slot, before = slot_of(j), slot_of(j - 1)

                def start_scores(acc: Any) -> None:
                    my_turn()
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.wgmma(acc, q_smem.at[worker], _mgpu.transposed(k_smem.at[slot]))

                def meanwhile(s: jax.Array) -> list[jax.Array]:
                    pass_turn()
                    columns = take(slot, partial)
                    new = soften(s, partial, prepared, columns, peak, sums)
                    return list(new if interpret else lax.optimization_barrier(new))

                if interpret:

                    def multiply(acc: Any) -> jax.Array:
                        start_scores(acc)
                        return acc[...]

                    s = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_wait(v_full.at[before])
                    out = out + jnp.dot(p, v_smem[before], preferred_element_type=jnp.float32)
                    plgpu.commit_smem()  # an ordinary read, unlike a product's, is to be over before the next copy
                    new_peak, new_sums, shrink, exponentials = meanwhile(s)
                else:

                    def start_both(scores_acc: Any, out_acc: Any) -> None:
                        start_scores(scores_acc)
                        plgpu.barrier_wait(v_full.at[before])
                        plgpu.wgmma(out_acc, p, v_smem.at[before])

                    like = [peak, sums, peak, _filled(0.0, shape, _mgpu.WGMMA)]
                    out, (new_peak, new_sums, shrink, exponentials) = _mgpu.two_products(
                        out, shape, start_both, meanwhile, like
                    )
                    # The product reads p from registers: nothing becomes the next p before it is complete.
                    exponentials = lax.optimization_barrier(exponentials)
                plgpu.barrier_arrive(v_empty.at[before])
                out = out * _along_rows(shrink, out.shape)
                return out, dropped(exponentials, prepared[0]).astype(dtype), new_peak, new_sums

            def last(_: Any, carry: Any) -> Any:
                (out, p) = carry
                slot = slot_of(count - 1)
                plgpu.barrier_wait(v_full.at[slot])
                if interpret:
                    out = out + jnp.dot(p, v_smem[slot], preferred_element_type=jnp.float32)
                    plgpu.commit_smem()
                else:

                    def multiply(acc: Any) -> None:
                        plgpu.wgmma(acc, p, v_smem.at[slot])

                    out = pl.run_state(multiply)(plgpu.ACC.init(out))
                plgpu.barrier_arrive(v_empty.at[slot])
                return out, p

            some = jnp.minimum(count, 1)
            peak = _filled(-jnp.inf if sink_ref is None else sink_ref[h] * LOG2E, (_HALF,), _ROWS)
            sums = _filled(0.0 if sink_ref is None else 1.0, (_HALF,), _ROWS)
            out = _filled(0.0, (_HALF, value_dim), _mgpu.WGMMA)
            p = _filled(0.0, shape, _mgpu.WGMMA).astype(dtype)
            plgpu.barrier_wait(q_full)
            p, peak, sums = lax.fori_loop(0, some, first, (p, peak, sums))
            carry = (out, p, peak, sums)
            whole = jnp.maximum(full, 1)
            carry = lax.fori_loop(1, whole, functools.partial(next_step, partial=False), carry)
            carry = lax.fori_loop(whole, jnp.maximum(count, 1), functools.partial(next_step, partial=True), carry)
            out, p, peak, sums = carry
            plgpu.barrier_arrive(q_empty)
            out, _ = lax.fori_loop(0, some, last, (out, p))
            over = jnp.where(sums > 0.0, (1 / (1 - dropout)) / sums, 0.0)
            write(out * _along_rows(over, out.shape), b, h, row)
            lse_ref.at[b, h, pl.ds(row, _HALF)][...] = (peak + jnp.log2(sums)) * (1 / LOG2E)
            return start + count

        @pl.when(worker < 2)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            if config.turns:

                @pl.when(worker == 1)
                def _let_the_other_begin() -> None:
                    plgpu.barrier_arrive(turn.at[0])

            lax.fori_loop(0, mine, compute, jnp.int32(0))
            if config.turns:

                @pl.when(worker == 0)
                def _take_the_last() -> None:
                    plgpu.barrier_wait(turn.at[0])

            plgpu.wait_smem_to_gmem(0)

    keyed = _mgpu.swizzled(2, _row_bytes(head_dim))
    valued = _mgpu.swizzled(2, _row_bytes(value_dim))
    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, q.shape[1], heads, value_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, rounded), jnp.float32),
        ),
        grid=(work.groups,),
        grid_names=("group",),
        num_threads=3,
        thread_name="worker",
        scratch_types=(
            plgpu.SMEM((2, _HALF, head_dim), dtype, transforms=keyed),
            plgpu.SMEM((stages, step_keys, head_dim), dtype, transforms=keyed),
            plgpu.SMEM((stages, step_keys, value_dim), dtype, transforms=valued),
            plgpu.SMEM((2, 2, _HALF, chunk), dtype, transforms=valued),
            [plgpu.SMEM((stages, step_keys), jnp.int32) for _ in columns],
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1 + len(columns), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2),
        ),
        compiler_params=_mgpu.explicit_layouts(approx_math=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands)
    return out[:, :queries], jnp.swapaxes(lse, 1, 2)[:, :queries]


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    by_key: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    pages: jax.Array | None = None,
    reduce: Reduce = "sum",
    config: Config | None = None,
    multiprocessors: int = 132,
    interpret: bool = False,
) -> jax.Array:
    """Returns what every key gets of the attention of all rows, of all query heads of its group.

    Args:
      q, k, elements, scale, softcap, score_mod, pages, multiprocessors, interpret: as in `forward`.
      lse: float32 ``[B, S, H]`` that `forward` returned.
      by_key: the lists of the key blocks.
      blocks: (queries per block, a multiple of 64; 128).
      reduce: "sum" or "max" of the weights (0 for a key of no row), or "max_logit" of the scores (-inf).
      config: how to cut the work; None decides by the sizes.

    Returns:
      float32 ``[B, Hk, T]``.
    """
    batch, queries, heads, head_dim = q.shape
    key_heads = k.shape[2]
    keys = k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    block_queries, group_size = blocks[0], heads // key_heads
    config = config or heuristic(head_dim, block=block_queries, words=1 + len(elements.rows))
    step_rows, stages, parts = config.step, config.stages, block_queries // config.step
    lists_shape = by_key.full.shape
    rounded = lists_shape[2] * BLOCK
    # A tile is of a key head: the lists of its query heads, where they differ, are gone over one after another.
    shared = (lists_shape[0], min(lists_shape[1], key_heads), lists_shape[2])
    tiles = batch * key_heads * shared[2]
    work = _Work(key_heads, shared[2], tiles, min(multiprocessors, tiles))
    scores = _Scores(scale, softcap, score_mod, elements, heads, queries, keys, blocks, keys_are_rows=True)
    lowest = -jnp.inf if reduce == "max_logit" else 0.0

    padded_rows = _up(queries, block_queries)
    q = _pad(q, 1, padded_rows if interpret else _up(queries, 8))
    if pages is None:
        k = _pad(k, 1, rounded if interpret else _up(keys, 8))
    # Rows that have no keys, or are beyond S, have weights of exp(-inf).
    exponent = jnp.swapaxes(jnp.where(lse == -jnp.inf, jnp.inf, lse), 1, 2) * LOG2E
    exponent = _pad(exponent, 2, padded_rows, jnp.inf)
    rows = [_pad(jnp.asarray(x), 2, padded_rows) for x in elements.rows]
    columns = [_pad(jnp.asarray(x), 2, rounded) for x in elements.columns]
    bits = [] if elements.bits is None else [lax.bitcast_convert_type(jnp.asarray(elements.bits), jnp.int32)]
    total = jnp.asarray(by_key.total).reshape(*shared[:2], -1, shared[2]).sum(2)
    together = heads_together(by_key, elements, batch * key_heads, 1, 2 * queries * group_size * head_dim)
    order = tile_order(total, batch, key_heads, together)
    list_arrays = _list_arrays(by_key)
    operands = [q, k, exponent, order, *list_arrays, *rows, *columns, *bits]
    operands += [] if pages is None else [pages.astype(jnp.int32)]

    def body(*refs: Any) -> None:
        remaining = iter(refs)
        q_ref, k_ref, exponent_ref, order_ref = (next(remaining) for _ in range(4))
        lists = _Lists([next(remaining) for _ in list_arrays], by_key, heads)
        row_refs, column_refs = ([next(remaining) for _ in facts] for facts in (rows, columns))
        bits_ref: Any = next(remaining) if bits else None
        pages_ref: Any = next(remaining) if pages is not None else None
        out_ref, k_smem, q_smem, exponents_smem, facts_smem, k_full, k_empty, q_full, q_empty, turn = remaining
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        mine = work.count(group)

        @pl.when(worker == 2)
        def _fetch() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def tile(i: Any, start: Any) -> Any:
                b, key_head, n = work.tile(i, group, order_ref)

                @pl.when(i > 0)
                def _wait_for_keys() -> None:
                    plgpu.barrier_wait(k_empty)

                for half in range(2):
                    if pages_ref is None:
                        source = (b, pl.ds(n * BLOCK + half * _HALF, _HALF), key_head)
                    else:
                        source = (pages_ref[b, n], pl.ds(half * _HALF, _HALF), key_head)
                    plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[half], k_full)

                def head(u: Any, start: Any) -> Any:
                    h = key_head * group_size + u
                    _, total = lists.counts(b, h, n)

                    @pl.loop(0, total * parts)
                    def _step(j: Any) -> None:
                        slot, old = lax.rem(start + j, stages), start + j >= stages
                        block = lists.entry("index", b, h, n, lax.div(j, parts))
                        row = block * block_queries + lax.rem(j, parts) * step_rows

                        @pl.when(old)
                        def _wait_for_room() -> None:
                            plgpu.barrier_wait(q_empty.at[slot])

                        theirs = pl.ds(row, step_rows)
                        plgpu.copy_gmem_to_smem(q_ref.at[b, theirs, h], q_smem.at[slot], q_full.at[slot])
                        plgpu.copy_gmem_to_smem(exponent_ref.at[b, h, theirs], exponents_smem.at[slot], q_full.at[slot])
                        for known, held in zip(row_refs, facts_smem, strict=True):
                            place = scores.place(known, b, h, row, step_rows)
                            plgpu.copy_gmem_to_smem(known.at[place], held.at[slot], q_full.at[slot])

                    return start + total * parts

                return lax.fori_loop(0, group_size, head, start)

            steps = lax.fori_loop(0, mine, tile, jnp.int32(0))

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(step: Any) -> None:
                plgpu.barrier_wait(q_empty.at[lax.rem(step, stages)])

            plgpu.barrier_wait(k_empty)

        def compute(i: Any, start: Any) -> Any:
            b, key_head, n = work.tile(i, group, order_ref)
            k0 = n * BLOCK + worker * _HALF
            shape = (_HALF, step_rows)

            def step(j: Any, found: jax.Array, h: Any, column_facts: Any, first: Any, partial: bool) -> jax.Array:
                slot, place = lax.rem(first + j, stages), lax.div(j, parts)
                row = lists.entry("index", b, h, n, place) * block_queries + lax.rem(j, parts) * step_rows
                if partial:
                    pointer = lists.entry("pointer", b, h, n, place)
                    words = None if bits_ref is None else scores.words(shape, bits_ref, pointer, row, k0)
                    flags = lists.entry("flags", b, h, n, place)

                def multiply(acc: Any) -> jax.Array:
                    if config.turns:
                        plgpu.barrier_wait(turn.at[worker])
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.wgmma(acc, k_smem.at[worker], _mgpu.transposed(q_smem.at[slot]))
                    return acc[...]

                s = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32)))
                if config.turns:
                    plgpu.barrier_arrive(turn.at[1 - worker])
                exponents = _along_columns(plgpu.load(exponents_smem.at[slot], layout=_COLUMNS), shape)
                row_facts = scores.moving(facts_smem, slot) if partial else []
                if interpret:
                    plgpu.commit_smem()  # as in `forward`
                plgpu.barrier_arrive(q_empty.at[slot])
                s, factor = scores.natural(s, b, h, row, k0)
                if partial:
                    s = scores.masked(s, ((row_facts, column_facts), words, flags), row, k0)
                if reduce == "max_logit":
                    s = jnp.where(exponents == jnp.inf, -jnp.inf, s * (factor / LOG2E))
                else:
                    s = jnp.exp2(s * factor - exponents)
                combine = jnp.add if reduce == "sum" else jnp.maximum
                pieces = [s[:, i : i + 8] for i in range(0, step_rows, 8)]
                return combine(found, functools.reduce(combine, pieces))

            def head(u: Any, carry: Any) -> Any:
                found, first = carry
                h = key_head * group_size + u
                full, total = lists.counts(b, h, n)
                column_facts = scores.fixed(column_refs, b, h, k0)
                for low, high, partial in ((0, full, False), (full, total, True)):
                    run = functools.partial(step, h=h, column_facts=column_facts, first=first, partial=partial)
                    found = lax.fori_loop(low * parts, high * parts, run, found)
                return found, first + total * parts

            plgpu.barrier_wait(k_full)
            found, start = lax.fori_loop(0, group_size, head, (_filled(lowest, (_HALF, 8), _mgpu.WGMMA), start))
            plgpu.barrier_arrive(k_empty)
            whole = jnp.sum(found, axis=1) if reduce == "sum" else jnp.max(found, axis=1)
            out_ref.at[b, key_head, pl.ds(k0, _HALF)][...] = whole
            return start

        @pl.when(worker < 2)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            if config.turns:

                @pl.when(worker == 1)
                def _let_the_other_begin() -> None:
                    plgpu.barrier_arrive(turn.at[0])

            lax.fori_loop(0, mine, compute, jnp.int32(0))
            if config.turns:

                @pl.when(worker == 0)
                def _take_the_last() -> None:
                    plgpu.barrier_wait(turn.at[0])

    swizzled = _mgpu.swizzled(2, _row_bytes(head_dim))
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, key_heads, rounded), jnp.float32),
        grid=(work.groups,),
        grid_names=("group",),
        num_threads=3,
        thread_name="worker",
        scratch_types=(
            plgpu.SMEM((2, _HALF, head_dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((stages, step_rows, head_dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((stages, step_rows), jnp.float32),
            [plgpu.SMEM((stages, step_rows), jnp.int32) for _ in rows],
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2 + len(rows), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2),
        ),
        compiler_params=_mgpu.explicit_layouts(approx_math=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands)
    return out[..., :keys]
