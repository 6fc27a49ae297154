"""The obvious product with a packed weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.packed_matmul.formats import Format, decode_arrays


def packed_matmul(
    x: jax.Array, planes: tuple[jax.Array, ...], scale: jax.Array, offset: jax.Array | None, *, form: Format
) -> jax.Array:
    """Returns ``x [m, k] @ weight [k, n]``, float32."""
    weight = decode_arrays(form, planes, scale, offset)
    return jnp.dot(x.astype(jnp.float32), weight.astype(jnp.float32), precision="highest")
