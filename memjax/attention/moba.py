"""MoBA: Mixture of Block Attention for Long-Context LLMs (2025)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from memjax.attention import masks
from memjax.attention.attend import attend
from memjax.attention.expression import as_integer
from memjax.attention.select import fitting_blocks, over_rows, pooled, token_blocks, top_blocks


def moba_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    chunk: int = 2048,
    top_k: int = 3,
    blocks: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """Returns causal attention of each query over the chunks of keys whose means it scores highest, its own included.

    The choice is hard: no gradient flows through it. It is kept as 4 ``top_k`` bytes per query and head. The defaults
    are those of the authors' benchmark; a model has to be trained with the method.

    Args:
      q: ``[B, S, H, D]``, the last S of T tokens.
      k: ``[B, T, Hk, D]``.
      v: ``[B, T, Hk, Dv]``.
      chunk: keys of a chunk.
      top_k: chunks that a query reads.
      blocks: as `attend` takes it; keys per block are a multiple or a divisor of ``chunk``. None chooses.
      **options: as `attend` takes them.

    Returns:
      What `attend` returns.
    """
    T = k.shape[1]
    blocks = blocks or fitting_blocks(q.shape, T, chunk)
    chosen = moba_chunks(q, k, chunk=chunk, top_k=top_k)
    mask = token_blocks(chosen, chunk, T, blocks=blocks) & masks.causal()
    return attend(q, k, v, mask=mask, blocks=blocks, **options)


def moba_chunks(q: jax.Array, k: jax.Array, *, chunk: int, top_k: int) -> jax.Array:
    """Returns the chunks that each query chooses, int32 ``[B, H, S, min(top_k, ceil(T / chunk))]``, -1 for none."""
    as_integer("moba", "top_k", top_k, 1)
    (B, _, H, D), (_, T, heads, _) = q.shape, k.shape
    means = pooled(k, chunk)
    number = jnp.arange(means.shape[1])

    def choose(q: jax.Array, tokens: jax.Array) -> jax.Array:
        grouped = q.astype(jnp.float32).reshape(B, -1, heads, H // heads, D)
        gate = jnp.einsum("bqhgd,bnhd->bhgqn", grouped, means).reshape(B, H, -1, len(number))
        own = tokens[:, None] // chunk
        gate = jnp.where(number == own, jnp.inf, jnp.where(number < own, gate, -jnp.inf))
        return top_blocks(gate, top_k)

    return over_rows(choose, jax.lax.stop_gradient(q), T)
