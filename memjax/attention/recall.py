"""How much of the attention a mask keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memjax.attention import masks
from memjax.attention.attend import attend
from memjax.attention.expression import Mask


def recall(
    mask: Mask,
    q: jax.Array,
    k: jax.Array,
    *,
    of: Mask | None = None,
    scale: float | None = None,
    blocks: tuple[int, int] | None = None,
) -> jax.Array:
    """Returns the share of the softmax weights that fall on the keys of a mask, a mean over queries.

    It is found from two log-sum-exps: nothing of size S x T is built.

    Args:
      mask: what is kept; a selection of blocks is `masks.blocks(selection, size)`.
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      of: the attention that is shared out; None is `masks.causal()`. Its rows with no keys do not count.
      scale, blocks: as `attend` takes them.

    Returns:
      float32 ``[B, H]``.
    """
    of = masks.causal() if of is None else of
    q, k = jax.lax.stop_gradient((q, k))
    kept, whole = (
        attend(q, k, k, mask=shown, scale=scale, blocks=blocks, return_lse=True)[1] for shown in (mask & of, of)
    )
    seen = whole > -jnp.inf
    share = jnp.where(seen, jnp.exp(kept - jnp.where(seen, whole, 0)), 0)
    return share.sum(1) / jnp.maximum(seen.sum(1), 1)
