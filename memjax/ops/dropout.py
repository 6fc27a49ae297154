"""Dropout that keeps a seed of eight bytes and no mask.

Which elements stay is a hash of the seed and of an element's place, so backward finds it again (Tempo, 2022, keeps a
mask; a counter makes it unnecessary).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.core.random_bits import seed_words
from pallas_kernels._bits import flat_counter, hash_bits


def dropout(x: jax.Array, rate: float, seed: Any) -> jax.Array:
    """Sets elements to zero with probability ``rate`` and divides the others by ``1 - rate``.

    Args:
      x: float ``[...]``, at most 2**32 elements.
      rate: in [0, 1).
      seed: a random key, an integer, an integer scalar or integer words ``[n]``. One seed is one mask: give every
        layer, step and shard its own.

    Returns:
      ``[...]`` in the dtype of ``x``.

    Raises:
      ValueError: a rate outside [0, 1), too many elements.
      TypeError: a seed of another type.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} must be at least 0 and below 1")
    if x.size > 2**32:
        raise ValueError(f"shape {x.shape} has more than 2**32 elements, where the mask would repeat")
    return x if rate == 0 else _dropped(x, seed_words(seed), rate)


# The seed is pinned, so that the compiler cannot keep the mask of the forward pass in place of a second one.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=(False, True))
def _dropped(x: jax.Array, words: tuple[jax.Array, jax.Array], rate: float) -> jax.Array:
    stays = hash_bits(words, flat_counter(x.shape)) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(stays, (x / (1 - rate)).astype(x.dtype), jnp.zeros((), x.dtype))
