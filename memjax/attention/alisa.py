"""ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching (2024).

Its sparse window attention.
"""

from __future__ import annotations

import jax

from memjax.attention import masks
from memjax.attention.attend import attend
from memjax.attention.expression import Mask, as_integer


def alisa_mask(
    q: jax.Array,
    k: jax.Array,
    *,
    local: int,
    heavy: int,
    rows: int | None = None,
    scale: float | None = None,
    blocks: tuple[int, int] | None = None,
) -> Mask:
    """Returns the causal mask of the nearest keys and of those that get most of the attention, for prefill.

    In the paper the heavy keys of a step are those of the attention so far; here they are those of the last ``rows``
    queries, the same ones for every query of the prompt.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``.
      local: keys of the window, the query's own included.
      heavy: keys that every query sees, for each key head.
      rows: how many of the last queries are asked, which costs ``rows / S`` of an attention; None asks all.
      scale, blocks: as `attend` takes them.
    """
    as_integer("alisa_mask", "local", local, 1)
    last = q.shape[1] if rows is None else min(as_integer("alisa_mask", "rows", rows, 1), q.shape[1])
    q, k = jax.lax.stop_gradient((q[:, -last:], k))
    sums = attend(q, k, k, mask=masks.causal(), scale=scale, blocks=blocks, return_column_sums=True)[1]
    keys = jax.lax.top_k(sums, min(as_integer("alisa_mask", "heavy", heavy, 1), k.shape[1]))[1]
    return (masks.window(local - 1, 0) | masks.columns(keys)) & masks.causal()
