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


_KNOWN = {
    *("abs", "add", "add_any", "and", "atan2", "bitcast_convert_type", "broadcast_in_dim", "clamp", "cos", "div", "eq"),
    *("convert_element_type", "erf", "exp", "exp2", "ge", "gt", "integer_pow", "jit", "le", "log", "log2", "lt", "max"),
    *("min", "mul", "ne", "neg", "not", "or", "pjit", "rem", "round", "rsqrt", "select_n", "shift_left", "sign", "sin"),
    *("shift_right_arithmetic", "shift_right_logical", "sqrt", "square", "sub", "tanh", "xor"),
}
"""Operations that Mosaic GPU compiles and a ``score_mod`` may be made of."""


def no_kernel_for(score_mod: ScoreMod) -> str | None:
    """Returns what of a ``score_mod`` no kernel can do, or None."""
    numbers = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, *[jnp.int32] * 4)]

    def both(s: jax.Array, *positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return slope(s, None, score_mod, *positions)

    traced = jax.make_jaxpr(both)(*numbers)
    if traced.consts:
        return "reads arrays"
    names = _operations(traced.jaxpr) - _KNOWN
    return f"takes {', '.join(sorted(names))}" if names else None


def _operations(jaxpr: Any) -> set[str]:
    found = {equation.primitive.name for equation in jaxpr.eqns}
    inner = [equation.params["jaxpr"].jaxpr for equation in jaxpr.eqns if equation.primitive.name in ("jit", "pjit")]
    return found.union(*map(_operations, inner))


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
