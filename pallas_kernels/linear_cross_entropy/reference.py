"""The obvious forms, with all logits in memory as float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(
    x: jax.Array, w: jax.Array, *, bias: jax.Array | None = None, softcap: float | None = None, w_axis: int = 0
) -> jax.Array:
    """Returns the logits of ``x [T, D]``, float32 ``[T, V]``."""
    contraction = (((1,), (w_axis,)), ((), ()))
    z = jax.lax.dot_general(x, w, contraction, precision="highest", preferred_element_type=jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def is_label(labels: jax.Array, vocabulary: int) -> jax.Array:
    """Returns which column is each row's label, bool ``[T, V]``."""
    return labels[:, None] == jnp.arange(vocabulary)


def logit_gradients(
    z: jax.Array,
    labels: jax.Array,
    lse: jax.Array,
    scale: jax.Array,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> jax.Array:
    """Returns the gradient of ``sum(scale * loss)`` for the logits before their cap, float32 ``[T, V]``."""
    lse = lse[:, None]
    p = jnp.exp(z - lse)
    smoothed = (1 - label_smoothing) * is_label(labels, z.shape[1]) + label_smoothing / z.shape[1]
    slope = (1 + 2 * z_loss * lse) * p - smoothed
    if softcap is not None:
        slope = slope * (1 - (z / softcap) ** 2)
    return slope * scale[:, None]
