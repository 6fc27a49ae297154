"""Scales by least squared error: a group's range is shrunk step by step and the best of all ranges is kept.

Clipping the few largest elements of a group makes the steps of all others smaller, which pays below 8 bits. Source:
the scale search of GPTQ's reference code (Frantar et al., GPTQ, 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_STEPS = 64
_CANDIDATES = 48


def least_squares(propose: Callable[[Any], Any], squared_error: Callable[[Any], jax.Array]) -> Any:
    """Returns, for every group, the proposal with the least squared error; the unshrunk one where none is better.

    One candidate is alive at a time, so the search costs time and no memory.

    Args:
      propose: maps a factor in (0, 1] to the stored scales (a pytree of one element per group).
      squared_error: maps these to the float32 squared error of every group.
    """

    def better(i: jax.Array, best: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        least, kept = best
        candidate = propose(1 - i.astype(jnp.float32) * np.float32(1 / _STEPS))
        error = squared_error(candidate)
        return jnp.minimum(error, least), jax.tree.map(
            lambda new, old: jnp.where(error < least, new, old), candidate, kept
        )

    first = propose(np.float32(1))
    return lax.fori_loop(1, _CANDIDATES, better, (squared_error(first), first))[1]
