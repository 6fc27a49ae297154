"""Scales by least squared error: a group's range is shrunk step by step and the best of all ranges is kept.

Clipping the few largest elements of a group makes the steps of all others smaller, which pays below 8 bits. Source:
the scale search of GPTQ's reference code (Frantar et al., GPTQ, 2022). Ranges a little wider than the group's own are
tried where a caller names them: one of them may fit the grid of weights that were decoded from fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SHRUNK = 1 - np.arange(1, 48, dtype=np.float32) / 64


def least_squares(
    propose: Callable[[Any], Any], squared_error: Callable[[Any], jax.Array], wider: Sequence[float] = ()
) -> Any:
    """Returns, for every group, the proposal with the least squared error; the unshrunk one where none is better.

    One candidate is alive at a time, so the search costs time and no memory.

    Args:
      propose: maps a factor of the range to the stored scales (a pytree of one element per group).
      squared_error: maps these to the float32 squared error of every group.
      wider: factors above 1 that are tried too.
    """
    factors = jnp.asarray(np.concatenate([_SHRUNK, np.asarray(wider, np.float32)]))

    def better(i: jax.Array, best: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        least, kept = best
        candidate = propose(factors[i])
        error = squared_error(candidate)
        return jnp.minimum(error, least), jax.tree.map(
            lambda new, old: jnp.where(error < least, new, old), candidate, kept
        )

    first = propose(np.float32(1))
    return lax.fori_loop(0, len(factors), better, (squared_error(first), first))[1]
