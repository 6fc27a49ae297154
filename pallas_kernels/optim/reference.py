"""Optimizer steps by plain `jax.numpy`: what the kernels compute, line by line."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._bits import flat_counter, hash_bits, round_to_bfloat16
from pallas_kernels.optim.formats import TINY, dynamic_levels, nearest_code

Words = tuple[jax.Array, jax.Array]


class Scalars(NamedTuple):
    """What a step needs to know of Adam, float32 scalars; parameter p with moments m and v becomes
    ``p * shrink - rate * m / (sqrt(v * root) + eps)``.

    Attributes:
      b1, rest1: ``m = b1 * m + rest1 * g``.
      b2, rest2: ``v = b2 * v + rest2 * g**2``.
      eps: added to the root.
      rate: the learning rate over ``1 - b1**steps``.
      root: ``1 / (1 - b2**steps)``.
      shrink: ``1 - learning rate * weight decay``.
      free: the learning rate of elements that have no moments, which go by the sign of their gradient.
    """

    b1: Any
    rest1: Any
    b2: Any
    rest2: Any
    eps: Any
    rate: Any
    root: Any
    shrink: Any
    free: Any


def adam_scalars(
    learning_rate: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    steps: Any,
    weight_decay: Any = 0.0,
    *,
    free_rate: Any = 0.0,
    keep: Any = 1.0,
) -> jax.Array:
    """Returns `Scalars` as float32 ``[12]``, filled up with zeros.

    Args:
      learning_rate, b1, b2, eps, weight_decay: of Adam, scalars.
      steps: number of this step from 1, float32; of the moments, if they were reset.
      free_rate: learning rate of elements without moments.
      keep: 0 in the step that resets the moments, else 1.
    """
    made = Scalars(
        b1 * keep,
        1 - b1,
        b2 * keep,
        1 - b2,
        eps,
        learning_rate / (1 - b1**steps),
        1 / (1 - b2**steps),
        1 - learning_rate * weight_decay,
        free_rate,
    )
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in (*made, 0.0, 0.0, 0.0)])


def round_stochastic(x: jax.Array, words: Words, first: Any = 0) -> jax.Array:
    """Rounds float32 to bfloat16 so that the expectation of every finite number is the number.

    Numbers that bfloat16 holds stay, infinities and NaN too; what is finite stays finite.

    Args:
      x: float32 ``[...]``.
      words: of `pallas_kernels._bits.seed_words`.
      first: even number of the first element; element i takes the low half of the random word ``i // 2`` if it is
        even, else the high half.
    """
    counter = flat_counter(x.shape) + jnp.asarray(first).astype(jnp.uint32)
    random = hash_bits(words, counter >> np.uint32(1))
    random = jnp.where(counter & np.uint32(1) == 0, random & np.uint32(0xFFFF), random >> np.uint32(16))
    return round_to_bfloat16(x, random)


def _round(x: jax.Array, dtype: Any, words: Words | None, first: Any) -> jax.Array:
    return x.astype(dtype) if words is None or dtype != jnp.bfloat16 else round_stochastic(x, words, first)


def adam8bit_step(
    p: jax.Array,
    g: jax.Array,
    m_codes: jax.Array,
    m_scale: jax.Array,
    v_codes: jax.Array,
    v_scale: jax.Array,
    scalars: jax.Array,
    words: Words | None,
    first: Any = 0,
    levels: tuple[Any, Any] | None = None,
) -> tuple[jax.Array, ...]:
    """Returns (p, m_codes, m_scale, v_codes, v_scale) after a step of Adam.

    Args:
      p: ``[n]``.
      g: ``[n]``.
      m_codes, v_codes: uint8 ``[n]``, signed and unsigned dynamic codes.
      m_scale, v_scale: bit patterns of float32, uint32 ``[n / block]``.
      scalars: of `adam_scalars`.
      words: of the stochastic rounding of bfloat16 parameters, or None.
      first: number of the first element for it.
      levels: what the codes of the first and of the second moment stand for, float32 ``[256]`` each, where the caller
        has them as arrays.
    """
    at = Scalars(*scalars[: len(Scalars._fields)])
    signed, unsigned = map(jnp.asarray, levels or (dynamic_levels(8, True), dynamic_levels(8, False)))
    blocks = (m_scale.shape[0], -1)
    slope = g.astype(jnp.float32).reshape(blocks)
    scales = [lax.bitcast_convert_type(scale, jnp.float32)[:, None] for scale in (m_scale, v_scale)]
    m = at.b1 * (signed[m_codes.reshape(blocks).astype(jnp.int32)] * scales[0]) + at.rest1 * slope
    v = at.b2 * (unsigned[v_codes.reshape(blocks).astype(jnp.int32)] * scales[1]) + at.rest2 * (slope * slope)
    dense = p.astype(jnp.float32).reshape(blocks)
    dense = dense * at.shrink - at.rate * (m / (jnp.sqrt(v * at.root) + at.eps))
    parts = []
    for moment, has_sign in ((m, True), (v, False)):
        scale = jnp.maximum(jnp.max(jnp.abs(moment), -1, keepdims=True), TINY)
        parts.append(nearest_code(moment / scale, 8, has_sign).reshape(-1))
        parts.append(lax.bitcast_convert_type(scale[:, 0], jnp.uint32))
    return _round(dense.reshape(-1), p.dtype, words, first), *parts


def frugal_adam_step(
    p: jax.Array,
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    place: jax.Array,
    scalars: jax.Array,
    words: Words | None,
    first: Any = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (p, mu, nu) after a step of Adam on the runs that have moments and of signSGD on the others.

    Args:
      p: ``[outer, runs, run]``.
      g: ``[outer, runs, run]``.
      mu, nu: float32 ``[outer, kept, run]``.
      place: int32 ``[outer, runs]``: where a run's moments lie, at least ``kept`` for runs without.
      scalars: of `adam_scalars`.
      words: of the stochastic rounding of bfloat16 parameters, or None.
      first: number of the first element for it.
    """
    at = Scalars(*scalars[: len(Scalars._fields)])
    kept = mu.shape[1]
    slope, dense = g.astype(jnp.float32), p.astype(jnp.float32) * at.shrink
    free = dense - at.free * jnp.sign(slope)
    if not kept:
        return _round(free, p.dtype, words, first), mu, nu
    where = jnp.minimum(place, kept - 1)[..., None]
    held = (place < kept)[..., None]
    m = at.b1 * jnp.take_along_axis(mu, where, 1) + at.rest1 * slope
    v = at.b2 * jnp.take_along_axis(nu, where, 1) + at.rest2 * (slope * slope)
    moved = dense - at.rate * (m / (jnp.sqrt(v * at.root) + at.eps))
    # The runs in the order of their moments: those that have them come first.
    order = jnp.argsort(place, axis=1)[:, :kept, None]
    new_m, new_v = (jnp.take_along_axis(moment, order, 1) for moment in (m, v))
    return _round(jnp.where(held, moved, free), p.dtype, words, first), new_m, new_v
