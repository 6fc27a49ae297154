"""Attention masks as expressions: constructors, joined by ``&``, ``|``, ``^`` and ``~``.

A mask's rule is written once, with ordinary operators. On integer arrays it says which elements are true; on intervals
(`memjax.attention.intervals`) it says which blocks are empty, full or neither, without a look at their elements.

Queries stand at the end of the keys: with S queries and T keys, query q and key ``q + T - S`` are the same token, and
distances are measured between tokens. Facts about queries ``[B, S]`` may be given as ``[S]`` for all of a batch, and as
``[B|1, H|Hk|1, S]`` where heads differ; facts about keys alike. NumPy arrays make a static mask, of which blocks are
classified once, in NumPy; jax arrays make a dynamic one, which is classified in the program.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.attention.expression import Array, At, Columns, Leaf, Mask, Tree, as_int32, as_integer
from memjax.attention.intervals import Interval, as_truth


def full() -> Mask:
    """Returns the mask that shows every key."""
    return Leaf(_full)


def _full(at: At) -> Any:
    return at.k >= 0


def causal(offset: Any = 0) -> Mask:
    """Returns the mask of keys up to the query's own token, or ``offset`` tokens further.

    Args:
      offset: an integer, or int32 ``[]``, ``[B]`` or ``[B, H]``, which may be traced.
    """
    if isinstance(offset, int | np.integer):
        return Leaf(_causal, (as_integer("causal", "offset", offset, None),))
    return Leaf(_causal, (None,), rows=(_constants("causal", offset),))


def _causal(at: At, offset: int | None) -> Any:
    return at.k <= at.token + (at.rows[0] if offset is None else offset)


def window(left: int | None, right: int | None) -> Mask:
    """Returns the mask of keys from ``left`` tokens before the query's own to ``right`` after it.

    Args:
      left, right: integers, None for no limit. A negative one leaves out what is near: ``window(7, -4)`` shows the
        four diagonals at distances 4 to 7.

    Raises:
      ValueError: limits between which there is no key.
    """
    for limit in (left, right):
        if limit is not None:
            as_integer("window", "a limit", limit, None)
    if left is not None and right is not None and left + right < 0:
        raise ValueError(f"window(left={left}, right={right}) has no key: left + right must not be negative")
    return Leaf(_window, (left, right))


def _window(at: At, left: int | None, right: int | None) -> Any:
    shown = _full(at) if left is None else at.token - left <= at.k
    return shown if right is None else shown & (at.k <= at.token + right)


def sink(n: int) -> Mask:
    """Returns the mask of the first n keys (StreamingLLM's attention sinks, 2023)."""
    return Leaf(_sink, (as_integer("sink", "n", n, 0),))


def _sink(at: At, n: int) -> Any:
    return at.k < n


def prefix(n: Any) -> Mask:
    """Returns the mask of a prefix of the keys, of a length per example (prefix-LM: ``prefix(n) | causal()``).

    Args:
      n: an integer, or int32 ``[B]`` or ``[B, H]``.
    """
    return sink(int(n)) if isinstance(n, int | np.integer) else Leaf(_prefix, rows=(_constants("prefix", n),))


def _prefix(at: At) -> Any:
    return at.k < at.rows[0]


def segments(q_segments: Any, k_segments: Any = None) -> Mask:
    """Returns the mask of keys in the query's segment (packed documents); blocks are skipped where ids are sorted.

    Args:
      q_segments: int32 ``[B, S]``; ``[S]`` for all of a batch.
      k_segments: int32 ``[B, T]`` or ``[T]``; None takes ``q_segments``, for S = T.
    """
    rows = _facts("segments", q_segments)
    return Leaf(_segments, rows=(rows,), columns=(rows if k_segments is None else _facts("segments", k_segments),))


def _segments(at: At) -> Any:
    return at.rows[0] == at.columns[0]


def lengths(q_lengths: Any = None, k_lengths: Any = None) -> Mask:
    """Returns the mask of what is not padding: queries below ``q_lengths`` and keys below ``k_lengths``.

    Args:
      q_lengths, k_lengths: int32 ``[B]`` or ``[B, H]``; None for no padding on that side.

    Raises:
      ValueError: neither given.
    """
    given = tuple(x for x in (q_lengths, k_lengths) if x is not None)
    if not given:
        raise ValueError("lengths() needs q_lengths, k_lengths or both")
    rows = tuple(_constants("lengths", x) for x in given)
    return Leaf(_lengths, (q_lengths is not None, k_lengths is not None), rows=rows)


def _lengths(at: At, queries: bool, keys: bool) -> Any:
    shown = at.q < at.rows[0] if queries else _full(at)
    return shown & (at.k < at.rows[-1]) if keys else shown


def chunked(size: int) -> Mask:
    """Returns the mask of keys in the query's chunk of ``size`` tokens."""
    return Leaf(_chunked, (as_integer("chunked", "size", size, 1),))


def _chunked(at: At, size: int) -> Any:
    return at.token // size == at.k // size


def dilated(stride: int, window: int | None = None) -> Mask:
    """Returns the mask of keys whose distance is a multiple of ``stride``, and at most ``window`` to either side."""
    as_integer("dilated", "stride", stride, 1)
    if window is not None:
        as_integer("dilated", "window", window, 0)
    return Leaf(_dilated, (stride, window))


def _dilated(at: At, stride: int, window: int | None) -> Any:
    return _window(at, window, window) & ((at.token - at.k) % stride == 0)


def strided_global(every: int) -> Mask:
    """Returns the mask of every key whose position is a multiple of ``every``."""
    return Leaf(_strided_global, (as_integer("strided_global", "every", every, 1),))


def _strided_global(at: At, every: int) -> Any:
    return at.k % every == 0


def neighborhood_nd(shape: Sequence[int], kernel: int | Sequence[int]) -> Mask:
    """Returns the mask of keys within a box around the query, for tokens that are the cells of a grid, row-major.

    At the border the box is cut off.

    Args:
      shape: the grid; S = T = its product.
      kernel: odd edge lengths of the box, one for all axes or one each.

    Raises:
      ValueError: an even edge, or another number of edges than of axes.
    """
    shape = tuple(as_integer("neighborhood_nd", "an axis", n, 1) for n in shape)
    edges = (kernel,) * len(shape) if isinstance(kernel, int | np.integer) else tuple(kernel)
    if (
        not shape
        or len(edges) != len(shape)
        or any(as_integer("neighborhood_nd", "an edge", n, 1) % 2 == 0 for n in edges)
    ):
        raise ValueError(f"neighborhood_nd: expected one odd edge per axis of {shape}, got {edges}")
    return Leaf(_neighborhood_nd, (shape, tuple(int(n) // 2 for n in edges)))


def _neighborhood_nd(at: At, shape: tuple[int, ...], reach: tuple[int, ...]) -> Any:
    if at.sizes != (math.prod(shape),) * 2:
        raise ValueError(f"neighborhood_nd: a grid {shape} needs S = T = {math.prod(shape)}, got {at.sizes}")
    near, stride = [], 1
    for n, r in zip(reversed(shape), reversed(reach)):
        q, k = at.q // stride % n, at.k // stride % n
        near += [q - r <= k, k <= q + r]
        stride *= n
    return functools.reduce(operator.and_, near)


def blocks(selected: Any, size: int | tuple[int, int]) -> Mask:
    """Returns the mask of selected blocks.

    Where ``size`` is a multiple of the blocks of `make_block_mask`, kernels read a flag per block; otherwise the
    truth of every element of partial blocks is stored, a bit each.

    Args:
      selected: bool ``[B|1, H|Hk|1, ceil(S / bq), ceil(T / bk)]``, or its last two axes alone.
      size: (bq, bk), or one number for both.
    """
    pair = (size, size) if isinstance(size, int | np.integer) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"blocks: expected a size (bq, bk), got {size!r}")
    bq, bk = (as_integer("blocks", "a size", n, 1) for n in pair)
    return Leaf(_selected, selected=(_table("blocks", selected),), size=(bq, bk))


def array(table: Any) -> Mask:
    """Returns the mask that a table spells out, bool ``[B|1, H|Hk|1, S, T]`` or ``[S, T]``."""
    return Leaf(_selected, selected=(_table("array", table),))


def _selected(at: At) -> Any:
    return at.tiles[0]


def columns(keys: Any) -> Mask:
    """Returns the mask of a set of keys.

    Args:
      keys: int32 ``[n]``, ``[B, n]`` or ``[B|1, H|Hk|1, n]``; numbers out of range, such as -1, name no key.
    """
    return Columns(_columns, keys=_facts("columns", keys))


def _columns(at: At) -> Any:
    return at.columns[0] == 1


def tree(parents: Any) -> Mask:
    """Returns the mask of the query's own token and its ancestors; the queries are the last S of T tokens.

    Each token is numbered in depth-first order, so that its descendants are those numbered from its own number on.

    Args:
      parents: int32 ``[T]`` or ``[B, T]``, each before its child; -1 for a root.

    Raises:
      ValueError: a parent that does not come before its child, where values are known.
    """
    known = _facts("tree", parents)
    if isinstance(known, np.ndarray):
        if (known < -1).any() or (known >= np.arange(known.shape[-1])).any():
            raise ValueError("tree: a parent must be -1 or come before its child")
        with jax.ensure_compile_time_eval():
            enter, leave = (np.asarray(part) for part in _depth_first(known))
    else:
        enter, leave = _depth_first(known)
    return Tree(_tree, rows=(enter,), columns=(enter, leave))


def _tree(at: At) -> Any:
    return (at.columns[0] <= at.rows[0]) & (at.rows[0] < at.columns[1])


@jax.jit
def _depth_first(parents: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the number of each token in depth-first order and the first number past its descendants."""
    T = parents.shape[-1]
    flat = jnp.asarray(parents).reshape(-1, T)
    above = jnp.where(flat < 0, T, flat)  # roots hang from one more node
    each = jnp.arange(flat.shape[0])

    def grow(i: jax.Array, sizes: jax.Array) -> jax.Array:
        i = T - 1 - i
        return sizes.at[each, above[:, i]].add(sizes[:, i])

    def number(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enter, free = state
        at = free[each, above[:, i]]
        free = free.at[each, above[:, i]].add(sizes[:, i])
        return enter.at[:, i].set(at), free.at[:, i].set(at + 1)

    zeros = jnp.zeros((flat.shape[0], T + 1), jnp.int32)
    sizes = lax.fori_loop(0, T, grow, zeros + 1)
    enter, _ = lax.fori_loop(0, T, number, (zeros, zeros))
    enter, sizes = enter[:, :T].reshape(parents.shape), sizes[:, :T].reshape(parents.shape)
    return enter, enter + sizes


def predicate(rule: Callable[..., Any], q_data: Sequence[Any] = (), k_data: Sequence[Any] = ()) -> Mask:
    """Returns the mask of a rule of the user's own; which blocks it skips follows from the rule.

    Args:
      rule: ``(q, k, *facts about q, *facts about k) -> bool``, made of ``+ - *``, ``abs``, comparisons, ``& | ^ ~``,
        and ``//`` and ``%`` by positive constants, which see int32 arrays that broadcast, or intervals. Two masks are
        the same to a compiled program if their rules are the same object.
      q_data: int32 ``[B, S]`` each.
      k_data: int32 ``[B, T]`` each.
    """
    if not callable(rule):
        raise TypeError(f"predicate: expected a function of (q, k, ...), got {rule!r}")
    rows, cols = (tuple(_facts("predicate", x) for x in data) for data in (q_data, k_data))
    return Leaf(_predicate, (rule,), rows=rows, columns=cols)


def _predicate(at: At, rule: Callable[..., Any]) -> Any:
    if not isinstance(at.q, Interval):
        return rule(at.q, at.k, *at.rows, *at.columns)
    try:
        return as_truth(rule(at.q, at.k, *at.rows, *at.columns))
    except TypeError as error:
        raise TypeError(f"predicate: a rule may use + - * abs // % comparisons & | ^ ~ alone: {error}") from error


def heads(masks: Sequence[Mask], which: Any = None) -> Mask:
    """Returns the mask that is ``masks[which[h]]`` for head h.

    Args:
      masks: few: the elements of a partial block are tested by all.
      which: int32 ``[H]`` or ``[Hk]``, which may be traced; None gives mask h to head h.

    Raises:
      ValueError: no masks, or numbers that name none, where values are known.
    """
    if not masks:
        raise ValueError("heads: expected at least one mask")
    chosen = _facts("heads", np.arange(len(masks)) if which is None else which).reshape(1, -1, 1)
    if isinstance(chosen, np.ndarray) and not ((chosen >= 0) & (chosen < len(masks))).all():
        raise ValueError(f"heads: which must name masks 0 to {len(masks) - 1}, got {chosen.ravel().tolist()}")
    return functools.reduce(operator.or_, (Leaf(_head, (i,), rows=(chosen,)) & m for i, m in enumerate(masks)))


def _head(at: At, number: int) -> Any:
    return at.rows[0] == number


def _facts(name: str, value: Any) -> Array:
    data = as_int32(name, value)
    if data.ndim not in (1, 2, 3):
        raise ValueError(f"{name}: expected facts [n], [B, n] or [B|1, H|Hk|1, n], got shape {data.shape}")
    shape = (1, *data.shape) if data.ndim == 1 else data.shape
    return data.reshape(shape[0], shape[1] if len(shape) == 3 else 1, shape[-1])


def _constants(name: str, value: Any) -> Array:
    data = as_int32(name, value)
    if data.ndim > 2:
        raise ValueError(f"{name}: expected one number, [B] or [B, H], got shape {data.shape}")
    return data.reshape(*data.shape, *(1,) * (3 - data.ndim))


def _table(name: str, value: Any) -> Array:
    table = value if isinstance(value, jax.Array) else np.asarray(value)
    if table.dtype != np.bool_:
        raise TypeError(f"{name}: expected bool, got {table.dtype}")
    if table.ndim not in (2, 4):
        raise ValueError(f"{name}: expected [rows, columns] or [B|1, H|Hk|1, rows, columns], got shape {table.shape}")
    return table.reshape(*(1,) * (4 - table.ndim), *table.shape)
