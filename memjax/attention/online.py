"""Softmax in one pass over its elements, by a running maximum and a running sum.

Online normalizer calculation for softmax, 2018; the form of Edge-MoE's attention unit, 2023.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def online_softmax(scores: jax.Array, axis: int = -1) -> jax.Array:
    """Returns the softmax along an axis, with one exponential per element of the pass.

    Args:
      scores: float ``[...]``; -inf takes no part, and where all do the result is 0.
      axis: the axis that is summed over.

    Returns:
      ``[...]`` in the dtype of ``scores``, computed in float32.
    """
    rows = jnp.moveaxis(scores, axis, 0).astype(jnp.float32)
    start = jnp.full_like(rows[0], -jnp.inf), jnp.zeros_like(rows[0])
    (top, total), _ = lax.scan(lambda state, x: (join(state, (x, (x > -jnp.inf).astype(x.dtype))), None), start, rows)
    weights = jnp.exp(rows - jnp.where(top == -jnp.inf, 0, top)) / jnp.where(total == 0, 1, total)
    return jnp.moveaxis(weights, 0, axis).astype(scores.dtype)


def join(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the statistics of two sets of elements from those of each; associative.

    Args:
      first, second: maximum and sum of ``exp(element - maximum)``, float32 ``[...]`` each; (-inf, 0) for no elements.
    """
    higher, lower = first[0] >= second[0], jnp.minimum(first[0], second[0])
    top = jnp.maximum(first[0], second[0])
    shrink = jnp.exp(lower - jnp.where(top == -jnp.inf, 0, top))
    big, small = jnp.where(higher, first[1], second[1]), jnp.where(higher, second[1], first[1])
    return top, big + small * shrink
