"""Which blocks of keys matter to which queries: pooled scores, and selections of them that masks are made of.

A selection is hard: no gradient flows to what it is made from. Scores of means are those of MInference (2024),
SpargeAttn (2025) and MoBA (2025).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.attention import masks
from memjax.attention.attend import default_blocks
from memjax.attention.expression import At, Leaf, Mask, as_integer, classify, resolve

_ROWS = 256
"""Queries whose scores with every block are there at once."""


def block_scores(
    q: jax.Array,
    k: jax.Array,
    *,
    blocks: tuple[int, int],
    mask: Mask | None = None,
    pool: Literal["mean", "max"] = "mean",
    scale: float | None = None,
) -> jax.Array:
    """Returns the scores of pooled queries with pooled keys, without a gradient.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``, H a multiple of Hk.
      blocks: (bq, bk): queries and keys that are pooled.
      mask: blocks that it leaves empty score -inf; None for none.
      pool: "mean" of the tokens of a block, or their "max", element by element.
      scale: of the products; None takes ``D ** -0.5``.

    Returns:
      float32 ``[B, H, ceil(S / bq), ceil(T / bk)]``.

    Raises:
      ValueError: another pool.
    """
    if pool not in ("mean", "max"):
        raise ValueError(f"block_scores: pool must be 'mean' or 'max', got {pool!r}")
    (B, S, H, D), T = q.shape, k.shape[1]
    grouped = pooled(q, blocks[0], pool).reshape(B, -1, k.shape[2], H // k.shape[2], D)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, pooled(k, blocks[1], pool)) * (
        D**-0.5 if scale is None else scale
    )
    scores = scores.reshape(B, H, *scores.shape[3:])
    if mask is None:
        return scores
    seen = classify(resolve(mask, S, T, xp=jnp), blocks)[1]
    return jnp.where(jnp.repeat(seen, H // seen.shape[1], axis=1), scores, -jnp.inf)


def pooled(x: jax.Array, size: int, pool: str = "mean") -> jax.Array:
    """Returns the mean or max of each block of ``size`` tokens of ``[B, n, H, D]``, float32, without a gradient."""
    n = x.shape[1]
    x = lax.stop_gradient(x).astype(jnp.float32)
    rest = -n % as_integer("block_scores", "a block", size, 1)
    x = jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0)), constant_values=0 if pool == "mean" else -jnp.inf)
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    if pool == "max":
        return x.max(2)
    counts = np.minimum(size, n - size * np.arange(x.shape[1]))
    return x.sum(2) / counts[:, None, None]


def select_topk(scores: jax.Array, k: int, *, always: tuple[int, int] = (0, 0)) -> jax.Array:
    """Returns the k blocks of highest scores of every row; of equal ones those that come first.

    Args:
      scores: float ``[..., Nk]``; -inf is not selected.
      k: how many.
      always: how many of the first and of the last blocks that a row sees are among the k: under a causal mask, sinks
        and the blocks nearest to the query.

    Returns:
      bool ``[..., Nk]``.

    Raises:
      ValueError: k below 1 or below the sum of ``always``.
    """
    chosen = top_blocks(scores, k, always=always)
    return jnp.put_along_axis(
        jnp.zeros((*scores.shape[:-1], scores.shape[-1] + 1), bool),
        jnp.where(chosen < 0, scores.shape[-1], chosen),
        True,
        axis=-1,
        inplace=False,
    )[..., :-1]


def top_blocks(scores: jax.Array, k: int, *, always: tuple[int, int] = (0, 0)) -> jax.Array:
    """Returns what `select_topk` selects as numbers of blocks, int32 ``[..., min(k, Nk)]``, -1 where there are less."""
    first, last = (as_integer("select_topk", "a number of blocks", n, 0) for n in always)
    if as_integer("select_topk", "k", k, 1) < first + last:
        raise ValueError(f"select_topk: always={always} are more than k={k} blocks")
    scores = lax.stop_gradient(scores)
    seen = scores > -jnp.inf
    rank = jnp.cumsum(seen, axis=-1)
    kept = seen & ((rank <= first) | (rank > rank[..., -1:] - last))
    best, chosen = lax.top_k(jnp.where(kept, jnp.inf, scores), min(k, scores.shape[-1]))
    return jnp.where(best > -jnp.inf, chosen, -1)


def select_mass(scores: jax.Array, tau: float, max_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Returns the fewest blocks whose softmax weights add up to ``tau``, at most ``max_blocks`` of them.

    Args:
      scores: float ``[..., Nk]``; -inf is not selected.
      tau: mass, in (0, 1].
      max_blocks: how many there is room for.

    Returns:
      The selection, bool ``[..., Nk]``, and where more blocks were needed, bool ``[...]``.

    Raises:
      ValueError: a mass out of range, or no room.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"select_mass: tau must be above 0 and at most 1, got {tau}")
    n = min(as_integer("select_mass", "max_blocks", max_blocks, 1), scores.shape[-1])
    scores = lax.stop_gradient(scores).astype(jnp.float32)
    seen = scores > -jnp.inf
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1), 0)
    best, chosen = lax.top_k(weights, n)
    total = jnp.cumsum(best, axis=-1)
    needed = total - best < tau
    selected = jnp.put_along_axis(jnp.zeros(scores.shape, bool), chosen, needed, axis=-1, inplace=False) & seen
    return selected, (total[..., -1] < tau) & (seen.sum(-1) > n)


def block_topk(
    q: jax.Array,
    k: jax.Array,
    n: int,
    *,
    size: tuple[int, int] = (128, 128),
    always: tuple[int, int] = (1, 1),
    mask: Mask | None = None,
    scale: float | None = None,
) -> Mask:
    """Returns the mask of the n blocks of keys of highest mean score of every block of queries.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      n: how many blocks, those of ``always`` among them.
      size: queries and keys of a block, a multiple of the blocks of `attend`.
      always: as `select_topk` takes it.
      mask: what may be seen at all; None is `masks.causal()`.
      scale: as `block_scores` takes it.
    """
    mask = masks.causal() if mask is None else mask
    scores = block_scores(q, k, blocks=size, mask=mask, scale=scale)
    return masks.blocks(select_topk(scores, n, always=always), size) & mask


def token_blocks(chosen: jax.Array, size: int, T: int, *, blocks: tuple[int, int]) -> Mask:
    """Returns the mask of blocks of keys that every query chooses for itself.

    Blocks of `attend` that none of their queries chooses are skipped, and those that all choose need no test; others
    compare a key's block with the n numbers of the query. The numbers are 4 n bytes per query and head, whatever T.

    Args:
      chosen: int32 ``[B|1, H|Hk|1, S, n]``, distinct numbers of blocks; -1 names none.
      size: keys of a block that is chosen.
      T: number of keys.
      blocks: (bq, bk) of `attend`; bk a multiple or a divisor of ``size``.

    Raises:
      ValueError: sizes of blocks that do not divide each other.
    """
    bq, bk = blocks
    if size % bk and bk % size:
        raise ValueError(f"token_blocks: blocks of {size} keys and blocks {blocks} of attend do not divide each other")
    B, H, S, n = chosen.shape
    Nq, Nk, wide = -(-S // bq), -(-T // size), max(1, bk // size)
    rows = np.minimum(bq, S - bq * np.arange(Nq))[:, None]
    row = np.arange(S, dtype=np.int32)[:, None] // bq
    b, h = np.indices((B, H), np.int32)[..., None, None]
    at = jnp.where(chosen < 0, Nk, chosen)
    counts = jnp.zeros((B, H, Nq, Nk), jnp.int32).at[b, h, row, at].add(1, mode="drop")
    grid = jnp.pad(jnp.stack([counts > 0, counts == rows]), ((0, 0),) * 4 + ((0, -Nk % wide),), mode="edge")
    some, every = grid.reshape(2, B, H, Nq, -1, wide)
    tile = bq, max(size, bk)
    own = Leaf(_chosen, (size,), rows=tuple(chosen[..., i] for i in range(n)))
    return masks.blocks(some.any(-1), tile) & (masks.blocks(every.all(-1), tile) | own)


def _chosen(at: At, size: int) -> Any:
    return functools.reduce(operator.or_, (row == at.k // size for row in at.rows))


def fitting_blocks(q_shape: tuple[int, ...], T: int, size: int) -> tuple[int, int]:
    """Returns blocks of `attend` for a selection of blocks of ``size`` keys per query."""
    bq, bk = default_blocks(q_shape, T)
    return bq, bk if bk % size == 0 else math.gcd(bk, size)


def over_rows(fn: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, T: int) -> jax.Array:
    """Returns ``fn`` of queries, some rows at a time.

    Args:
      fn: ``(q [B, rows, H, D], tokens int32 [rows]) -> [B, H', rows, n]``; tokens are the queries' own keys.
      q: ``[B, S, H, D]``.
      T: number of keys.

    Returns:
      ``[B, H', S, n]``.
    """
    B, S = q.shape[:2]
    rows = min(S, _ROWS)
    tiles = jnp.pad(q, ((0, 0), (0, -S % rows), (0, 0), (0, 0))).reshape(B, -1, rows, *q.shape[2:])
    tokens = jnp.arange(tiles.shape[1] * rows, dtype=jnp.int32).reshape(-1, rows) + (T - S)
    found = jnp.moveaxis(lax.map(lambda tile: fn(*tile), (tiles.swapaxes(0, 1), tokens)), 0, 2)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])[:, :, :S]
