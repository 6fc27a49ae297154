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
    softmax: jax.Array,
    label: jax.Array,
    everywhere: jax.Array | None = None,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Returns ``softmax p - label - everywhere`` for the logits before their cap, float32 ``[T, V]``."""
    dz = softmax[:, None] * jnp.exp(z - lse[:, None]) - jnp.where(is_label(labels, z.shape[1]), label[:, None], 0.0)
    if everywhere is not None:
        dz = dz - everywhere[:, None]
    return dz if softcap is None else dz * (1 - (z / softcap) ** 2)
