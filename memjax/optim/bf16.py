"""Updates of bfloat16 parameters that are not lost: stochastic rounding.

Rounding to nearest loses updates below 2**-9 of a parameter. Rounding up or down with the probability of the distance
keeps every parameter's expectation. Source: Revisiting BFloat16 Training, 2020.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.core.random_bits import hash_bits
from memjax.optim.tables import leaf_words
from pallas_kernels._bits import flat_counter, round_to_bfloat16


def round_stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds to bfloat16, up or down in size with the probability of the distance.

    What bfloat16 represents stays as it is, infinities and NaN too, and what is finite stays finite.

    Args:
      x: float32 ``[...]``.
      bits: uint32 ``[...]``, of which the lower 16 are random.

    Returns:
      bfloat16 ``[...]``.
    """
    return round_to_bfloat16(x, bits & np.uint32(0xFFFF))


def apply_updates_stochastic(params: Any, updates: Any, key: Any) -> Any:
    """Adds updates to parameters; bfloat16 parameters are rounded stochastically, others as `optax.apply_updates`.

    Args:
      params: pytree of arrays.
      updates: tree of ``params``.
      key: a random key, an integer or integer words; another one for every step.

    Returns:
      The tree of ``params`` in its dtypes.
    """
    index = itertools.count()

    def add(p: jax.Array, u: jax.Array) -> jax.Array:
        words = leaf_words(key, next(index))
        if jnp.result_type(p) != jnp.bfloat16:
            return jnp.asarray(p + u).astype(jnp.result_type(p))
        total = jnp.asarray(p, jnp.float32) + jnp.asarray(u, jnp.float32)
        return round_stochastic(total, hash_bits(words, flat_counter(total.shape)))

    return jax.tree.map(add, params, updates)
