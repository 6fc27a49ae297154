"""Rotary position embedding that keeps its angles and nothing of what it rotates.

Source: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from memjax.ops.wide import wide


def rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + Dh/2) of every head.

    The transpose of a rotation rotates back, so reverse mode needs the angles only; their sines and cosines are
    computed again.

    Args:
      x: float ``[B, S, H, Dh]``.
      angles: float32 ``[B or 1, S, Dh/2]``.

    Returns:
      ``[B, S, H, Dh]`` in the dtype of ``x``, computed in float32.

    Raises:
      ValueError: shapes that do not fit.
    """
    if x.ndim != 4 or angles.ndim != 3 or angles.shape[1:] != (x.shape[1], x.shape[3] / 2):
        raise ValueError(f"expected x [B, S, H, Dh] and angles [B or 1, S, Dh/2], got {x.shape} and {angles.shape}")
    return _rotate(x, angles)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
