"""Tables of subspaces: when they are drawn again, which rows or columns they hold, and writing back by gather.

A subspace of a leaf is an int32 table of which the shape is static and the content is traced, so that one compiled
step serves every subspace. Full-size arrays are read through the table and never scattered into: a scatter would copy
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.core.random_bits import hash_bits, seed_words
from pallas_kernels._bits import flat_counter


def stagger_offset(index: int, leaves: int, gap: Any) -> Any:
    """Returns at which step of a gap leaf ``index`` of ``leaves`` refreshes: ``floor(index * gap / leaves)``."""
    return index * gap // leaves


def is_due(count: jax.Array, gap: Any, offset: Any = 0) -> jax.Array:
    """Returns whether a leaf refreshes at step ``count``: at step 0, and then where ``count % gap == offset``.

    Args:
      count: int32 scalar, optimizer steps done.
      gap: steps between refreshes.
      offset: of the leaf, in [0, gap).
    """
    return (count == 0) | (count % gap == offset)


def epoch(count: jax.Array, gap: Any, offset: Any = 0) -> jax.Array:
    """Returns the number of the subspace that is in use after a refresh due at step ``count``, int32 from 0."""
    return (count + (gap - offset) % gap) // gap


def leaf_words(seed: Any, *indices: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the seed words of one use of ``seed``, told from others by ``indices`` (leaf, epoch, step ...).

    Args:
      seed: as `memjax.core.random_bits.seed_words` takes it.
      indices: integers, traced or not.
    """
    words = [*seed_words(seed), *(jnp.asarray(index).astype(jnp.uint32) for index in indices)]
    return seed_words(jnp.stack(words))


def matrix_bits(words: tuple[jax.Array, jax.Array], shape: tuple[int, ...], first: Any = 0) -> jax.Array:
    """Returns random bits uint32 ``[B, ...]`` for B matrices of a stack, the number of the first of which is given."""
    start = jnp.asarray(first).astype(jnp.uint32) * np.uint32(math.prod(shape[1:]))
    return hash_bits(words, flat_counter(shape) + start)


def random_order(words: tuple[jax.Array, jax.Array], shape: tuple[int, ...], first: Any = 0) -> jax.Array:
    """Returns random permutations along the last axis, int32 ``[..., n]``; of a stack from matrix ``first`` on."""
    return jnp.argsort(matrix_bits(words, shape, first), axis=-1).astype(jnp.int32)


def refresh(due: jax.Array, draw: Callable[[], Any], table: Any) -> Any:
    """Returns ``draw()`` where ``due``, else ``table``; only tables go through the conditional."""
    return lax.cond(due, draw, lambda: table)


def positions(order: jax.Array) -> jax.Array:
    """Returns the inverse of permutations along the last axis, int32 ``[..., n]``."""
    ramp = lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    return jnp.put_along_axis(jnp.zeros_like(order), order, ramp, axis=-1, inplace=False)


def take_groups(matrices: jax.Array, chosen: jax.Array, axis: int, group: int = 1) -> jax.Array:
    """Gathers groups of adjacent rows or columns.

    Args:
      matrices: ``[B, m, n]``.
      chosen: int32 ``[B, strata, k]``: groups within each of ``strata`` equal parts of the axis.
      axis: -2 for rows, -1 for columns.
      group: adjacent rows or columns per group.

    Returns:
      ``[B, strata * k * group, n]``, or ``[B, m, strata * k * group]``.
    """
    batch, rows, cols = matrices.shape
    strata, kept = chosen.shape[1:]
    groups = matrices.shape[axis] // (strata * group)

    if axis == -2:
        by_stratum = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))
        split = matrices.reshape(batch, strata, groups, group, cols)
        return jax.vmap(by_stratum)(split, chosen).reshape(batch, strata * kept * group, cols)
    by_stratum = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"), in_axes=(1, 0), out_axes=1)
    split = matrices.reshape(batch, rows, strata, groups, group)
    return jax.vmap(by_stratum)(split, chosen).reshape(batch, rows, strata * kept * group)


def write_back(
    selected: jax.Array, rest: jax.Array, position: jax.Array, kept: int, axis: int, group: int = 1
) -> jax.Array:
    """Puts selected rows or columns into their places and ``rest`` into all others, by a gather.

    Args:
      selected: ``[B, strata * kept * group, n]`` or ``[B, m, strata * kept * group]``.
      rest: ``[B, m, n]``.
      position: int32 ``[B, strata, groups]``, inverse of the order of which the first ``kept`` are selected.
      kept: selected groups per stratum.
      axis: -2 for rows, -1 for columns.
      group: adjacent rows or columns per group.

    Returns:
      ``[B, m, n]``.
    """
    spread = take_groups(selected, jnp.minimum(position, kept - 1), axis, group)
    mask = jnp.repeat((position < kept).reshape(position.shape[0], -1), group, axis=-1)
    return jnp.where(mask[:, :, None] if axis == -2 else mask[:, None, :], spread, rest)


def kept_count(size: int, density: float) -> int:
    """Returns how many of ``size`` a density keeps: ``floor(size * density)``, and at least one above density 0."""
    return min(size, max(int(np.floor(size * density + 1e-6)), 1)) if density > 0 else 0
