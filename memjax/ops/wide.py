"""The precision in which operations compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jax.Array:
    """Returns ``x`` in float32, or wider where it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
