"""SpargeAttn: Accurate and Training-free Sparse Attention Accelerating Any Model Inference (2025): its selection.

The second stage, which drops products inside a kernel, and the products of integers are not part of this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memjax.attention.expression import Mask
from memjax.attention.select import block_scores, select_mass


def sparge_select(
    q: jax.Array,
    k: jax.Array,
    *,
    tau: float,
    theta: float,
    blocks: tuple[int, int] = (128, 64),
    max_blocks: int | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks that hold ``tau`` of the predicted attention: for `masks.blocks` and `attend` with ``blocks``.

    Attention is predicted from means of blocks. A block whose tokens are unlike their mean is not skipped: a block of
    queries sees all keys, a block of keys is seen by all.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      tau: mass, in (0, 1].
      theta: least mean cosine of tokens with their mean, of blocks that may be skipped. Neither has a value that suits
        every model: `recall` says what one keeps.
      blocks: (bq, bk).
      max_blocks: most blocks that are selected for their mass; None for no limit.
      mask: what may be seen at all; None for everything.
      scale: of the products; None takes ``D ** -0.5``.

    Returns:
      bool ``[B, H, ceil(S / bq), ceil(T / bk)]``, and bool ``[B, H, ceil(S / bq)]``: where ``max_blocks`` was too few.
    """
    scores = block_scores(q, k, blocks=blocks, mask=mask, scale=scale)
    seen = scores > -jnp.inf
    like_q = _similarity(q, blocks[0])[..., None] >= theta
    like_k = jnp.repeat(_similarity(k, blocks[1]), q.shape[2] // k.shape[2], axis=1)[:, :, None] >= theta
    most = scores.shape[-1] if max_blocks is None else max_blocks
    selected, overflow = select_mass(jnp.where(like_k, scores, -jnp.inf), tau, most)
    return (selected | ~like_q | ~like_k) & seen, overflow & like_q[..., 0]


def _similarity(x: jax.Array, size: int) -> jax.Array:
    """Returns the mean cosine of the tokens of each block with their mean, float32 ``[B, H, n]``."""
    n, rest = x.shape[1], -x.shape[1] % size
    x = jnp.pad(jax.lax.stop_gradient(x).astype(jnp.float32), ((0, 0), (0, rest), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    mean = x.sum(2, keepdims=True)  # its length does not matter
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    cosines = jnp.where(lengths > 0, (x * mean).sum(-1) / jnp.where(lengths > 0, lengths, 1), 0)
    counts = jnp.minimum(size, n - size * jnp.arange(x.shape[1]))
    return (cosines.sum(2) / counts[:, None]).swapaxes(1, 2)
