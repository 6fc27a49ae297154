"""Linformer: Self-Attention with Linear Complexity (2020)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from memjax.attention.attend import attend


def linformer_init(
    key: jax.Array, length: int, rank: int = 256, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Returns E and F ``[length, rank]``, shared by all heads, uniform in +-1/sqrt(rank) (a bound from memory)."""
    bound = rank**-0.5
    e, f = jax.random.split(key)
    return tuple(jax.random.uniform(one, (length, rank), dtype, -bound, bound) for one in (e, f))  # type: ignore[return-value]


def linformer_attention(q: jax.Array, k: jax.Array, v: jax.Array, E: jax.Array, F: jax.Array, **options: Any) -> Any:
    """Returns attention over ``rank`` mixtures of the keys: O(S rank) in place of O(S T). It is not causal.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      v: ``[B, T, Hk, Dv]``.
      E, F: mixtures of keys and of values, ``[length, rank]``, or ``[Hk, length, rank]`` where heads differ; the first
        T of their rows are used. One array for both shares them.
      **options: as `attend` takes them, but for what names keys (mask, segment_ids, pages).

    Returns:
      What `attend` returns.

    Raises:
      ValueError: E or F of other shapes, or for fewer than T keys; options that name keys.
    """
    if named := {"mask", "block_mask", "segment_ids", "pages"} & options.keys():
        raise ValueError(f"linformer_attention: {sorted(named)} name keys, of which there are mixtures alone")
    return attend(q, _mixed("E", k, E), _mixed("F", v, F), **options)


def _mixed(name: str, x: jax.Array, mix: jax.Array) -> jax.Array:
    T, heads = x.shape[1:3]
    if mix.ndim not in (2, 3) or mix.shape[-2] < T or (mix.ndim == 3 and mix.shape[0] != heads):
        raise ValueError(f"linformer: expected {name} [>= {T}, rank] or [{heads}, >= {T}, rank], got {mix.shape}")
    mix = mix[..., :T, :]
    spec = "bthd,tr->brhd" if mix.ndim == 2 else "bthd,htr->brhd"
    return jnp.einsum(spec, x, mix.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
