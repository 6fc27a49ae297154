"""Cross-entropy of a causal language model in chunks of tokens, so that full logits never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memjax.core import operation, register_rule


def chunked_cross_entropy(
    hidden: jax.Array,
    head: Any,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    head_axis: int = 0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the negative log likelihoods of ``labels`` under ``softmax(hidden @ head)``.

    The gradient is taken chunk by chunk in the forward pass, so a chunk's logits are computed once and dropped, and
    backward only scales what forward kept: one array like ``hidden``, and one like ``head`` if the head is trained.
    Logits and the log-sum-exp are float32; the gradient's products run in the dtype of ``hidden``. Under
    `memjax.lift` the head may be a weight view, packed or adapted.

    Args:
      hidden: ``[B, S, D]``, float.
      head: ``[D, V]`` or ``[V, D]``, float; give a tied embedding as it is stored, for a transposed one is a copy.
      labels: int32 ``[B, S]``.
      weights: float32 ``[B, S]``, 0 where a label does not count; None counts all.
      head_axis: the axis of ``head`` of size D, 0 or 1.
      chunk: tokens per chunk.

    Returns:
      (weighted sum of the negative log likelihoods in nats, sum of the weights), both float32 scalars.

    Raises:
      ValueError: shapes that do not fit, or a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if hidden.shape[:-1] != labels.shape or head.shape[head_axis] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape} (D is axis {head_axis}) and labels {labels.shape} do not fit "
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

    summed = _summed if head_axis == 0 else _summed_tied
    total = summed(chunks(hidden), head.astype(hidden.dtype), chunks(labels), chunks(weights))
    return total, weights.sum()


def _sum_of_chunks(
    lift: Callable[..., Any], hidden: jax.Array, head: Any, labels: jax.Array, weights: jax.Array, *, head_axis: int
) -> jax.Array:
    """Sums the weighted losses of chunks ``hidden [n, c, D]``, ``labels`` and ``weights [n, c]``."""
    contraction = (((1,), (head_axis,)), ((), ()))
    logits_of = lift(lambda h, w: jax.lax.dot_general(h, w, contraction, preferred_element_type=jnp.float32))
    product = lift(lambda h, w: jax.lax.dot_general(h, w, contraction))
    tree = jax.tree.structure(head)

    def loss(h: jax.Array, head: Any, label: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(h, head)
        is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == label[:, None]
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        nll = normalizer - jnp.where(is_label, logits, 0.0).sum(axis=-1)
        slope = weight[:, None] * (jnp.exp(logits - normalizer[:, None]) - is_label)
        return jnp.sum(weight * nll), slope.astype(h.dtype)

    @jax.custom_vjp
    def total(hidden: jax.Array, head: Any, labels: jax.Array, weights: jax.Array) -> jax.Array:
        def add(value: jax.Array, part: Any) -> tuple[jax.Array, None]:
            h, label, weight = part
            return value + loss(h, head, label, weight)[0], None

        return jax.lax.scan(add, jnp.float32(0), (hidden, labels, weights))[0]

    def forward(*primals: Any) -> tuple[jax.Array, Any]:
        leaves = jax.tree.leaves(primals[1], is_leaf=_is_primal)
        trained = [leaf.perturbed for leaf in leaves]
        hidden, head, labels, weights = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
        values = jax.tree.leaves(head)

        def multiply(h: jax.Array, variables: list[jax.Array]) -> jax.Array:
            rest = iter(variables)
            return product(h, jax.tree.unflatten(tree, [next(rest) if t else v for t, v in zip(trained, values)]))

        def add(carry: Any, part: Any) -> tuple[Any, jax.Array]:
            h, label, weight = part
            value, slope = loss(h, head, label, weight)
            dh, grads = jax.vjp(multiply, h, variables)[1](slope)
            sums = [so_far + grad.astype(jnp.float32) for so_far, grad in zip(carry[1], grads)]
            return (carry[0] + value, sums), dh

        variables = [v for t, v in zip(trained, values) if t]
        start = (jnp.float32(0), [jnp.zeros(v.shape, jnp.float32) for v in variables])
        (value, sums), d_hidden = jax.lax.scan(add, start, (hidden, labels, weights))
        rest = iter(grad.astype(v.dtype) for grad, v in zip(sums, variables))
        return value, (d_hidden, [next(rest) if t else None for t in trained])

    def backward(kept: Any, g: jax.Array) -> tuple[jax.Array, Any, None, None]:
        d_hidden, grads = jax.tree.map(lambda x: (x * g).astype(x.dtype), kept)
        return d_hidden, jax.tree.unflatten(tree, grads), None, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(hidden, head, labels, weights)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _as_operation(name: str, head_axis: int) -> Callable[..., jax.Array]:
    rule = functools.partial(_sum_of_chunks, head_axis=head_axis)
    register_rule(name, rule)
    return operation(name)(lambda *arrays: rule(lambda fn: fn, *arrays))


_summed = _as_operation("chunked_cross_entropy", 0)
_summed_tied = _as_operation("chunked_cross_entropy_tied", 1)
