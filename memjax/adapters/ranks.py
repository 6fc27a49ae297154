"""Ranks that differ between the layers of one stack: smaller ones are padded with zeros up to the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.adapters.adapter import Weight
from memjax.adapters.lora import check_rank
from memjax.core.paths import lookup, select

Ranks = int | Mapping[str, int | Sequence[Any]]


def check_ranks(rank: Any) -> None:
    """Raises a ValueError unless ``rank`` is a positive integer, or pattern -> integer or (nested) lists of them."""
    for value in rank.values() if isinstance(rank, Mapping) else [rank]:
        ranks = np.asarray(value)
        per_layer = isinstance(rank, Mapping) or not ranks.ndim
        if ranks.dtype.kind != "i" or not ranks.size or ranks.min() < 1 or not per_layer:
            raise ValueError(f"rank must be a positive integer, or pattern -> integers, got {rank!r}")


def check_patterns(params: Any, rank: Ranks) -> None:
    """Raises a ValueError for a pattern of ``rank`` that matches no leaf."""
    for pattern in rank if isinstance(rank, Mapping) else ():
        select(params, pattern)


def ranks_of(weight: Weight, rank: Ranks) -> np.ndarray:
    """Returns the rank of every matrix of a weight, integers ``[*batch]``.

    Raises:
      ValueError: no pattern that matches, lists that do not fit the stack, a rank above the matrix's.
    """
    value = lookup(dict(rank), weight.path) if isinstance(rank, Mapping) else rank
    if value is None:
        raise ValueError(
            f"{weight.path}: no pattern of rank={dict(rank)} matches it; add '**': <rank> as a default"  # type: ignore
        )
    ranks = np.asarray(value)
    if ranks.ndim and ranks.shape != weight.batch:
        raise ValueError(f"{weight.path}: expected ranks of shape {weight.batch}, got shape {ranks.shape}")
    check_rank(weight.path, int(ranks.max()), weight.d_in, weight.d_out)
    return np.broadcast_to(ranks, weight.batch)


def masked(factor: jax.Array, ranks: np.ndarray, axis: int) -> jax.Array:
    """Zeroes what lies beyond each matrix's rank.

    Args:
      factor: ``[*batch, ...]``.
      ranks: integers ``[*batch]``.
      axis: the (non-negative) axis of ``factor`` that counts ranks.
    """
    if (ranks == factor.shape[axis]).all():
        return factor
    shape = [1] * factor.ndim
    shape[axis] = factor.shape[axis]
    keep = jnp.arange(factor.shape[axis]).reshape(shape) < ranks.reshape(
        *ranks.shape, *[1] * (factor.ndim - ranks.ndim)
    )
    return jnp.where(keep, factor, 0)
