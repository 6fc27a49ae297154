"""Cross-entropy of a causal language model in chunks of tokens, so that full logits never exist."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    hidden: jax.Array, head: Any, labels: jax.Array, weights: jax.Array | None = None, *, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the negative log likelihoods of ``labels`` under ``softmax(hidden @ head)``.

    A scan goes over chunks of tokens and a checkpoint drops each chunk's logits, so forward and backward hold
    logits of ``chunk * V`` elements instead of ``B * S * V``. Products are accumulated, and the log-sum-exp
    is taken, in float32. ``head`` is only multiplied by, so it may be a weight view under `memjax.lift`.

    Args:
      hidden: ``[B, S, D]``, float.
      head: ``[D, V]``, float.
      labels: int32 ``[B, S]``.
      weights: float32 ``[B, S]``, 0 where a label does not count; None counts all.
      chunk: tokens per chunk.

    Returns:
      (weighted sum of the negative log likelihoods in nats, sum of the weights), both float32 scalars.

    Raises:
      ValueError: shapes that do not fit, or a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if hidden.shape[:-1] != labels.shape or head.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape} and labels {labels.shape} do not fit "
            "[B, S, D], [D, V] and [B, S]"
        )
    if weights is None:
        weights = jnp.ones(labels.shape, jnp.float32)
    elif weights.shape != labels.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of the labels, {labels.shape}")
    weights = weights.astype(jnp.float32)
    tokens = labels.size
    chunk = min(chunk, tokens)
    count = -(-tokens // chunk)

    def chunks(x: jax.Array) -> jax.Array:
        flat = x.reshape(tokens, *x.shape[labels.ndim :])
        padding = [(0, count * chunk - tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(count, chunk, *flat.shape[1:])

    def body(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, label, weight = inputs
        logits = jnp.matmul(h, head, preferred_element_type=jnp.float32)
        # A masked sum instead of an index: its gradient is elementwise, a gather's would be a scatter.
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        of_label = jnp.where(vocabulary == label[:, None], logits, 0.0).sum(axis=-1)
        return total + jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - of_label)), None

    total, _ = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False),
        jnp.zeros((), jnp.float32),
        (chunks(hidden), chunks(labels), chunks(weights)),
    )
    return total, weights.sum()
