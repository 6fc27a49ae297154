"""What the three kernels do with a tile of logits, in registers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mgpu
from pallas_kernels.linear_cross_entropy.kernel import LOG2E, Tile

LOWEST = -1e30  # stands for columns beyond the vocabulary


def _along_rows(values: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(values, like.shape, (0,))


def _columns(like: jax.Array) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=_mgpu.WGMMA)


def _logits(z: jax.Array, bias: jax.Array | None, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns the logits and, if they are capped, the tangents hyperbolic that they are multiples of."""
    if bias is not None:
        z = z + lax.broadcast_in_dim(bias, z.shape, (1,))
    if softcap is None:
        return z, None
    # tanh(u) = 1 - 2 / (1 + exp(2 u)): the processor's own tanh has 11 bits.
    bent = 1.0 - 2.0 * jnp.exp2(jnp.log(1.0 + jnp.exp2(z * (2 * LOG2E / softcap))) * -LOG2E)
    return bent * softcap, bent


def statistics(
    z: jax.Array,
    first: jax.Array,
    per_row: list[jax.Array],
    bias: jax.Array | None,
    *,
    softcap: float | None,
    vocabulary: int | None,
    total: bool,
    dense: bool,
) -> Tile:
    """Returns each row's largest logit, its sum of exponentials relative to that, and the label's logit.

    Args:
      z: float32 ``[rows, columns]``, products.
      first: number of the first column.
      per_row: the labels, int32 ``[rows]``.
      bias: float32 ``[columns]`` or None.
      softcap: cap of the logits or None.
      vocabulary: number of the first column that does not count; None if all do.
      total: whether to add the sum of the logits.
      dense: whether the tile becomes the exponentials.
    """
    (labels,) = per_row
    z, _ = _logits(z, bias, softcap)
    columns = _columns(z)
    counted = z
    if vocabulary is not None:
        inside = columns < vocabulary - first
        counted = jnp.where(inside, z, 0.0)
        z = jnp.where(inside, z, LOWEST)
    is_label = columns == _along_rows(labels - first, z)
    target = jnp.sum(jnp.where(is_label, z, 0.0), axis=1)
    numbers = [jnp.sum(counted, axis=1)] if total else []
    peak = jnp.max(z, axis=1)
    values = jnp.exp2(z * LOG2E - _along_rows(peak * LOG2E, z))
    return Tile((peak, jnp.sum(values, axis=1), target, *numbers), values if dense else None)


def gradients(
    z: jax.Array,
    first: jax.Array,
    per_row: list[jax.Array],
    bias: jax.Array | None,
    *,
    softcap: float | None,
    smoothed: bool,
) -> Tile:
    """Returns the gradient for the products: softmax times a slope, less a number at the label, less one everywhere.

    Args:
      z: float32 ``[rows, columns]``, products.
      first: number of the first column.
      per_row: the labels, int32 ``[rows]``; float32 ``[rows]``: the log of the sum of exponentials times log2 e, the
        slope, the number at the label and, if ``smoothed``, the number everywhere.
      bias: float32 ``[columns]`` or None.
      softcap: cap of the logits or None.
      smoothed: see ``per_row``.
    """
    labels, lse, slope, at_label, *everywhere = per_row
    z, bent = _logits(z, bias, softcap)
    is_label = _columns(z) == _along_rows(labels - first, z)
    dz = jnp.exp2(z * LOG2E - _along_rows(lse, z)) * _along_rows(slope, z)
    dz = dz - jnp.where(is_label, _along_rows(at_label, z), 0.0)
    if smoothed:
        dz = dz - _along_rows(everywhere[0], z)
    if bent is not None:
        dz = dz * (1.0 - bent * bent)
    return Tile((), dz)
