"""Lists of the blocks that a mask leaves to visit, made from the corners of blocks: nothing of size S x T is built."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.attention.expression import Array, Facts, Mask, as_integer, classify, evaluate, resolve, tile_truths
from memjax.attention.intervals import numpy_like
from pallas_kernels.flash_attention import BlockList, Elements

Overflow = Literal["error", "dense", "drop_lowest"]

_ELEMENTS = 2**22
"""Elements of partial blocks that are evaluated at once where their truth is stored."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["by_query", "by_key", "elements", "overflow"],
    meta_fields=["S", "T", "blocks"],
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """A mask as kernels read it. ``Bm`` is 1 or B, ``Hm`` is 1, Hk or H, ``Nq = ceil(S / bq)``, ``Nk = ceil(T / bk)``.

    Attributes:
      by_query: for each block of queries, the blocks of keys to visit; ``N`` is Nq.
      by_key: for each block of keys, the blocks of queries to visit; ``N`` is Nk.
      elements: the truth of elements of partial blocks.
      overflow: bool ``[Bm, Hm, Nq]``: blocks of queries that lost blocks of keys to the capacity, the results of which
        must be NaN. None where none can.
      S, T: queries and keys (those in ``rows`` and ``columns`` where subsets were asked for).
      blocks: (bq, bk).
    """

    by_query: BlockList
    by_key: BlockList
    elements: Elements
    overflow: Array | None
    S: int
    T: int
    blocks: tuple[int, int]

    @property
    def density(self) -> float:
        """The fraction of blocks that are visited, full or partial."""
        total = np.asarray(self.by_query.total)
        return float(total.sum() / (total.size * -(-self.T // self.blocks[1])))

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and of what decides elements."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def show(self, *, batch: int = 0, head: int = 0) -> str:
        """Returns a picture of the blocks, at most 64 columns: ``█`` full, ``▒`` partial, ``·`` not visited."""
        index, full, total = (np.asarray(x)[batch, head] for x in self.by_query[:3])
        grid = np.zeros((len(index), -(-self.T // self.blocks[1])), int)
        for line, columns, f, t in zip(grid, index, full, total):
            line[columns[:f]], line[columns[f:t]] = 2, 1
        q, k = (-(-n // 64) for n in grid.shape)
        parts = [[grid[i : i + q, j : j + k] for j in range(0, grid.shape[1], k)] for i in range(0, grid.shape[0], q)]
        return "\n".join("".join("█" if (p == 2).all() else "▒" if p.any() else "·" for p in line) for line in parts)


def make_block_mask(
    mask: Mask,
    S: int,
    T: int,
    *,
    blocks: tuple[int, int] = (128, 128),
    rows: Any = None,
    columns: Any = None,
    capacity: int | tuple[int, int] | None = None,
    overflow: Overflow = "error",
    scores: Any = None,
) -> BlockMask:
    """Returns the lists of blocks that a mask leaves to visit, in time and memory O(blocks).

    A static mask (no jax arrays among its facts) is classified here and now, in NumPy, and its lists are as long as
    they need to be. A dynamic one is classified by jax, under `jax.jit` in the program; as values must not change
    shapes, the room in its lists is declared.

    Args:
      mask: a mask of `memjax.attention.masks`.
      S, T: numbers of queries and keys.
      blocks: (bq, bk); bq a multiple of 32 if the mask holds a table finer than blocks.
      rows: int32 ``[R]``: positions of the queries that are asked for, which then are the queries of the result; None
        for all S.
      columns: int32 ``[C]``: positions of the keys, alike.
      capacity: the most blocks that a list holds: one number for lists by query (lists by key then hold all), or one
        for each side; None leaves room for what a static mask needs and for all blocks of a dynamic one.
      overflow: what happens to blocks beyond the capacity. "error": values that are known raise, others make the
        results of queries that lost blocks NaN. "dense": there are none, as there is room for every block, and no
        capacity is taken. "drop_lowest": the blocks of highest ``scores`` are kept.
      scores: float ``[B|1, H|Hk|1, Nq, Nk]``, for "drop_lowest".

    Raises:
      ValueError: a list that is too short for what is known to be in it, an overflow policy without what it needs, bad
        sizes.
    """
    if len(blocks) != 2:
        raise ValueError(f"expected blocks (bq, bk), got {blocks!r}")
    sizes = (as_integer("blocks", "bq", blocks[0], 1), as_integer("blocks", "bk", blocks[1], 1))
    if overflow not in ("error", "dense", "drop_lowest"):
        raise ValueError(f"overflow must be 'error', 'dense' or 'drop_lowest', got {overflow!r}")
    if (overflow == "drop_lowest") != (scores is not None):
        raise ValueError("overflow='drop_lowest' needs scores, and nothing else takes them")
    if overflow == "dense" and capacity is not None:
        raise ValueError(f"overflow='dense' has room for every block and takes no capacity, got {capacity}")
    leaves = jax.tree.leaves(mask)
    facts = resolve(mask, S, T, rows, columns, xp=numpy_like(*leaves, rows, columns, scores))
    if scores is not None:
        facts = _widened(facts, np.shape(scores), sizes)
    full, visit = _classify(facts, sizes)
    limits = (full.shape[2], full.shape[3])
    exact = capacity is None and overflow != "dense" and facts.xp is np
    room = _counted(visit) if exact else _room(capacity, limits)
    lost = None
    if not exact and (room[0] < limits[1] or room[1] < limits[0]):
        kept = _limit(facts, visit, scores, room)
        if overflow == "error":
            lost = (visit & ~kept).any(-1)
            if not isinstance(lost, jax.core.Tracer) and bool(lost.any()):
                raise ValueError(f"{mask} needs lists of {_counted(visit)} blocks by query and by key, got {room}")
        full, visit = full & kept, kept
    return _build(facts, sizes, full, visit, room, lost if facts.xp is jnp else None)


def block_mask_in_program(
    mask: Mask, S: int, T: int, *, blocks: tuple[int, int] = (128, 128), rows: Array | None = None
) -> BlockMask:
    """Returns the lists of a mask, computed by jax: under `jax.jit` they are no constants of the program.

    Those of a static mask are as long as they must be, which is found in NumPy, once for a mask without arrays; those
    of a dynamic one, or of some rows, have room for all blocks.

    Args:
      mask, S, T, blocks, rows: as in `make_block_mask`.
    """
    leaves = jax.tree.leaves(mask)
    if rows is not None or any(isinstance(leaf, jax.Array) for leaf in leaves):
        return make_block_mask(mask, S, T, blocks=blocks, rows=rows)
    room = (_static_room if leaves else _cached_room)(mask, S, T, blocks)
    facts = resolve(mask, S, T, xp=jnp)
    return _build(facts, blocks, *_classify(facts, blocks), room, None)


def _static_room(mask: Mask, S: int, T: int, blocks: tuple[int, int]) -> tuple[int, int]:
    return _counted(_classify(resolve(mask, S, T), blocks)[1])


_cached_room = functools.lru_cache(maxsize=256)(_static_room)


def _classify(facts: Facts, blocks: tuple[int, int]) -> tuple[Array, Array]:
    """Returns which blocks are full and which are visited; the last block of keys is not full if keys end within."""
    full, visit = classify(facts, blocks)
    if facts.T % blocks[1]:
        full = full & (facts.xp.arange(full.shape[3]) < full.shape[3] - 1)
    return full, visit


def _counted(visit: Array) -> tuple[int, int]:
    by_query, by_key = (int(np.asarray(visit).sum(axis, dtype=np.int32).max()) for axis in (3, 2))
    return max(1, by_query), max(1, by_key)


def _room(capacity: int | tuple[int, int] | None, limits: tuple[int, int]) -> tuple[int, int]:
    Nq, Nk = limits
    asked = (Nk, Nq) if capacity is None else (capacity, Nq) if isinstance(capacity, int) else tuple(capacity)
    if len(asked) != 2:
        raise ValueError(f"capacity: expected a number of blocks, or one for each side, got {capacity!r}")
    by_query, by_key = (as_integer("capacity", "a number of blocks", n, 1) for n in asked)
    return min(by_query, Nk), min(by_key, Nq)


def _widened(facts: Facts, shape: tuple[int, ...], blocks: tuple[int, int]) -> Facts:
    """Returns the mask with a batch and heads for scores of this shape."""
    grid = -(-facts.S // blocks[0]), -(-facts.T // blocks[1])
    if len(shape) == 4 and shape[2:] == grid:
        batch, heads = max(facts.batch, shape[0]), max(facts.heads, shape[1])
        if {facts.batch, shape[0]} <= {1, batch} and heads % facts.heads == heads % shape[1] == 0:
            return facts._replace(batch=batch, heads=heads)
    raise ValueError(
        f"scores: expected [B|1, H|Hk|1, {grid[0]}, {grid[1]}] for a mask of batch {facts.batch} and heads "
        f"{facts.heads}, got {shape}"
    )


def _limit(facts: Facts, visit: Array, scores: Any, room: tuple[int, int]) -> Array:
    """Returns the blocks that fit: at most ``room[1]`` for each block of keys, then ``room[0]`` for each of queries."""
    xp = facts.xp
    if scores is not None:
        scores = xp.repeat(xp.asarray(scores), facts.heads // scores.shape[1], axis=1)
    for axis, most in ((2, room[1]), (3, room[0])):
        if most >= visit.shape[axis]:
            continue
        if scores is None:
            rank = xp.cumsum(visit, axis=axis, dtype=np.int32) - 1
        else:
            order = xp.argsort(-xp.where(visit, scores, -np.inf), axis=axis, stable=True)
            rank = xp.argsort(order, axis=axis, stable=True)
        visit = visit & (rank < most)
    return visit


def _build(
    facts: Facts, blocks: tuple[int, int], full: Array, visit: Array, room: tuple[int, int], lost: Array | None
) -> BlockMask:
    xp, flags, pointer, bits = facts.xp, None, None, None
    row_data = tuple(xp.broadcast_to(x, (*x.shape[:2], facts.S)) for x in facts.rows)
    column_data = tuple(xp.broadcast_to(x, (*x.shape[:2], facts.T)) for x in facts.columns)
    coarse = all(size[0] % blocks[0] == 0 and size[1] % blocks[1] == 0 for _, size in facts.tiles)
    if facts.tiles and coarse and len(facts.tiles) < 32:
        truths = tile_truths(facts, blocks)
        flags = sum(truth.sure.astype(np.int32) << i for i, truth in enumerate(truths))
        flags = xp.broadcast_to(flags, full.shape)
    elif facts.tiles:
        partial = visit & ~full
        most = math.prod(full.shape[:3]) * room[0]
        bits = _bits(facts, blocks, partial, most)
        pointer = xp.cumsum(partial.reshape(-1), dtype=np.int32).reshape(partial.shape) - 1
        pointer = xp.maximum(pointer, 0)
        row_data, column_data = (), ()
    grids = (full, visit, flags, pointer)
    turned = (None if grid is None else grid.swapaxes(2, 3) for grid in grids)
    by_query, by_key = _lists(xp, room[0], *grids), _lists(xp, room[1], *turned)
    elements = Elements(row_data, column_data, bits, facts.test if bits is None else None)
    return BlockMask(by_query, by_key, elements, lost, facts.S, facts.T, blocks)


def _lists(xp: ModuleType, room: int, full: Any, visit: Any, flags: Any, pointer: Any) -> BlockList:
    count, total = (grid.sum(-1, dtype=np.int32) for grid in (full, visit))
    index = _numpy_index(full, visit, count, room) if xp is np else _jax_index(full, visit, room)
    flags, pointer = (None if grid is None else xp.take_along_axis(grid, index, -1) for grid in (flags, pointer))
    return BlockList(index, count, total, flags, pointer)


def _jax_index(full: jax.Array, visit: jax.Array, room: int) -> jax.Array:
    n = full.shape[-1]
    column = jnp.arange(n, dtype=np.int32)
    return jnp.sort(jnp.where(full, column, jnp.where(visit, column + n, column + 2 * n)))[..., :room] % n


def _numpy_index(full: np.ndarray, visit: np.ndarray, count: np.ndarray, room: int) -> np.ndarray:
    slot = np.arange(room, dtype=np.int32)
    index = np.empty((*count.shape, room), np.int32)
    for b, h in itertools.product(*map(range, full.shape[:2])):
        whole, lists, after = full[b, h], index[b, h], count[b, h]
        begins = whole.copy(order="K")
        begins[:, 1:] &= ~whole[:, :-1]
        line, place = _places(begins)
        if (line[1:] > line[:-1]).all():  # what is full is one run in every list
            first = np.zeros((len(lists), 1), np.int32)
            first[line, 0] = place
            np.add(first, slot, out=lists)
            lists *= slot < after[:, None]
        else:
            lists[:] = 0
            _fill(lists, whole, np.zeros_like(after))
        _fill(lists, visit[b, h] ^ whole, after)
    return index


def _fill(lists: np.ndarray, grid: np.ndarray, start: np.ndarray) -> None:
    """Writes the places of what is true in each line of ``grid``, in order, into ``lists[line, start[line] :]``."""
    line, place = _places(grid)
    number = np.bincount(line, minlength=len(grid))
    before = np.cumsum(number) - number
    lists[line, np.arange(len(line)) - np.repeat(before - start, number)] = place


def _places(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns line and place of what is true in ``grid`` ``[N, n]``, by line, then by place."""
    if grid.flags.c_contiguous:
        return np.divmod(np.flatnonzero(grid), grid.shape[1])
    place, line = np.divmod(np.flatnonzero(grid.T), grid.shape[0])
    return np.divmod(np.sort(line * grid.shape[1] + place), grid.shape[1])


def _bits(facts: Facts, blocks: tuple[int, int], partial: Any, most: int) -> Array:
    """Returns the truth of the elements of partial blocks, uint32 ``[n, bq / 32, bk]``, in the order of blocks."""
    if blocks[0] % 32:
        raise ValueError(f"a mask with a table finer than blocks needs bq a multiple of 32, got blocks {blocks}")
    xp, step = facts.xp, max(1, _ELEMENTS // math.prod(blocks))

    def pack(where: tuple[Any, ...]) -> Any:
        truth = evaluate(facts, blocks, where).reshape(-1, blocks[0] // 32, 32, blocks[1])
        return (truth.astype(np.uint32) << xp.arange(32, dtype=np.uint32)[:, None]).sum(2, dtype=np.uint32)

    if xp is np:
        where = np.nonzero(partial)
        parts = [pack(tuple(x[i : i + step] for x in where)) for i in range(0, max(1, len(where[0])), step)]
        return np.concatenate(parts) if len(where[0]) else np.zeros((1, blocks[0] // 32, blocks[1]), np.uint32)
    where = jnp.nonzero(partial, size=most, fill_value=0)
    return jax.lax.map(lambda one: pack(tuple(x[None] for x in one))[0], where, batch_size=min(step, most))
