"""What a mask is: a tree of rules and of facts about queries, keys and rectangles; and how it is evaluated."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.attention.intervals import Interval, Truth, as_truth, numpy_like

Array = jax.Array | np.ndarray

_TABLE_BYTES = 2**22
"""Elements of blocks that are evaluated at once, on the host."""


class Tiles(NamedTuple):
    """Truths of rectangles of elements.

    Attributes:
      selected: bool ``[B|1, H|Hk|1, ceil(S / size[0]), ceil(T / size[1])]``.
      size: queries and keys of a rectangle.
    """

    selected: Array
    size: tuple[int, int]


class At(NamedTuple):
    """Where a rule is evaluated: at elements (integer arrays) or over blocks (intervals).

    Attributes:
      q, k: positions of queries and keys.
      rows, columns: facts about them.
      tiles: truths of rectangles, there.
      sizes: (S, T).
    """

    q: Any
    k: Any
    rows: tuple[Any, ...]
    columns: tuple[Any, ...]
    tiles: tuple[Any, ...]
    sizes: tuple[int, int]

    @property
    def token(self) -> Any:
        """The key that is the same token as the query."""
        return self.q + (self.sizes[1] - self.sizes[0])


class Mask(abc.ABC):
    """Which keys a query sees; a pytree whose leaves are facts about queries, keys and rectangles."""

    @abc.abstractmethod
    def counts(self) -> tuple[int, int, int]:
        """Returns how many facts about queries, facts about keys and tiles the mask reads."""

    @abc.abstractmethod
    def row_data(self, S: int, T: int) -> tuple[Array, ...]:
        """Returns facts about queries, int32 ``[B|1, H|Hk|1, S|1]`` each."""

    @abc.abstractmethod
    def column_data(self, S: int, T: int) -> tuple[Array, ...]:
        """Returns facts about keys, int32 ``[B|1, H|Hk|1, T|1]`` each."""

    @abc.abstractmethod
    def tile_data(self, S: int, T: int) -> tuple[Tiles, ...]:
        """Returns truths of rectangles."""

    @abc.abstractmethod
    def test(self, at: At) -> Any:
        """Returns the truth at elements, or a `Truth` of blocks, that broadcasts to them."""

    def __and__(self, other: Mask) -> Mask:
        return _join(operator.and_, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _join(operator.or_, self, other)

    def __xor__(self, other: Mask) -> Mask:
        return _join(operator.xor, self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask is neither true nor false: join masks by & | ~ ^, not by and, or, not")

    def table(self, S: int, T: int) -> Array:
        """Returns the truth of every element, bool ``[B|1, H|Hk|1, S, T]``: for tests and small sizes."""
        facts = resolve(self, S, T)
        b, h = (part.reshape(-1) for part in np.indices((facts.batch, facts.heads)))
        return evaluate(facts, (S, T), (b, h, 0 * b, 0 * b)).reshape(facts.batch, facts.heads, S, T)

    def density(self, S: int, T: int) -> float:
        """Returns the fraction of elements that are true; looks at the elements of blocks that are neither empty nor
        full."""
        facts, blocks = resolve(self, S, T), (min(S, 128), min(T, 128))
        full, visit = (np.asarray(part) for part in classify(facts, blocks))
        heights, widths = (np.diff([*range(0, n, block), n]) for n, block in zip((S, T), blocks))
        true = int((full * heights[:, None] * widths).sum())
        partial = np.nonzero(visit & ~full)
        step = max(1, _TABLE_BYTES // math.prod(blocks))
        for start in range(0, len(partial[0]), step):
            some = tuple(part[start : start + step] for part in partial)
            true += int(np.asarray(evaluate(facts, blocks, some)).sum())
        return true / (facts.batch * facts.heads * S * T)

    def keys_seen(self, S: int, T: int) -> jax.Array:
        """Returns how many keys each query sees, int32 ``[B|1, H|Hk|1, S]``; under `jax.jit` in the program.

        Every element is looked at, those of some rows at a time.
        """
        facts, rows = resolve(self, S, T, xp=jnp), min(S, 128)
        b, h = (part.reshape(-1) for part in np.indices((facts.batch, facts.heads)))

        def count(i: jax.Array) -> jax.Array:
            return jnp.sum(evaluate(facts, (rows, T), (b, h, i + 0 * b, 0 * b)), -1, dtype=jnp.int32)

        counts = jax.lax.map(count, jnp.arange(-(-S // rows), dtype=jnp.int32))
        return jnp.moveaxis(counts, 0, 1).reshape(facts.batch, facts.heads, -1)[..., :S]

    def show(self, S: int, T: int, *, batch: int = 0, head: int = 0) -> str:
        """Returns a picture of at most 64 columns: ``█`` all true, ``▒`` some, ``·`` none (as far as blocks tell)."""
        picture = self._picture(S, T, batch, head)
        return "\n".join("".join("·▒█"[part] for part in line) for line in picture)

    def draw(self, S: int, T: int, ax: Any = None, *, batch: int = 0, head: int = 0) -> Any:
        """Draws `show` on matplotlib axes, new ones if None, and returns them."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        picture = self._picture(S, T, batch, head)
        ax.imshow(picture, vmin=0, vmax=2, cmap="Blues", extent=(0, T, S, 0), interpolation="nearest")
        ax.set(xlabel="key", ylabel="query")
        return ax

    def _picture(self, S: int, T: int, batch: int, head: int) -> np.ndarray:
        facts = resolve(self, S, T)
        full, visit = classify(facts, (-(-S // 64), -(-T // 64)))
        grid = np.asarray(full).astype(int) + np.asarray(visit)
        if not (0 <= batch < facts.batch and 0 <= head < facts.heads):
            raise ValueError(f"the mask has {facts.batch} batch entries and {facts.heads} heads, got {batch}, {head}")
        return grid[batch, head]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "columns", "selected"],
    meta_fields=["rule", "settings", "size"],
)
@dataclasses.dataclass(frozen=True)
class Leaf(Mask):
    """A mask with a rule of its own.

    Attributes:
      rule: ``(at, *settings) -> truth``.
      settings: static arguments of the rule.
      rows: int32 ``[B|1, H|Hk|1, S|1]`` each.
      columns: int32 ``[B|1, H|Hk|1, T|1]`` each.
      selected: bool ``[B|1, H|Hk|1, ceil(S / size[0]), ceil(T / size[1])]`` each.
      size: queries and keys of a rectangle of ``selected``.
    """

    rule: Callable[..., Any]
    settings: tuple[Any, ...] = ()
    rows: tuple[Array, ...] = ()
    columns: tuple[Array, ...] = ()
    selected: tuple[Array, ...] = ()
    size: tuple[int, int] = (1, 1)

    def counts(self) -> tuple[int, int, int]:
        return len(self.rows), len(self.columns), len(self.selected)

    def row_data(self, S: int, T: int) -> tuple[Array, ...]:
        return tuple(self._sized(row, S, "queries") for row in self.rows)

    def column_data(self, S: int, T: int) -> tuple[Array, ...]:
        return tuple(self._sized(column, T, "keys") for column in self.columns)

    def tile_data(self, S: int, T: int) -> tuple[Tiles, ...]:
        expected = -(-S // self.size[0]), -(-T // self.size[1])
        for selected in self.selected:
            if selected.shape[2:] != expected:
                raise ValueError(f"{self}: expected {expected} blocks for S={S}, T={T}, got {selected.shape[2:]}")
        return tuple(Tiles(selected, self.size) for selected in self.selected)

    def _sized(self, data: Array, n: int, what: str) -> Array:
        if data.shape[-1] not in (1, n):
            raise ValueError(f"{self}: expected facts about {n} {what}, got {data.shape[-1]}")
        return data

    def test(self, at: At) -> Any:
        return self.rule(at, *self.settings)

    def __repr__(self) -> str:
        return f"{self.rule.__name__.lstrip('_')}({', '.join(map(repr, self.settings))})"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "columns", "selected", "keys"],
    meta_fields=["rule", "settings", "size"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Columns(Leaf):
    """A mask of open keys.

    Attributes:
      keys: int32 ``[B|1, H|Hk|1, n]``: their numbers; those out of range name no key.
    """

    keys: Any = None

    def counts(self) -> tuple[int, int, int]:
        return 0, 1, 0

    def column_data(self, S: int, T: int) -> tuple[Array, ...]:
        batch, heads = self.keys.shape[:2]
        at = tuple(part[..., None] for part in np.indices((batch, heads)))
        keys = numpy_like(self.keys).where((self.keys >= 0) & (self.keys < T), self.keys, T)
        if isinstance(keys, np.ndarray):
            table = np.zeros((batch, heads, T + 1), np.int32)
            table[(*at, keys)] = 1
            return (table[..., :T],)
        return (jnp.zeros((batch, heads, T), jnp.int32).at[(*at, keys)].set(1, mode="drop"),)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "columns", "selected"],
    meta_fields=["rule", "settings", "size"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Tree(Leaf):
    """A mask whose facts about tokens are facts about keys, and about queries, which are the last tokens."""

    def row_data(self, S: int, T: int) -> tuple[Array, ...]:
        if S > T:
            raise ValueError(f"{self}: the queries are the last tokens, got S={S} of T={T}")
        return tuple(self._sized(row, T, "tokens")[..., T - S :] for row in self.rows)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=["operation"])
@dataclasses.dataclass(frozen=True)
class Join(Mask):
    """Two masks joined by ``&``, ``|`` or ``^``.

    Attributes:
      operation: `operator.and_`, `operator.or_` or `operator.xor`.
      left, right: masks.
    """

    operation: Callable[[Any, Any], Any]
    left: Mask
    right: Mask

    def counts(self) -> tuple[int, int, int]:
        (a, b, c), (d, e, f) = self.left.counts(), self.right.counts()
        return a + d, b + e, c + f

    def row_data(self, S: int, T: int) -> tuple[Array, ...]:
        return self.left.row_data(S, T) + self.right.row_data(S, T)

    def column_data(self, S: int, T: int) -> tuple[Array, ...]:
        return self.left.column_data(S, T) + self.right.column_data(S, T)

    def tile_data(self, S: int, T: int) -> tuple[Tiles, ...]:
        return self.left.tile_data(S, T) + self.right.tile_data(S, T)

    def test(self, at: At) -> Any:
        r, c, t = self.left.counts()
        left = at._replace(rows=at.rows[:r], columns=at.columns[:c], tiles=at.tiles[:t])
        right = at._replace(rows=at.rows[r:], columns=at.columns[c:], tiles=at.tiles[t:])
        return self.operation(self.left.test(left), self.right.test(right))

    def __repr__(self) -> str:
        sign = {"and_": "&", "or_": "|", "xor": "^"}[self.operation.__name__]
        return f"({self.left} {sign} {self.right})"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """What a mask leaves out."""

    mask: Mask

    def counts(self) -> tuple[int, int, int]:
        return self.mask.counts()

    def row_data(self, S: int, T: int) -> tuple[Array, ...]:
        return self.mask.row_data(S, T)

    def column_data(self, S: int, T: int) -> tuple[Array, ...]:
        return self.mask.column_data(S, T)

    def tile_data(self, S: int, T: int) -> tuple[Tiles, ...]:
        return self.mask.tile_data(S, T)

    def test(self, at: At) -> Any:
        return ~self.mask.test(at)

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        return f"~{self.mask}"


def _join(operation: Callable[[Any, Any], Any], left: Mask, right: Mask) -> Mask:
    if not isinstance(right, Mask):
        raise TypeError(f"a mask is joined with a mask, got {type(right).__name__}")
    return Join(operation, left, right)


@dataclasses.dataclass(frozen=True)
class ElementTest:
    """What `Elements.test` is: the rule of a mask without its facts, equal for masks that differ in facts alone.

    Attributes:
      structure: the mask's tree structure.
      sizes: (S, T) of the whole attention.
      subset: whether queries, and keys, are a subset; their positions are then the first fact about them.
    """

    structure: Any
    sizes: tuple[int, int]
    subset: tuple[bool, bool]

    def __call__(self, q: Any, k: Any, rows: tuple[Any, ...], columns: tuple[Any, ...], flags: Any = None) -> Any:
        n = self._mask().counts()[2]
        return self.truth(q, k, rows, columns, tuple((flags >> i) & 1 == 1 for i in range(n)))

    def truth(self, q: Any, k: Any, rows: tuple[Any, ...], columns: tuple[Any, ...], tiles: tuple[Any, ...]) -> Any:
        """Returns the truth of elements or blocks, given that of the mask's tiles."""
        if self.subset[0]:
            q, *rows = rows  # type: ignore[assignment]
        if self.subset[1]:
            k, *columns = columns  # type: ignore[assignment]
        return self._mask().test(At(q, k, tuple(rows), tuple(columns), tiles, self.sizes))

    def _mask(self) -> Mask:
        return jax.tree.unflatten(self.structure, [None] * self.structure.num_leaves)


class Facts(NamedTuple):
    """A mask at one size, with the facts it reads.

    Attributes:
      test: its rule.
      rows: int32 ``[B|1, H|Hk|1, S|1]`` each.
      columns: int32 ``[B|1, H|Hk|1, T|1]`` each.
      tiles: truths of rectangles.
      S, T: numbers of queries and keys.
      batch, heads: batch entries and heads that differ.
      xp: `numpy` or `jax.numpy`.
    """

    test: ElementTest
    rows: tuple[Array, ...]
    columns: tuple[Array, ...]
    tiles: tuple[Tiles, ...]
    S: int
    T: int
    batch: int
    heads: int
    xp: ModuleType


def resolve(
    mask: Mask, S: int, T: int, rows: Any = None, columns: Any = None, *, xp: ModuleType | None = None
) -> Facts:
    """Returns a mask at S queries and T keys.

    Args:
      mask: a mask.
      S, T: sizes of the whole attention.
      rows, columns: int32 ``[R]`` and ``[C]``: positions of the queries and of the keys that are asked for; None for
        all.
      xp: `numpy` or `jax.numpy`; None takes NumPy where no fact is a jax array.

    Raises:
      TypeError: something else than a mask.
      ValueError: sizes below 1, facts of other sizes, batches or heads that do not fit each other.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"expected a mask of memjax.attention.masks, got {type(mask).__name__}")
    S, T = as_integer("mask", "S", S, 1), as_integer("mask", "T", T, 1)
    leaves, structure = jax.tree.flatten(mask)
    xp = xp or numpy_like(*leaves, rows, columns)
    facts, of_keys = (tuple(map(xp.asarray, part)) for part in (mask.row_data(S, T), mask.column_data(S, T)))
    tiles = tuple(Tiles(xp.asarray(x), size) for x, size in mask.tile_data(S, T))
    if rows is not None:
        rows = xp.asarray(_positions("rows", rows, f"S={S}", S))
        facts = _taken(facts, rows)
        tiles = tuple(Tiles(x[..., rows // size[0], :], (1, size[1])) for x, size in tiles)
    if columns is not None:
        columns = xp.asarray(_positions("columns", columns, f"T={T}", T))
        of_keys = _taken(of_keys, columns)
        tiles = tuple(Tiles(x[..., columns // size[1]], (size[0], 1)) for x, size in tiles)
    shapes = [x.shape for x in (*facts, *of_keys)] + [x.shape for x, _ in tiles]
    batch, heads = (max([1, *(shape[axis] for shape in shapes)]) for axis in (0, 1))
    if any(shape[0] not in (1, batch) or heads % shape[1] for shape in shapes):
        raise ValueError(f"facts of a mask differ in batch or heads: {sorted({shape[:2] for shape in shapes})}")
    test = ElementTest(structure, (S, T), (rows is not None, columns is not None))
    queries, keys = (n if some is None else len(some) for n, some in ((S, rows), (T, columns)))
    return Facts(test, facts, of_keys, tiles, queries, keys, batch, heads, xp)


def _positions(name: str, value: Any, limit: str, n: int) -> Array:
    positions = as_int32(name, value)
    if positions.ndim != 1 or not positions.size:
        raise ValueError(f"{name}: expected positions [R], got shape {positions.shape}")
    if isinstance(positions, np.ndarray) and not ((positions >= 0) & (positions < n)).all():
        raise ValueError(f"{name}: expected positions below {limit}, got {positions.tolist()}")
    return positions


def _taken(facts: tuple[Array, ...], positions: Array) -> tuple[Array, ...]:
    """Returns facts about some queries or keys, their positions first."""
    return positions[None, None], *(x if x.shape[-1] == 1 else x[..., positions] for x in facts)


def classify(facts: Facts, blocks: tuple[int, int]) -> tuple[Array, Array]:
    """Returns which blocks are true throughout and which may hold a true element, bool ``[Bm, Hm, Nq, Nk]`` each."""
    xp, shape = facts.xp, (facts.batch, facts.heads, -(-facts.S // blocks[0]), -(-facts.T // blocks[1]))

    def positions(axis: int, n: int) -> Interval:
        start = xp.arange(shape[axis], dtype=np.int32) * blocks[axis - 2]
        start = start.reshape(-1, 1) if axis == 2 else start
        return Interval(start, xp.minimum(start + (blocks[axis - 2] - 1), n - 1))

    def bounds(axis: int, data: Array) -> Interval:
        data = _spread_heads(xp, data, facts.heads)
        if data.shape[-1] > 1:
            rest = shape[axis] * blocks[axis - 2] - data.shape[-1]
            data = xp.pad(data, ((0, 0), (0, 0), (0, rest)), mode="edge") if rest else data
            data = data.reshape(*data.shape[:2], shape[axis], blocks[axis - 2])
        else:
            data = data[..., None]
        lo, hi = data.min(-1), data.max(-1)
        return Interval(lo[..., None], hi[..., None]) if axis == 2 else Interval(lo[:, :, None], hi[:, :, None])

    truth = as_truth(
        facts.test.truth(
            positions(2, facts.S),
            positions(3, facts.T),
            tuple(bounds(2, x) for x in facts.rows),
            tuple(bounds(3, x) for x in facts.columns),
            tile_truths(facts, blocks),
        )
    )
    return xp.broadcast_to(truth.sure, shape), xp.broadcast_to(truth.maybe, shape)


def tile_truths(facts: Facts, blocks: tuple[int, int]) -> tuple[Truth, ...]:
    """Returns what is known of each of the mask's tables over blocks, ``[B|1, H|1, Nq, Nk]`` each."""
    truths = []
    for tiles in facts.tiles:
        sure = maybe = _spread_heads(facts.xp, tiles.selected, facts.heads)
        for axis, n in ((3, facts.T), (2, facts.S)):
            size, block = tiles.size[axis - 2], blocks[axis - 2]
            sure = _reduce(facts.xp, sure, axis, n, size, block, every=True)
            maybe = _reduce(facts.xp, maybe, axis, n, size, block, every=False)
        truths.append(Truth(sure, maybe))
    return tuple(truths)


def _spread_heads(xp: ModuleType, x: Array, heads: int) -> Array:
    return x if x.shape[1] in (1, heads) else xp.repeat(x, heads // x.shape[1], axis=1)


def _reduce(xp: ModuleType, x: Array, axis: int, n: int, size: int, block: int, every: bool) -> Array:
    """Returns whether every or any of n elements, given in tiles of ``size``, is true, for each block of ``block``."""
    common = math.gcd(size, block)
    parts, blocks = -(-n // common), -(-n // block)
    if size > common:
        x = xp.repeat(x, size // common, axis=axis)
        x = x[:, :, :parts] if axis == 2 else x[..., :parts]
    if block == common:
        return x
    rest = blocks * (block // common) - parts
    if rest:
        x = xp.pad(x, [(0, rest if i == axis else 0) for i in range(4)], constant_values=every)
    x = x.reshape(*x.shape[:axis], blocks, block // common, *x.shape[axis + 1 :])
    return x.all(axis + 1) if every else x.any(axis + 1)


def evaluate(facts: Facts, blocks: tuple[int, int], where: Sequence[Array]) -> Array:
    """Returns the truth of every element of n blocks, false beyond S and T.

    Args:
      facts: the mask.
      blocks: (bq, bk).
      where: batch entry, head, and numbers of the block along queries and keys, int ``[n]`` each.

    Returns:
      bool ``[n, bq, bk]``.
    """
    xp = facts.xp
    b, h, i, j = (part[:, None, None] for part in where)
    q = i * blocks[0] + xp.arange(blocks[0], dtype=np.int32)[:, None]
    k = j * blocks[1] + xp.arange(blocks[1], dtype=np.int32)
    inside = (q < facts.S) & (k < facts.T)
    q, k = xp.minimum(q, facts.S - 1), xp.minimum(k, facts.T - 1)

    def at(x: Array, *positions: Array) -> Array:
        index = (b if x.shape[0] > 1 else 0 * b, h * x.shape[1] // facts.heads)
        return x[(*index, *(p if n > 1 else 0 * p for p, n in zip(positions, x.shape[2:])))]

    truth = facts.test.truth(
        q,
        k,
        tuple(at(x, q) for x in facts.rows),
        tuple(at(x, k) for x in facts.columns),
        tuple(at(x, q // size[0], k // size[1]) for x, size in facts.tiles),
    )
    return truth & inside


def as_integer(name: str, what: str, value: Any, least: int | None) -> int:
    """Returns an integer that is at least ``least`` and leaves int32 room for sums, or says what came instead."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: {what} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: {what} must be at least {least}, got {value}")
    if not -(2**30) < value < 2**30:
        raise ValueError(f"{name}: {what} must be below 2**30, as positions are int32, got {value}")
    return int(value)


def as_int32(name: str, value: Any) -> Array:
    """Returns integers or bools as int32, a jax array where one came, else a NumPy array."""
    data = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(data.dtype, jnp.integer) and data.dtype != np.bool_:
        raise TypeError(f"{name}: expected integers, got {data.dtype}")
    return data.astype(np.int32)
