"""MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024).

Its patterns are masks: A-shape is ``(masks.sink(n) | masks.window(w - 1, 0)) & masks.causal()``, block-sparse is
`block_topk`, vertical-slash is here, and so is the choice of one per head. That the last 64 queries are asked is from
memory of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.attention import masks
from memjax.attention.expression import Mask, as_integer
from memjax.attention.recall import recall


def vertical_slash(
    q: jax.Array,
    k: jax.Array,
    n_vertical: int,
    n_slash: int,
    *,
    size: tuple[int, int] = (128, 128),
    rows: int = 64,
    scale: float | None = None,
) -> Mask:
    """Returns the causal mask of the keys and of the diagonals that get most of the attention of the last queries.

    A key is open to all queries. A diagonal opens the blocks that it passes, as in the paper's kernel. The queries' own
    diagonal is always open.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      n_vertical: keys, for each query head.
      n_slash: diagonals, for each query head.
      size: queries and keys of the blocks that a diagonal opens, a multiple of the blocks of `attend`.
      rows: how many of the last queries are asked; their scores are there for one key head at a time.
      scale: of the products; None takes ``D ** -0.5``.
    """
    (B, S, H, D), (_, T, heads, _) = q.shape, k.shape
    rows = min(as_integer("vertical_slash", "rows", rows, 1), S)
    scale = D**-0.5 if scale is None else scale
    last, keys = (lax.stop_gradient(x).astype(jnp.float32) for x in (q[:, -rows:], k))
    tokens = jnp.arange(T - rows, T)[:, None]
    distances = jnp.arange(T)

    def mass(head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = scale * jnp.einsum("bqgd,bkd->bgqk", *head)
        weights = jax.nn.softmax(jnp.where(distances <= tokens, scores, -jnp.inf), axis=-1)
        key = tokens - distances
        turned = jnp.take_along_axis(weights, jnp.broadcast_to(jnp.maximum(key, 0), weights.shape), axis=-1)
        return weights.sum(2), jnp.where(key >= 0, turned, 0).sum(2)

    grouped = jnp.moveaxis(last.reshape(B, rows, heads, H // heads, D), 2, 0)
    found = lax.map(mass, (grouped, jnp.moveaxis(keys, 2, 0)))
    vertical, slash = (jnp.moveaxis(x, 0, 1).reshape(B, H, T) for x in found)
    open_keys = lax.top_k(vertical, min(as_integer("vertical_slash", "n_vertical", n_vertical, 1), T))[1]
    n_slash = min(as_integer("vertical_slash", "n_slash", n_slash, 1), T)
    open_distances = lax.top_k(slash.at[..., 0].set(jnp.inf), n_slash)[1]
    bands = masks.blocks(_passed(open_distances, S, T, size), size)
    return (masks.columns(open_keys) | bands) & masks.causal()


def _passed(distances: jax.Array, S: int, T: int, size: tuple[int, int]) -> jax.Array:
    """Returns the blocks in which some key is at one of the distances ``[B, H, n]`` before its query."""
    B, H, _ = distances.shape
    b, h = np.indices((B, H), np.int32)[..., None]
    among = jnp.zeros((B, H, T), jnp.int32).at[b, h, distances].set(1)
    before = jnp.pad(jnp.cumsum(among, axis=-1), ((0, 0), (0, 0), (1, 0)))
    first_q, first_k = np.arange(0, S, size[0])[:, None], np.arange(0, T, size[1])
    last_q, last_k = np.minimum(first_q + size[0], S) - 1, np.minimum(first_k + size[1], T) - 1
    low, high = (np.clip(x + T - S, 0, T) for x in (first_q - last_k, last_q - first_k + 1))
    return before[..., high] > before[..., low]


def choose_pattern(
    q: jax.Array,
    k: jax.Array,
    patterns: Sequence[Mask],
    *,
    of: Mask | None = None,
    scale: float | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns which pattern keeps most of the attention of each head, for `masks.heads`, and what each keeps.

    Patterns of equal cost make a fair choice: `Mask.density` and `BlockMask.density` say what they cost.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      patterns: masks to choose from.
      of, scale, blocks: as `recall` takes them.

    Returns:
      int32 ``[H]``, of equal patterns the first, and float32 ``[len(patterns), H]``, means over the batch.

    Raises:
      ValueError: no patterns.
    """
    if not patterns:
        raise ValueError("choose_pattern: expected at least one pattern")
    kept = jnp.stack([recall(mask, q, k, of=of, scale=scale, blocks=blocks).mean(0) for mask in patterns])
    return kept.argmax(0).astype(jnp.int32), kept
