"""Attention over a sequence that is split over devices, each with some of the tokens.

"ring": keys and values travel around the devices, and partial results are merged by their log-sum-exp (Ring Attention,
2023). "heads": queries, keys and values are exchanged, so that each device has all tokens of some heads (DeepSpeed
Ulysses, 2023). Of a causal mask, devices that hold later tokens have more to do; with `balanced_order` each holds an
early and a late piece, and all do the same (Striped and zigzag attention, 2023).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.attention import BlockMask, Mask, attend, default_blocks, make_block_mask, masks
from memjax.core import jaxpr_compat
from pallas_kernels import flash_attention as kernels

Method = Literal["ring", "heads"]


class _Settings(NamedTuple):
    """What is static."""

    axis: str
    sizes: tuple[int, int]
    blocks: tuple[int, int]
    options: tuple[tuple[str, Any], ...]


class _Where(NamedTuple):
    """The mask of the whole sequence, and the positions of each device's tokens, int32 ``[n, S / n]``."""

    mask: Mask
    positions: jax.Array


def attend_sharded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    mask: Mask | None = None,
    segment_ids: jax.Array | None = None,
    method: Method = "ring",
    balanced: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    blocks: tuple[int, int] | None = None,
) -> jax.Array:
    """Returns what `memjax.attention.attend` gives for the whole sequence; to be called inside `jax.shard_map`.

    A step of the ring visits the blocks that the mask leaves between a device's queries and the keys that have come by.
    Reverse mode keeps the device's own q, k, v and result, and one float32 per row and head; keys and values, and their
    gradients, travel once more.

    Args:
      q: ``[B, S / n, H, D]``, the tokens of this device; n is the size of ``axis``.
      k: ``[B, S / n, Hk, D]``.
      v: ``[B, S / n, Hk, Dv]``.
      axis: mesh axis over which the sequence is split.
      mask: of the whole sequence, its facts about all S tokens in their own order; None shows all keys.
      segment_ids: int32 ``[B, S / n]`` of this device's tokens: a query sees keys of its own segment.
      method: "ring", or "heads", where H and Hk are multiples of n (or n of Hk), and masks differ in no heads.
      balanced: the sequence was split in the order of `balanced_order`.
      scale, softcap, blocks: as `memjax.attention.attend` takes them.

    Returns:
      ``[B, S / n, H, Dv]`` in the dtype of ``q``.

    Raises:
      ValueError: an unknown method, sizes that do not fit it or each other.
    """
    if method not in ("ring", "heads"):
        raise ValueError(f"method must be 'ring' or 'heads', got {method!r}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"expected as many queries as keys on a device, got {q.shape[1]} and {k.shape[1]}")
    n, local = lax.axis_size(axis), q.shape[1]
    S = n * local
    order = balanced_order(S, n)[0] if balanced else np.arange(S, dtype=np.int32)
    mask = masks.full() if mask is None else mask
    if segment_ids is not None:
        ids = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
        mask = mask & masks.segments(ids[:, np.argsort(order)])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if method == "heads":
        return _by_heads(q, k, v, axis, mask, order if balanced else None, scale, softcap, blocks)
    settings = _Settings(
        axis,
        (S, S),
        blocks or default_blocks(q.shape, local),
        (("scale", scale), ("softcap", softcap)),
    )
    where = _Where(mask, jnp.asarray(order.reshape(n, local)))
    return _ring(settings, *_varying((q, k, v), (q, k, v, where)), where)


def balanced_order(S: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of tokens in which n devices have the same share of a causal mask, and the way back.

    Of 2 n pieces, device i has pieces i and 2 n - 1 - i: ``x[:, order]`` is split, and ``y[:, back]`` put together.

    Args:
      S: tokens, a multiple of 2 n.
      n: devices.

    Returns:
      The order and its inverse, int32 ``[S]`` each.

    Raises:
      ValueError: another number of tokens.
    """
    if n < 1 or S % (2 * n):
        raise ValueError(f"balanced_order: expected a multiple of 2 n = {2 * n} tokens, got {S}")
    pieces = np.arange(S, dtype=np.int32).reshape(2 * n, -1)
    order = np.stack([pieces[:n], pieces[: n - 1 : -1]], axis=1).reshape(-1)
    return order, np.argsort(order).astype(np.int32)


def _by_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    axis: str,
    mask: Mask,
    order: np.ndarray | None,
    scale: float,
    softcap: float | None,
    blocks: tuple[int, int] | None,
) -> jax.Array:
    n, heads, key_heads = lax.axis_size(axis), q.shape[2], k.shape[2]
    if heads % n or (key_heads % n and n % key_heads):
        raise ValueError(f"method='heads' cannot split {heads} and {key_heads} heads over {n} devices; 'ring' can")
    if key_heads < n:
        k, v = (jnp.repeat(x, n // key_heads, axis=2) for x in (k, v))
    q, k, v = (lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    S = q.shape[1]
    options: dict[str, Any] = {"mask": mask, "blocks": blocks}
    if order is not None:
        lists = make_block_mask(mask, S, S, blocks=blocks or default_blocks(q.shape, S), rows=order, columns=order)
        options = {"block_mask": lists}
    out = attend(q, k, v, scale=scale, softcap=softcap, **options)
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)


def _lists(settings: _Settings, where: _Where, step: Any) -> BlockMask:
    """Returns the blocks between this device's queries and the keys that have come by after some steps."""
    n, here = where.positions.shape[0], lax.axis_index(settings.axis)
    rows, columns = (where.positions[i] for i in (here, (here - step) % n))
    return make_block_mask(where.mask, *settings.sizes, blocks=settings.blocks, rows=rows, columns=columns)


def _pass_on(settings: _Settings, tree: Any) -> Any:
    n = lax.axis_size(settings.axis)
    return lax.ppermute(tree, settings.axis, [(i, (i + 1) % n) for i in range(n)])


def _forward(
    settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where
) -> tuple[jax.Array, jax.Array]:
    """Returns the result and the log-sum-exp of every row."""

    def partial(k: jax.Array, v: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        lists = _lists(settings, where, step)
        options = dict(settings.options) | {"blocks": settings.blocks}
        out, lse = kernels.forward(q, k, v, lists.by_query, lists.elements, **options)
        return _varying((out.astype(jnp.float32), lse), (q, k, v, where, lax.axis_index(settings.axis)))

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        k, v, found = carry
        k, v = _pass_on(settings, (k, v))
        return (k, v, kernels.merge(found, partial(k, v, step))), None

    steps = jnp.arange(1, lax.axis_size(settings.axis))
    (_, _, (out, lse)), _ = lax.scan(turn, (k, v, partial(k, v, 0)), steps)
    return out.astype(q.dtype), lse


def _value(settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where) -> jax.Array:
    return _forward(settings, q, k, v, where)[0]


def _keep(settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, where: _Where) -> tuple[jax.Array, Any]:
    out, lse = _forward(settings, q, k, v, where)
    return out, (q, k, v, where, out, lse)


def _backward(settings: _Settings, kept: Any, do: jax.Array) -> tuple[Any, ...]:
    q, k, v, where, out, lse = kept
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def partial(k: jax.Array, v: jax.Array, step: Any) -> Any:
        lists = _lists(settings, where, step)
        options = dict(settings.options) | {"blocks": settings.blocks}
        args = q, k, v, do, lse, delta
        dq = kernels.query_gradient(*args, lists.by_query, lists.elements, **options)
        dk, dv = kernels.key_value_gradients(*args, lists.by_key, lists.elements, **options)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (dq, dk, dv))
        return _varying(wide, (kept, do, lax.axis_index(settings.axis)))

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        dq, *travelling = carry
        k, v, dk, dv = _pass_on(settings, travelling)
        found = partial(k, v, step)
        dq, dk, dv = (x + y for x, y in zip((dq, dk, dv), found))
        return (dq, k, v, dk, dv), None

    dq, dk, dv = partial(k, v, 0)
    steps = jnp.arange(1, lax.axis_size(settings.axis))
    (dq, _, _, dk, dv), _ = lax.scan(turn, (dq, k, v, dk, dv), steps)
    dk, dv = _pass_on(settings, (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _varying(found: Any, inputs: Any) -> Any:
    """Marks arrays as varying over the mesh axes over which inputs do."""
    leaves = jax.tree.leaves(inputs)
    return jax.tree.map(lambda x: jaxpr_compat.vary_like(x, leaves), found)


_ring = jax.custom_vjp(_value, nondiff_argnums=(0,))
_ring.defvjp(_keep, _backward)
