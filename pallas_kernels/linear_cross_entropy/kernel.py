"""Hopper kernels for a cross-entropy whose logits stay in registers.

One persistent matrix product serves three purposes: a block takes tiles of ``x @ w`` in turn, a warpgroup fetches their
operands ahead of two that multiply, and what differs is only what these do with a finished tile: reduce each of its
rows to a few numbers, write exponentials, or write the gradient with respect to the logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu

DEPTH = 64  # of a stage: 128 bytes of each operand's row
STAGED = 64  # rows and columns of what is written to memory at a time
LOG2E = math.log2(math.e)
_ROWS = _mgpu.WGMMA.reduce(1)
_COLUMNS = _mgpu.WGMMA.reduce(0)


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: of the tile that a warpgroup computes, a multiple of 64.
      columns: of that tile, a multiple of 64.
      schedule: how the two computing warpgroups share a block. ``"rows"``: their tiles lie one below the other and
        share the columns of ``w``; ``"columns"``: side by side, sharing the rows of ``x``; ``"turns"``: one multiplies
        while the other finishes its tile.
      stages: of `DEPTH` inputs, in flight.
      cluster: 1, or 2 blocks that fetch the columns of ``w`` for each other.
      band: tiles of rows that blocks go over before they go on to the next tile of columns.
    """

    rows: int
    columns: int
    schedule: Literal["rows", "columns", "turns"]
    stages: int
    cluster: int
    band: int

    @property
    def block_rows(self) -> int:
        """Rows that a block computes at once."""
        return self.rows * (2 if self.schedule == "rows" else 1)

    @property
    def block_columns(self) -> int:
        """Columns that a block computes at once."""
        return self.columns * (2 if self.schedule == "columns" else 1)


class Tile(NamedTuple):
    """What a finished tile is reduced to, or becomes.

    Attributes:
      numbers: float32 ``[rows]`` each.
      dense: ``[rows, columns]`` or None.
    """

    numbers: tuple[jax.Array, ...]
    dense: jax.Array | None


def smem_bytes(config: Config, dense: bool) -> int:
    """Returns the shared memory that a block takes, barriers aside."""
    stage = (config.block_rows + config.block_columns) * DEPTH * 2
    return config.stages * stage + (4 * STAGED * STAGED * 2 if dense else 0)


def padded(size: int, multiple: int) -> int:
    """Returns ``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if size > x.shape[axis] else x


def product(
    x: jax.Array,
    w: jax.Array,
    per_row: Sequence[jax.Array],
    bias: jax.Array | None,
    finish: Callable[..., Tile],
    *,
    w_axis: int,
    start: int | jax.Array,
    columns: int,
    numbers: int,
    dense: bool,
    config: Config,
    blocks: int,
    interpret: bool = False,
) -> list[jax.Array]:
    """Gives every tile of ``x @ w``, in float32, to ``finish`` and writes what that returns.

    Args:
      x: 16-bit float ``[T, D]``, D a multiple of 64.
      w: the same dtype, ``[D, V]`` with V a multiple of 64 (``w_axis=0``) or ``[V, D]`` of 8 (``w_axis=1``).
      per_row: ``[T]`` arrays of 32-bit numbers.
      bias: float32 ``[V]`` or None.
      finish: ``(z, first, per_row, bias) -> Tile``: the products ``[rows, columns]``, the number of their first
        column, the rows' part of each array of ``per_row`` and the columns' part of ``bias``.
      w_axis: the axis of ``w`` of size D.
      start: first column that is computed, a multiple of the columns of a block.
      columns: how many are.
      numbers: how many numbers a row of a tile is reduced to.
      dense: whether tiles are written.
      config: how to cut the work.
      blocks: as many as the GPU has multiprocessors.
      interpret: run in the interpreter on a CPU.

    Returns:
      If they are asked for, the numbers, float32 ``[tiles of columns, numbers, T rounded up]``, then the tiles,
      ``[T, columns]`` in the dtype of ``x``.
    """
    tokens, depth = x.shape
    m_tiles = padded(tokens, config.block_rows * config.cluster) // config.block_rows
    n_tiles = padded(columns, config.block_columns) // config.block_columns
    rounded = m_tiles * config.block_rows
    parts = n_tiles * config.block_columns // config.columns
    per_row = [_pad(value, 0, rounded) for value in per_row]
    width = padded(columns, 64)
    if bias is not None:
        bias = _pad(bias, 0, bias.shape[0] + config.block_columns)
    x = _pad(x, 0, padded(tokens, 8))  # the copy engine takes whole tiles of 8 rows and 64 columns
    if interpret:  # and leaves out what lies beyond an array
        x = _pad(x, 0, rounded)
        w = _pad(w, 1 - w_axis, padded(w.shape[1 - w_axis], config.block_columns))
        width = n_tiles * config.block_columns
    turns = config.schedule == "turns"
    x_parts, w_parts = config.block_rows // config.rows, config.block_columns // config.columns
    steps, stages, cluster = depth // DEPTH, config.stages, config.cluster
    tiles = (m_tiles // cluster) * n_tiles
    groups = min(max(1, blocks // cluster), tiles)
    band = min(config.band, m_tiles // cluster)
    swizzled = _mgpu.swizzled(2)
    starts = [] if isinstance(start, int) else [start.reshape(1).astype(jnp.int32)]
    operands = [x, w, *starts, *per_row, *([] if bias is None else [bias])]
    outputs = []
    if numbers:
        outputs.append(jax.ShapeDtypeStruct((parts, numbers, rounded), jnp.float32))
    if dense:
        outputs.append(jax.ShapeDtypeStruct((rounded if interpret else padded(tokens, 8), width), x.dtype))

    def body(*refs: Any) -> None:
        remaining = iter(refs)
        inputs = [next(remaining) for _ in operands]
        x_ref, w_ref = inputs[:2]
        row_refs = inputs[2 + len(starts) :][: len(per_row)]
        numbers_ref: Any = next(remaining) if numbers else None
        dense_ref: Any = next(remaining) if dense else None
        x_smem, w_smem, full, empty, *rest = remaining
        staging: Any = rest[0] if dense else None
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        mine = (tiles - group + groups - 1) // groups
        offset = start if isinstance(start, int) else inputs[2][0]

        def place(i: Any) -> tuple[Any, Any]:
            """Returns the first row and the first column (of those computed) of the block's i-th tile."""
            m, n = plgpu.planar_snake(group + i * groups, (m_tiles // cluster, n_tiles), 0, band)
            if cluster > 1:
                m = m * cluster + lax.axis_index("peer")
            return m * config.block_rows, n * config.block_columns

        def columns_of_w(k: Any, first: Any) -> Any:
            inner, outer = pl.ds(k * DEPTH, DEPTH), pl.ds(offset + first, config.columns)
            return w_ref.at[outer, inner] if w_axis else w_ref.at[inner, outer]

        @pl.when(worker == 2)
        def _fetch() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _tile(i: Any) -> None:
                row, column = place(i)

                @pl.loop(0, steps)
                def _step(k: Any) -> None:
                    step = i * steps + k
                    slot = lax.rem(step, stages)
                    arrived = full.at[slot + (lax.rem(i, 2) * stages if turns else 0)]

                    @pl.when(step >= stages)
                    def _wait_for_room() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    for part in range(x_parts):
                        source = x_ref.at[pl.ds(row + part * config.rows, config.rows), pl.ds(k * DEPTH, DEPTH)]
                        plgpu.copy_gmem_to_smem(source, x_smem.at[slot, part], arrived)
                    for part in range(w_parts):
                        plgpu.copy_gmem_to_smem(
                            columns_of_w(k, column + part * config.columns),
                            w_smem.at[slot, part],
                            arrived,
                            collective_axes="peer" if cluster > 1 else None,
                        )

            @pl.loop(jnp.maximum(mine * steps - stages, 0), mine * steps)
            def _drain(step: Any) -> None:
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        def multiply(first_step: Any, x_part: Any, w_part: Any, acc: Any) -> jax.Array:
            @pl.loop(0, steps)
            def _step(k: Any) -> None:
                slot = lax.rem(first_step + k, stages)
                plgpu.barrier_wait(full.at[slot + (worker * stages if turns else 0)])
                w_tile = w_smem.at[slot, w_part]
                plgpu.wgmma(acc, x_smem.at[slot, x_part], _mgpu.transposed(w_tile) if w_axis else w_tile)
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _leave_room() -> None:
                    plgpu.barrier_arrive(empty.at[lax.rem(first_step + k + (stages - 1), stages)])

            return acc[...]

        def write(tile: Any, row: Any, column: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            corners = [(r, c) for r in range(0, config.rows, STAGED) for c in range(0, config.columns, STAGED)]
            for j, (r, c) in enumerate(corners):
                if j > 1:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                staged = staging.at[worker, j % 2]
                staged[...] = tile[r : r + STAGED, c : c + STAGED].astype(x.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, dense_ref.at[pl.ds(row + r, STAGED), pl.ds(column + c, STAGED)])

        def compute(i: Any) -> None:
            row, column = place(i)
            row += (worker * config.rows) if config.schedule == "rows" else 0
            column += (worker * config.columns) if config.schedule == "columns" else 0
            here = pl.ds(row, config.rows)
            row_values = [plgpu.load(ref.at[here], layout=_ROWS, optimized=False) for ref in row_refs]
            z = pl.run_scoped(
                functools.partial(
                    multiply,
                    i * steps,
                    worker if config.schedule == "rows" else 0,
                    worker if config.schedule == "columns" else 0,
                ),
                plgpu.ACC((config.rows, config.columns), jnp.float32),
            )
            plgpu.barrier_arrive(empty.at[lax.rem(i * steps + (steps - 1), stages)])
            bias_values = None
            if bias is not None:
                source = inputs[-1].at[pl.ds(offset + column, config.columns)]
                bias_values = plgpu.load(source, layout=_COLUMNS, optimized=False)
            tile = finish(z, offset + column, row_values, bias_values)
            if numbers:
                part = lax.div(column, config.columns)
                for j, value in enumerate(tile.numbers):
                    numbers_ref.at[part, j, here][...] = value
            if dense:
                write(tile.dense, row, column)

        @pl.when(worker < 2)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            if turns:

                @pl.loop(0, (mine - worker + 1) // 2)
                def _every_other(i: Any) -> None:
                    compute(2 * i + worker)
            else:

                @pl.loop(0, mine)
                def _each(i: Any) -> None:
                    compute(i)

            plgpu.wait_smem_to_gmem(0)

    arrivals = 1 if turns else 2
    w_tile = (config.columns, DEPTH) if w_axis else (DEPTH, config.columns)
    scratch: list[Any] = [
        plgpu.SMEM((stages, x_parts, config.rows, DEPTH), x.dtype, transforms=swizzled),
        plgpu.SMEM((stages, w_parts, *w_tile), x.dtype, transforms=swizzled),
        plgpu.Barrier(num_arrivals=x_parts + w_parts, num_barriers=stages * (2 if turns else 1)),
        plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=arrivals, num_barriers=stages)
        if cluster > 1
        else plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
    ]
    if dense:
        scratch.append(plgpu.SMEM((2, 2, STAGED, STAGED), x.dtype, transforms=swizzled))
    clusters: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("peer",)} if cluster > 1 else {}
    made = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        grid=(groups,),
        grid_names=("group",),
        **clusters,
        num_threads=3,
        thread_name="worker",
        scratch_types=tuple(scratch),
        compiler_params=_mgpu.explicit_layouts(approx_math=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands)
    return [*made[:-1], made[-1][:tokens, :columns]] if dense else list(made)
