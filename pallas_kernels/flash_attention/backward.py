"""Hopper kernels for the gradients of block-sparse attention, after FlashAttention-2 and -3 (2023, 2024).

Scores are computed again from the log-sum-exp, ``P = exp(S - lse)`` and ``dS = P * (dO V^T - delta)``, in two kernels
without atomics, so that a run repeats bit by bit. `query_gradient` keeps queries and sums ``dQ += dS K`` over the keys
of their list; `key_value_gradients` keeps keys, computes the transposed tiles and sums ``dV += P^T dO`` and
``dK += dS^T Q`` over the queries of the list and over the query heads of the key head.

A block of threads is a warpgroup that fetches tiles and one or two that compute, on 64 x 64 scores at a time. Both
loops follow the same list, first the blocks that need no mask. Two tensor-core products run while the next step's
scores begin: a step waits for those of the step before when its own scores are there, and only then gives their memory
back. The second operand of each product lies in shared memory, P and dS stay in registers.

What it costs, V being the visited scores of all heads: `query_gradient` 2 V (2 D + Dv) FLOPs, `key_value_gradients`
4 V (D + Dv), and an exponential of each score in both. For D = Dv these are 14 D V, where a kernel that computed the
scores once would do with 10 D V. On an H100 with B 1, H 16, D 128, causal at S 8192 they take 0.56 and 0.78 ms (750
and 720 TFLOP/s), window 1024 at S 16384 0.37 and 0.49 ms (600 and 620).

Registers decide in `key_value_gradients`: where they do not suffice, ptxas makes products wait for each other, which
cost a quarter of the speed. Hence 240 for computing threads, and products that begin with the log-sum-exp and delta
taken off in their accumulators, where scores are plain, so that neither needs a register. Registers that tiles take of
a computing warpgroup's thread, of 232 and 240 (of 255 where one warpgroup computes), and shared memory of a block, of
227 KiB; the product of P takes 16 more while it runs:

    D, Dv      query_gradient                       key_value_gradients
    64, 64     32 dQ + 64 S, dP + 16 dS, 96 KiB     64 dK, dV + 64 + 16, 98 KiB
    128, 128   64    + 64       + 16,    192 KiB    128       + 64 + 16, 194 KiB
    192, 128   96    + 64       + 16,    200 KiB    96 dK     + 64 + 16, 202 KiB (one warpgroup sums dK, one dV)
    256, 256   128   + 64       + 16,    192 KiB    128 dK    + 64 + 16, 193 KiB (likewise)

At D = Dv = 256 one warpgroup computes `query_gradient`. Other widths are filled up with zeros to multiples of 64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels._bits import seed_words
from pallas_kernels.flash_attention.lists import BlockList, Elements, heads_together
from pallas_kernels.flash_attention.scores import ScoreMod, no_kernel_for, stays

STEP = 64  # queries and keys of the scores that a warpgroup computes at once
SMEM_BYTES = 227 * 1024 - 2048  # of a block, less the barriers
LOG2E = math.log2(math.e)
_ROWS, _COLUMNS = _mgpu.WGMMA.reduce(1), _mgpu.WGMMA.reduce(0)


class Config(NamedTuple):
    """How a block of threads is cut.

    Attributes:
      parts: 64 queries (`query_gradient`) or keys that the block keeps, times this; 1 or 2.
      workers: computing warpgroups. As many as parts, or 2 for one part of keys: then one sums dK, the other dV.
      stages: tiles of the other side in flight, at least 2.
    """

    parts: int
    workers: int
    stages: int


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def smem_bytes(config: Config, depth: int, values: int, statistics: bool) -> int:
    """Returns the shared memory of a block, barriers aside; ``statistics``: of `key_value_gradients`."""
    tile = STEP * (_rounded(depth, 64) + _rounded(values, 64)) * 2
    return config.parts * tile + config.stages * (tile + (2 * STEP * 4 if statistics else 0))


def query_config(depth: int, values: int, block: int) -> Config:
    """Returns how `query_gradient` is cut for D, Dv and bq."""
    tiles = SMEM_BYTES // smem_bytes(Config(1, 1, 0), depth, values, False)
    parts = 2 if block % (2 * STEP) == 0 and tiles >= 4 else 1
    return Config(parts, parts, min(4, tiles - parts))


def key_config(depth: int, values: int, block: int) -> Config:
    """Returns how `key_value_gradients` is cut for D, Dv and bk."""
    both = _rounded(depth, 64) + _rounded(values, 64) <= 256  # registers for dK and dV
    parts = 2 if both and block % (2 * STEP) == 0 else 1
    tiles = SMEM_BYTES // (smem_bytes(Config(1, 1, 0), depth, values, True) + 2 * STEP * 4)
    return Config(parts, parts if both else 2, min(4, tiles - parts))


def backward_unsupported(
    q: Any,
    k: Any,
    v: Any,
    *,
    blocks: tuple[int, int],
    score_mod: ScoreMod | None = None,
    pages: Any = None,
) -> str | None:
    """Returns why the kernels cannot compute the gradients; None if they can.

    Args:
      q: ``[B, S, H, D]``, anything with a shape and a dtype.
      k: ``[B, T, Hk, D]``.
      v: ``[B, T, Hk, Dv]``.
      blocks: (bq, bk).
      score_mod: as `api.forward` takes it.
      pages: likewise.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the kernels read three bfloat16 or three float16 arrays"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"D is {q.shape[-1]} and Dv {v.shape[-1]}; the kernels take up to 256"
    if blocks[0] % STEP or blocks[1] % STEP:
        return f"blocks are {blocks}, which are no multiples of {STEP}"
    if pages is not None:
        return "keys and values are in pages"
    if score_mod is not None and (reason := no_kernel_for(score_mod)):
        return f"score_mod {reason}, where the kernels take simple operations on its arguments alone"
    return None


def _bent(u: jax.Array) -> jax.Array:
    """Returns tanh to float32's accuracy where it is not small: the processor's own has 11 bits."""
    return 1.0 - 2.0 * jnp.exp2(-jnp.log2(1.0 + jnp.exp2(u * (2 * LOG2E))))


class _Masks(NamedTuple):
    """What a kernel reads besides tiles; ``words`` are those of `seed_words` ``[2]``, or None."""

    lists: BlockList
    elements: Elements
    words: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Scores:
    """How a tile of products becomes P and its slope; everything here is static.

    Attributes:
      sizes: H, Hk, S and T.
      axis: of a tile along which queries lie, 0 or 1.
    """

    blocks: tuple[int, int]
    sizes: tuple[int, int, int, int]
    scale: float
    softcap: float | None
    score_mod: ScoreMod | None
    dropout: float
    axis: int

    def at(self, ref: Any, b: Any, h: Any) -> tuple[Any, Any]:
        """Returns where an array ``[B|1, H|Hk|1, ...]`` has what query head h of batch b reads."""
        heads, key_heads = self.sizes[:2]
        mine = {1: 0, key_heads: lax.div(h, jnp.int32(heads // key_heads)), heads: h}
        return 0 if ref.shape[0] == 1 else b, 0 if ref.shape[1] == 1 else mine[ref.shape[1]]

    def some_masked(self, masks: Any) -> bool:
        """Returns whether blocks may need a mask; if not, only those that need none are visited."""
        return masks.elements.test is not None or masks.elements.bits is not None

    def count(self, masks: Any, b: Any, h: Any, n: Any) -> tuple[Any, Any]:
        """Returns how many entries of block n's list need no mask, and how many there are."""
        where = (*self.at(masks.lists.full, b, h), n)
        full = masks.lists.full[where]
        return full, masks.lists.total[where] if self.some_masked(masks) else full

    def _spread(self, values: jax.Array, axis: int) -> jax.Array:
        return lax.broadcast_in_dim(values, (STEP, STEP), (axis,))

    def _load(self, ref: Any, axis: int) -> jax.Array:
        return plgpu.load(ref, layout=_COLUMNS if axis else _ROWS, optimized=False)

    def _place(self, q: Any, k: Any) -> tuple[jax.Array, jax.Array]:
        iotas = [plgpu.broadcasted_iota(jnp.int32, (STEP, STEP), axis, layout=_mgpu.WGMMA) for axis in (0, 1)]
        return iotas[self.axis] + q, iotas[1 - self.axis] + k

    def place(self, ref: Any, b: Any, h: Any, start: Any) -> tuple[Any, ...]:
        """Returns where 64 facts are, of an array ``[B|1, H|Hk|1, ...]``."""
        return (*self.at(ref, b, h), pl.ds(start, STEP))

    def fixed(self, refs: Any, b: Any, h: Any, start: Any) -> list[jax.Array]:
        """Loads facts about the rows of a tile, which stay the same from step to step."""
        return [self._load(ref.at[self.place(ref, b, h, start)], 0) for ref in refs]

    def _truth(
        self, masks: Any, b: Any, h: Any, q: Any, k: Any, entry: tuple[Any, Any], fixed: Any, moving: Any
    ) -> jax.Array:
        """Returns which elements of the tile at (q, k), of a block that needs a mask, are true."""
        elements, (bq, bk) = masks.elements, self.blocks
        queries, keys = self._place(q, k)
        where = (*self.at(masks.lists.index, b, h), *entry)
        if elements.bits is not None:
            assert masks.lists.pointer is not None
            table = elements.bits.at[masks.lists.pointer[where]]
            word, first = lax.div(lax.rem(q, bq), 32), lax.rem(k, bk)
            halves = [
                self._spread(self._load(table.at[word + i, pl.ds(first, STEP)], 1 - self.axis), 1 - self.axis)
                for i in (0, 1)
            ]
            inside = queries - q
            held = jnp.where(inside < 32, *halves)
            return ((held >> (inside & 31).astype(jnp.uint32)) & np.uint32(1)) != np.uint32(0)
        assert elements.test is not None
        along = (
            tuple(self._spread(x, 0) for x in fixed),
            tuple(self._spread(plgpu.load(x, layout=_COLUMNS), 1) for x in moving),
        )
        rows, columns = along[:: -1 if self.axis else 1]
        flags = None if masks.lists.flags is None else masks.lists.flags[where]
        return elements.test(queries, keys, rows, columns, flags)

    def weights(
        self,
        raw: jax.Array,
        lse: jax.Array | None,
        masks: Any,
        b: Any,
        h: Any,
        q: Any,
        k: Any,
        entry: tuple[Any, Any],
        masked: bool,
        fixed: Any,
        moving: Any,
    ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
        """Returns P, and functions that multiply by the slope of the scores and that apply dropout.

        Args:
          raw: float32 ``[64, 64]``, products of queries and keys.
          lse: float32 ``[64]`` of the queries, times log2 e; None where ``raw`` is less by it already.
          masks: references.
          b, h: batch and query head.
          q, k: first query and first key of the tile.
          entry: (n, j): the tile belongs to the j-th block of the n-th list.
          masked: whether that block needs a mask.
          fixed: facts about the rows of the tile.
          moving: references to those about its columns.
        """
        queries, keys = self.sizes[2:]
        place = functools.cache(lambda: self._place(q, k))
        factors = []
        if self.softcap is None and self.score_mod is None:
            scores = raw * (self.scale * LOG2E)
        else:
            scores = raw * self.scale
            if self.softcap is not None:
                bent = _bent(scores * (1 / self.softcap))
                scores = bent * self.softcap
                factors.append(1.0 - bent * bent)
            if self.score_mod is not None:
                score_mod = self.score_mod
                positions = place()
                scores, factor = _mgpu.value_and_slope(lambda s: score_mod(s, b, h, *positions), scores)
                factors.append(factor)
            scores = scores * LOG2E
        p = jnp.exp2(scores if lse is None else scores - self._spread(lse, self.axis))
        counts = []
        if masked:
            counts.append(self._truth(masks, b, h, q, k, entry, fixed, moving))
            if keys % self.blocks[1]:
                counts.append(place()[1] < keys)
        if self.score_mod is not None and queries % self.blocks[0]:
            counts.append(place()[0] < queries)
        keep = functools.reduce(lambda x, y: x & y, counts) if counts else None
        if keep is not None:
            p = jnp.where(keep, p, 0.0)

        def sloped(ds: jax.Array) -> jax.Array:
            for factor in factors:
                ds = ds * factor
            return ds if keep is None or self.score_mod is None else jnp.where(keep, ds, 0.0)

        def dropped(x: jax.Array) -> jax.Array:
            if not self.dropout:
                return x
            assert masks.words is not None
            words = masks.words[0], masks.words[1]
            left = stays(words, self.dropout, self.sizes[0], keys, b, h, *place())
            return jnp.where(left, x * (1 / (1 - self.dropout)), 0.0)

        return p, sloped, dropped


def _wide(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
    """Fills ``[B, S, H, D]`` up with zeros: S to a length, D to a multiple of 64."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(0, length - x.shape[axis]))
    widths[-1] = (0, _rounded(x.shape[-1], 64) - x.shape[-1])
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


class _Work(NamedTuple):
    """Operands as the kernels read them.

    Attributes:
      q, k, v, do: ``[B, S or T filled up, heads, D or Dv filled up]``.
      statistics: float32 ``[B, H, 2, S filled up]``: lse times log2 e, inf for rows without keys, and delta.
      masks: with rows and columns filled up to whole blocks.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    statistics: jax.Array
    masks: _Masks


def _work(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    dropout: float,
    seed: Any,
    interpret: bool,
) -> _Work:
    whole = [_rounded(x.shape[1], block) for x, block in zip((q, k), blocks)]
    # The copy engine takes whole tiles of 8 rows and leaves out what lies beyond an array; the interpreter refuses to.
    length_q, length_k = whole if interpret else (_rounded(x.shape[1], 8) for x in (q, k))
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse.astype(jnp.float32)) * LOG2E
    missing = [(0, 0), (0, 0), (0, whole[0] - q.shape[1])]
    statistics = [
        jnp.pad(jnp.moveaxis(x, 2, 1), missing, constant_values=value)
        for x, value in ((lse, jnp.inf), (delta.astype(jnp.float32), 0))
    ]
    rows, columns = (
        tuple(jnp.pad(jnp.asarray(x), [(0, 0), (0, 0), (0, size - x.shape[2])]) for x in values)
        for values, size in ((elements.rows, whole[0]), (elements.columns, whole[1]))
    )
    bits = None if elements.bits is None else jnp.asarray(elements.bits)
    return _Work(
        _wide(q, length_q),
        _wide(k, length_k),
        _wide(v, length_k),
        _wide(do.astype(q.dtype), length_q),
        jnp.stack(statistics, 2),
        _Masks(
            jax.tree.map(jnp.asarray, lists),
            Elements(rows, columns, bits, elements.test),
            jnp.stack(seed_words(seed)) if dropout else None,
        ),
    )


def _launch(
    body: Callable[..., None],
    work: _Work,
    outputs: list[jax.ShapeDtypeStruct],
    scratch: list[Any],
    *,
    blocks: int,
    heads: int,
    together: int,
    workers: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs ``body(block, batch, head, work, outputs, scratch)`` on references, ``together`` heads at a time."""
    operands, tree = jax.tree.flatten(work)
    n, m = len(operands), len(outputs)
    chunks = work.q.shape[0] * heads // together

    def run(*refs: Any) -> None:
        pair = lax.axis_index("chunk") * together + lax.axis_index("pair")
        place = lax.axis_index("block"), lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads))
        body(*place, jax.tree.unflatten(tree, refs[:n]), refs[n : n + m], refs[n + m :])

    return list(
        plgpu.kernel(
            run,
            out_type=tuple(outputs),
            grid=(chunks, blocks, together),
            grid_names=("chunk", "block", "pair"),
            num_threads=workers + 1,
            thread_name="worker",
            scratch_types=tuple(scratch),
            compiler_params=_mgpu.explicit_layouts(approx_math=True, reduction_scratch_bytes=0),
            interpret=plgpu.InterpretGPUParams() if interpret else None,
        )(*operands)
    )


def _when_there(acc: Any, newer: int) -> jax.Array:
    """Returns an accumulator once all products are done but the newest so many; nothing reads it before."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=newer))


def _store(values: jax.Array, staging: Any, target: Any) -> None:
    """Writes a tile by way of shared memory that nothing reads any more."""
    staging[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, target)
    plgpu.wait_smem_to_gmem(0)


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient of ``q``, ``[B, S, H, D]`` in its dtype.

    Args:
      q: bfloat16 or float16 ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      v: ``[B, T, Hk, Dv]``.
      do: ``[B, S, H, Dv]``, the gradient of the result.
      lse: float32 ``[B, S, H]``, natural; -inf for rows without keys.
      delta: float32 ``[B, S, H]``, the sum of ``do`` times the result over Dv.
      lists: for each block of queries the blocks of keys.
      elements: which elements of partial blocks are true.
      blocks: (bq, bk), multiples of 64; 128 at least keeps both warpgroups busy.
      scale: of the products.
      softcap: cap of the scores, or None.
      score_mod: ``(s, b, h, q, k) -> s``, elementwise, or None.
      dropout: rate.
      seed: of the dropout, as `_bits.seed_words` takes it.
      config: how the work is cut; None decides by the sizes.
      interpret: run in the interpreter on a CPU.
    """
    batch, queries, heads, depth = q.shape
    keys, key_heads = k.shape[1:3]
    parts, workers, stages = config or query_config(depth, v.shape[3], blocks[0])
    work = _work(
        q, k, v, do, lse, delta, lists, elements, blocks=blocks, dropout=dropout, seed=seed, interpret=interpret
    )
    scores = _Scores(blocks, (heads, key_heads, queries, keys), scale, softcap, score_mod, dropout, 0)
    wide, wide_v = work.q.shape[3], work.v.shape[3]
    height, per_block = parts * STEP, blocks[1] // STEP
    n_blocks = -(-queries // height)

    def body(block: Any, b: Any, h: Any, work: Any, outputs: Any, scratch: Any) -> None:
        (dq_ref,) = outputs
        q_smem, do_smem, k_smem, v_smem, facts_smem, held, full, empty, *rest = scratch
        worker = lax.axis_index("worker")
        start = (n_blocks - 1 - block) * height  # causal masks give the last queries most to do
        n = lax.div(start, blocks[0])
        plain, total = (count * per_block for count in scores.count(work.masks, b, h, n))
        place = scores.at(work.masks.lists.index, b, h)

        def first_key(i: Any) -> Any:
            inside = lax.rem(i, per_block) * STEP
            return work.masks.lists.index[(*place, n, lax.div(i, per_block))] * blocks[1] + inside

        @pl.when(worker == workers)
        def _fetch() -> None:
            plgpu.set_max_registers(40, action="decrease")
            for part in range(parts):
                mine = pl.ds(start + part * STEP, STEP)
                plgpu.copy_gmem_to_smem(work.q.at[b, mine, h], q_smem.at[part], held)
                plgpu.copy_gmem_to_smem(work.do.at[b, mine, h], do_smem.at[part], held)
            head = lax.div(h, jnp.int32(heads // key_heads))

            @pl.loop(0, total)
            def _each(i: Any) -> None:
                slot = lax.rem(i, stages)

                @pl.when(i >= stages)
                def _wait_for_room() -> None:
                    plgpu.barrier_wait(empty.at[slot])

                theirs = pl.ds(first_key(i), STEP)
                plgpu.copy_gmem_to_smem(work.k.at[b, theirs, head], k_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(work.v.at[b, theirs, head], v_smem.at[slot], full.at[slot])
                for known, copy in zip(work.masks.elements.columns, facts_smem, strict=True):
                    there = known.at[scores.place(known, b, h, first_key(i))]
                    plgpu.copy_gmem_to_smem(there, copy.at[slot], full.at[slot])

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(i: Any) -> None:
                plgpu.barrier_wait(empty.at[lax.rem(i, stages)])

        @pl.when(worker < workers)
        def _compute() -> None:
            if workers > 1:
                plgpu.set_max_registers(232, action="increase")
            row = start + worker * STEP
            mine = pl.ds(row, STEP)
            log_sums, delta = (
                plgpu.load(work.statistics.at[b, h, i, mine], layout=_ROWS, optimized=False) for i in (0, 1)
            )
            facts = scores.fixed(work.masks.elements.rows, b, h, row)
            plgpu.barrier_wait(held)

            def with_sum(dq: Any) -> None:
                def step(i: Any, masked: bool) -> None:
                    slot, first = lax.rem(i, stages), first_key(i)
                    plgpu.barrier_wait(full.at[slot])

                    def differentiate(s: Any, dp: Any) -> jax.Array:
                        plgpu.wgmma(s, q_smem.at[worker], _mgpu.transposed(k_smem.at[slot]))
                        plgpu.wgmma(dp, do_smem.at[worker], _mgpu.transposed(v_smem.at[slot]))
                        raw = _when_there(s, 1)

                        @pl.when(i > 0)
                        def _leave_room() -> None:
                            plgpu.barrier_arrive(empty.at[lax.rem(i + (stages - 1), stages)])

                        p, sloped, dropped = scores.weights(
                            raw,
                            log_sums,
                            work.masks,
                            b,
                            h,
                            row,
                            first,
                            (n, lax.div(i, per_block)),
                            masked,
                            facts,
                            [copy.at[slot] for copy in facts_smem],
                        )
                        along = lax.broadcast_in_dim(delta, (STEP, STEP), (0,))
                        return sloped(p * (dropped(_when_there(dp, 0)) - along)).astype(q.dtype)

                    tile = plgpu.ACC((STEP, STEP), jnp.float32)
                    ds = pl.run_scoped(differentiate, tile, tile)
                    if interpret:  # which multiplies from shared memory only
                        rest[0][worker] = ds
                        ds = rest[0].at[worker]
                    plgpu.wgmma(dq, ds, k_smem.at[slot])

                pl.loop(0, plain)(lambda i: step(i, False))
                if scores.some_masked(work.masks):
                    pl.loop(plain, total)(lambda i: step(i, True))
                result = _when_there(dq, 0)

                @pl.when(total > 0)
                def _leave_room() -> None:
                    plgpu.barrier_arrive(empty.at[lax.rem(total - 1, stages)])

                _store((result * scale).astype(q.dtype), q_smem.at[worker], dq_ref.at[b, mine, h])

            pl.run_scoped(with_sum, plgpu.ACC((STEP, wide), jnp.float32))

    tiles, made = _mgpu.swizzled(2), functools.partial(plgpu.SMEM, dtype=q.dtype)
    scratch = [
        made((parts, STEP, wide), transforms=tiles),
        made((parts, STEP, wide_v), transforms=tiles),
        made((stages, STEP, wide), transforms=tiles),
        made((stages, STEP, wide_v), transforms=tiles),
        [plgpu.SMEM((stages, STEP), jnp.int32) for _ in elements.columns],
        plgpu.Barrier(num_arrivals=2 * parts),
        plgpu.Barrier(num_arrivals=2 + len(elements.columns), num_barriers=stages),
        plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        *([made((workers, STEP, STEP))] if interpret else []),
    ]
    sharing = heads // key_heads
    together = heads_together(lists, elements, batch * heads, sharing, 2 * keys * (depth + v.shape[3]))
    out = jax.ShapeDtypeStruct(work.q.shape, q.dtype)
    (dq,) = _launch(
        body,
        work,
        [out],
        scratch,
        blocks=n_blocks,
        heads=heads,
        together=together,
        workers=workers,
        interpret=interpret,
    )
    return dq[:, :queries, :, :depth]


def key_value_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``k`` and ``v``, ``[B, T, Hk, D]`` and ``[B, T, Hk, Dv]`` in their dtype.

    Args:
      lists: for each block of keys the blocks of queries.

      The others as `query_gradient` takes them.
    """
    batch, queries, heads, depth = q.shape
    keys, key_heads, values = v.shape[1:]
    group = heads // key_heads
    parts, workers, stages = config or key_config(depth, values, blocks[1])
    apart = workers > parts
    work = _work(
        q, k, v, do, lse, delta, lists, elements, blocks=blocks, dropout=dropout, seed=seed, interpret=interpret
    )
    scores = _Scores(blocks, (heads, key_heads, queries, keys), scale, softcap, score_mod, dropout, 1)
    wide, wide_v = work.k.shape[3], work.v.shape[3]
    height, per_block = parts * STEP, blocks[0] // STEP
    n_blocks = -(-keys // height)

    def body(block: Any, b: Any, key_head: Any, work: Any, outputs: Any, scratch: Any) -> None:
        k_smem, v_smem, q_smem, do_smem, statistics, facts_smem, held, full, empty, done, *rest = scratch
        worker = lax.axis_index("worker")
        start = block * height
        n = lax.div(start, blocks[1])

        def each_head(visit: Callable[..., None]) -> Any:
            """Runs ``visit(h, before, plain, total)`` for each query head; returns how many steps there were."""

            def one(i: Any, before: Any) -> Any:
                h = key_head * group + i
                plain, total = (count * per_block for count in scores.count(work.masks, b, h, n))
                visit(h, before, plain, total)
                return before + total

            return lax.fori_loop(0, group, one, jnp.int32(0))

        def first_query(h: Any, i: Any) -> Any:
            where = (*scores.at(work.masks.lists.index, b, h), n, lax.div(i, per_block))
            return work.masks.lists.index[where] * blocks[0] + lax.rem(i, per_block) * STEP

        @pl.when(worker == workers)
        def _fetch() -> None:
            plgpu.set_max_registers(24, action="decrease")
            for part in range(parts):
                mine = pl.ds(start + part * STEP, STEP)
                plgpu.copy_gmem_to_smem(work.k.at[b, mine, key_head], k_smem.at[part], held)
                plgpu.copy_gmem_to_smem(work.v.at[b, mine, key_head], v_smem.at[part], held)

            def visit(h: Any, before: Any, plain: Any, total: Any) -> None:
                del plain

                @pl.loop(0, total)
                def _each(i: Any) -> None:
                    slot = lax.rem(before + i, stages)

                    @pl.when(before + i >= stages)
                    def _wait_for_room() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    theirs = pl.ds(first_query(h, i), STEP)
                    plgpu.copy_gmem_to_smem(work.q.at[b, theirs, h], q_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(work.do.at[b, theirs, h], do_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(work.statistics.at[b, h, :, theirs], statistics.at[slot], full.at[slot])
                    for known, copy in zip(work.masks.elements.rows, facts_smem, strict=True):
                        there = known.at[scores.place(known, b, h, first_query(h, i))]
                        plgpu.copy_gmem_to_smem(there, copy.at[slot], full.at[slot])

            steps = each_head(visit)

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(i: Any) -> None:
                plgpu.barrier_wait(empty.at[lax.rem(i, stages)])

        def operand(tile: jax.Array) -> Any:
            if not interpret:
                return tile
            rest[0][worker] = tile  # the interpreter multiplies from shared memory only
            return rest[0].at[worker]

        def compute(part: Any, dk: Any, dv: Any) -> None:
            """Sums what it is given accumulators for."""
            # Registers are few: products that begin with what is taken from them need none for it.
            plain = bool(scale) and softcap is None and score_mod is None and not dropout
            less = dk is not None and plain and not interpret

            def step(h: Any, before: Any, i: Any, masked: bool, facts: Any) -> None:
                slot, first = lax.rem(before + i, stages), first_query(h, i)
                plgpu.barrier_wait(full.at[slot])

                def differentiate(s: Any, *dps: Any) -> Any:
                    plgpu.wgmma(s, k_smem.at[part], _mgpu.transposed(q_smem.at[slot]))
                    if dk is not None:
                        plgpu.wgmma(dps[0], v_smem.at[part], _mgpu.transposed(do_smem.at[slot]))
                    log_sums = None if less else statistic(0)
                    raw = _when_there(s, len(dps))

                    @pl.when(before + i > 0)
                    def _leave_room() -> None:
                        plgpu.barrier_arrive(empty.at[lax.rem(before + i + (stages - 1), stages)])

                    p, sloped, dropped = scores.weights(
                        raw,
                        log_sums,
                        work.masks,
                        b,
                        h,
                        first,
                        start + part * STEP,
                        (n, lax.div(i, per_block)),
                        masked,
                        facts,
                        [copy.at[slot] for copy in facts_smem],
                    )
                    if dv is not None:
                        plgpu.wgmma(dv, operand(dropped(p).astype(q.dtype)), do_smem.at[slot])
                    if dk is None:
                        return jnp.int32(0)
                    dp = _when_there(dps[0], 0 if dv is None else 1)
                    if not less:
                        dp = dropped(dp) - lax.broadcast_in_dim(statistic(1), (STEP, STEP), (1,))
                    return sloped(p * dp).astype(q.dtype)

                def statistic(which: int) -> jax.Array:
                    return plgpu.load(statistics.at[slot, which], layout=_COLUMNS)

                if less:

                    def with_results(refs: Any) -> None:
                        refs[-1][...] = differentiate(*refs[:2])

                    factors = -1 / (scale * LOG2E), -1.0
                    begun = [lax.broadcast_in_dim(statistic(j) * x, (STEP, STEP), (1,)) for j, x in enumerate(factors)]
                    like = plgpu.layout_cast(jnp.zeros((STEP, STEP), q.dtype), _mgpu.WGMMA)
                    *_, ds = pl.run_state(with_results)((*map(plgpu.ACC.init, begun), like))
                else:
                    tile = plgpu.ACC((STEP, STEP), jnp.float32)
                    ds = pl.run_scoped(differentiate, *[tile] * (1 if dk is None else 2))
                if dk is not None:
                    plgpu.wgmma(dk, operand(ds), q_smem.at[slot])

            def visit(h: Any, before: Any, plain: Any, total: Any) -> None:
                facts = scores.fixed(work.masks.elements.columns, b, h, start + part * STEP)
                pl.loop(0, plain)(lambda i: step(h, before, i, False, facts))
                if scores.some_masked(work.masks):
                    pl.loop(plain, total)(lambda i: step(h, before, i, True, facts))

            steps = each_head(visit)
            mine = pl.ds(start + part * STEP, STEP)
            results = [None if acc is None else _when_there(acc, 0) for acc in (dk, dv)]

            @pl.when(steps > 0)
            def _leave_room() -> None:
                plgpu.barrier_arrive(empty.at[lax.rem(steps - 1, stages)])

            if apart:  # the other warpgroup still reads the keys
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)
            for result, factor, staging, out in zip(results, (scale, 1.0), (k_smem, v_smem), outputs):
                if result is not None:
                    _store((result * factor).astype(q.dtype), staging.at[part], out.at[b, mine, key_head])

        @pl.when(worker < workers)
        def _compute() -> None:
            if workers > 1:
                plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_wait(held)
            sums = plgpu.ACC((STEP, wide), jnp.float32), plgpu.ACC((STEP, wide_v), jnp.float32)
            if apart:

                @pl.when(worker == 0)
                def _keys() -> None:
                    pl.run_scoped(lambda dk: compute(0, dk, None), sums[0])

                @pl.when(worker == 1)
                def _values() -> None:
                    pl.run_scoped(lambda dv: compute(0, None, dv), sums[1])
            else:
                pl.run_scoped(lambda dk, dv: compute(worker, dk, dv), *sums)

    tiles, made = _mgpu.swizzled(2), functools.partial(plgpu.SMEM, dtype=q.dtype)
    scratch = [
        made((parts, STEP, wide), transforms=tiles),
        made((parts, STEP, wide_v), transforms=tiles),
        made((stages, STEP, wide), transforms=tiles),
        made((stages, STEP, wide_v), transforms=tiles),
        plgpu.SMEM((stages, 2, STEP), jnp.float32),
        [plgpu.SMEM((stages, STEP), jnp.int32) for _ in elements.rows],
        plgpu.Barrier(num_arrivals=2 * parts),
        plgpu.Barrier(num_arrivals=3 + len(elements.rows), num_barriers=stages),
        plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        *([made((workers, STEP, STEP))] if interpret else []),
    ]
    outs = [jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (work.k, work.v)]
    together = heads_together(lists, elements, batch * key_heads, 1, 2 * queries * group * (depth + values))
    dk, dv = _launch(
        body,
        work,
        outs,
        scratch,
        blocks=n_blocks,
        heads=key_heads,
        together=together,
        workers=workers,
        interpret=interpret,
    )
    return dk[:, :keys, :, :depth], dv[:, :keys, :, :values]
