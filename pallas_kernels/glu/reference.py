"""SwiGLU with packed inputs by plain `jax.numpy`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.codec import reference
from pallas_kernels.codec.formats import Codes, Form


def forward(gate: jax.Array, up: jax.Array, form: Form) -> tuple[jax.Array, Codes, Codes]:
    """Returns ``silu(gate) * up``, and the codes of both."""
    product = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return product.astype(gate.dtype), reference.encode(gate, None, form), reference.encode(up, None, form)


def of_codes(gate: Codes, up: Codes, form: Form, dtype: jnp.dtype) -> jax.Array:
    """Returns ``silu(gate) * up`` in ``dtype`` at the values that the codes stand for."""
    a, b = (reference.decode(part, form, jnp.float32) for part in (gate, up))
    return (jax.nn.silu(a) * b).astype(dtype)


def backward(dh: jax.Array, gate: Codes, up: Codes, form: Form) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of gate and up at the values that the codes stand for."""
    a, b = (reference.decode(part, form, jnp.float32) for part in (gate, up))
    d = dh.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(a)
    slope = sigmoid * (1 + a * (1 - sigmoid))
    return (d * b * slope).astype(dh.dtype), (d * a * sigmoid).astype(dh.dtype)
