"""What every implementation does to a tile of scores, and which of its elements dropout keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._bits import hash_bits

Reduce = Literal["sum", "max", "max_logit"]

ScoreMod = Callable[..., jax.Array]
"""``score_mod(s, b, h, q, k) -> s``: float32 scores and int32 positions that broadcast against them."""


def reads_arrays(score_mod: ScoreMod) -> bool:
    """Returns whether a ``score_mod`` reads arrays besides its arguments, of which a kernel knows nothing."""
    numbers = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, *[jnp.int32] * 4)]
    return bool(jax.make_jaxpr(score_mod)(*numbers).consts)


def modified(s: jax.Array, softcap: float | None, score_mod: ScoreMod | None, *positions: jax.Array) -> jax.Array:
    """Returns scaled scores after ``softcap * tanh(s / softcap)``, then after ``score_mod(s, b, h, q, k)``."""
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    return s if score_mod is None else score_mod(s, *positions)


def slope(
    s: jax.Array, softcap: float | None, score_mod: ScoreMod | None, *positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `modified` and its derivative by ``s``, element by element."""
    return jax.jvp(lambda s: modified(s, softcap, score_mod, *positions), (s,), (jnp.ones_like(s),))


def stays(
    words: tuple[jax.Array, jax.Array], rate: float, heads: int, keys: int, b: Any, h: Any, q: Any, k: Any
) -> jax.Array:
    """Returns whether dropout keeps an element: a hash of the seed, the head and the place in its S x T scores.

    Args:
      words: two uint32 of `_bits.seed_words`.
      rate: probability of dropping.
      heads, keys: H and T.
      b, h, q, k: int32 that broadcast: batch, query head, query and key.
    """
    b, h, q, k = (jnp.asarray(x).astype(jnp.uint32) for x in (b, h, q, k))
    head = hash_bits(words, b * np.uint32(heads) + h)
    bits = hash_bits((words[0] ^ head, words[1] + head), q * np.uint32(keys) + k)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
