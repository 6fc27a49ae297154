"""RMSNorm with a packed residual by plain `jax.numpy`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codec import reference
from pallas_kernels.codec.formats import Codes, Form


def forward(x: jax.Array, gain: jax.Array, eps: float, form: Form) -> tuple[jax.Array, Codes, jax.Array]:
    """Returns the result ``[..., D]``, the codes of the normalised values, and ``1 / rms`` of rows, float32 ``[...]``.

    Args:
      x: float ``[..., D]``.
      gain: float32 ``[D]``.
      eps: added to the mean square.
      form: the format.
    """
    wide = x.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(wide * wide, axis=-1) + eps)
    normalized = wide * rstd[..., None]
    y = (normalized * gain).astype(x.dtype)
    return y, reference.encode(normalized.astype(x.dtype), None, form), rstd


def backward(dy: jax.Array, made: Codes, rstd: jax.Array, gain: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``x``, in the dtype of ``dy``, and of the gain, float32 ``[D]``."""
    normalized = reference.decode(made, form, jnp.float32)
    wide = dy.astype(jnp.float32)
    slope = wide * gain
    across = slope - normalized * jnp.mean(slope * normalized, axis=-1, keepdims=True)
    d_gain = jnp.sum(wide * normalized, axis=range(dy.ndim - 1))
    return (rstd[..., None] * across).astype(dy.dtype), d_gain
