"""Softmax attention under any mask, by the blocks that the mask leaves to visit.

The forward pass keeps its arguments, its result and one float32 per row and head (FlashAttention, 2022); backward
computes the weights again, a tile at a time. Nothing of size S x T is built.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.attention import masks
from memjax.attention.block_mask import BlockMask, block_mask_in_program
from memjax.attention.choice import (
    Implementation,
    cudnn_attention,
    cudnn_form,
    cudnn_is_taken,
    cudnn_unsupported,
)
from memjax.attention.expression import Mask
from memjax.codecs.fused import whole_arrays
from memjax.core import jaxpr_compat, packing
from memjax.core.first_order import first_order
from memjax.core.random_bits import seed_words
from pallas_kernels import flash_attention as kernels
from pallas_kernels.packed_matmul import on_hopper

_TILE_BYTES = 2**25
"""Most bytes of a tile of float32 scores, of all batch entries and heads, for which XLA's blocks are made larger."""


class _Settings(NamedTuple):
    """What is static; ``mask`` where it has no arrays: backward makes its lists again instead of keeping them."""

    mask: Mask | None
    blocks: tuple[int, int]
    scale: float
    softcap: float | None
    score_mod: Callable[..., jax.Array] | None
    dropout: float
    implementation: Any


class _Extra(NamedTuple):
    """Arrays that have no gradient: lists of blocks, dropout's seed uint32 ``[2]``, pages, what ``score_mod`` reads."""

    block_mask: BlockMask | None
    seed: jax.Array | None
    pages: jax.Array | None
    captured: list[jax.Array]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | None = None,
    block_mask: BlockMask | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: Any = None,
    sink_logits: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: Any = None,
    pages: jax.Array | None = None,
    blocks: tuple[int, int] | None = None,
    return_lse: bool = False,
    return_column_sums: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Returns softmax attention of queries over the keys that a mask shows them.

    Reverse mode keeps q, k, v, the result and the log-sum-exp, besides facts and lists of a mask that has arrays; where
    `memjax.remat` packs residuals it keeps its arguments and computes the rest again. Forward mode and gradients of
    gradients need ``implementation="reference"``.

    Args:
      q: ``[B, S, H, D]``, bfloat16, float16 or float32.
      k: ``[B, T, Hk, D]``; H is a multiple of Hk, and query head h reads key head ``h // (H / Hk)``.
      v: ``[B, T, Hk, Dv]``.
      mask: of `memjax.attention.masks`; None shows all keys.
      block_mask: of `make_block_mask`, in place of ``mask``: lists that are made once and used often.
      score_mod: ``(s, b, h, q, k) -> s``, elementwise, of float32 scores and int32 positions. It may read arrays from
        outside, to which no gradient flows.
      scale: of the products; None takes ``D ** -0.5``.
      softcap: c of ``c * tanh(s / c)``, before ``score_mod``.
      segment_ids: int32 ``[B, S]`` for S = T, or a pair ``[B, S]``, ``[B, T]``: a query sees keys of its own segment.
      sink_logits: float ``[H]``, one more logit of every row, whose value is 0.
      dropout: probability of dropping a weight, in [0, 1).
      dropout_key: its seed: a random key, an integer or integer words. One key is one pattern: give every layer, step
        and shard its own.
      pages: int32 ``[B, T / page]``: k and v are pools ``[n, page, Hk, D]``, and keys ``j * page`` onwards of batch
        entry b are page ``pages[b, j]``.
      blocks: queries and keys per block; None chooses. Not with ``block_mask``, which has its own.
      return_lse: also return the log-sum-exp of every row, the sink included: float32 ``[B, S, H]``, -inf for rows with
        no keys. It has a gradient.
      return_column_sums: also return what every key gets of the weights, float32 ``[B, Hk, T]``, summed over rows and
        the heads of a group, before dropout. It has no gradient.
      implementation: "mosaic_gpu" (Hopper), "cudnn" (full, causal, causal window, lengths), "xla", "reference" (S x T
        scores). None takes cuDNN for full and causal masks where it can run, unless the kernels run and heads are 128
        wide; else the kernels on a Hopper GPU and whole arrays (on several devices, inside shard_map), else XLA.

    Returns:
      ``[B, S, H, Dv]`` in the dtype of ``q``, 0 for rows with no keys; a tuple of it and what else was asked for. NaN
      for queries that lost blocks to the capacity of ``block_mask``.

    Raises:
      ValueError: operands that do not fit each other, an implementation that cannot run, with every reason.
      TypeError: a mask that is none, a gradient for an array that ``score_mod`` reads.
    """
    _check_operands(mask, q=q, k=k, v=v)
    S, T = q.shape[1], k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    if block_mask is not None and (mask is not None or segment_ids is not None or blocks is not None):
        raise ValueError("block_mask stands in place of mask, segment_ids and blocks")
    if not 0 <= dropout < 1 or (dropout and dropout_key is None):
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1, and needs a dropout_key above 0")
    mask = _with_segments(mask, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if implementation in (None, "cudnn"):
        asked = {
            "block_mask": block_mask is not None,
            "score_mod": score_mod is not None,
            "softcap": softcap is not None,
            "sink_logits": sink_logits is not None,
            "dropout": dropout > 0,
            "pages": pages is not None,
            "log-sum-exp to return": return_lse,
            "column sums to return": return_column_sums,
        }
        form = None if block_mask is not None else cudnn_form(mask, S, T)
        reasons = cudnn_unsupported(q, k, v, form, [name for name, given in asked.items() if given])
        if implementation == "cudnn" and reasons:
            raise ValueError(f"cuDNN's attention cannot run: {'; '.join(reasons)}")
        asked_for = implementation == "cudnn"
        if not reasons and form is not None and (asked_for or cudnn_is_taken(form, q.shape[-1], _kernels_run())):
            return _kept_plain(functools.partial(cudnn_attention, form=form, scale=scale))(q, k, v)

    implementation = _of_kernels(implementation)
    if block_mask is None:
        blocks = blocks or _fitted_blocks(mask, q.shape, T, None, None if pages is None else k.shape[1], implementation)
        whole = mask if not jax.tree.leaves(mask) else None
        made = None if whole is not None else block_mask_in_program(mask, S, T, blocks=blocks)
    else:
        _check_sizes(block_mask, S, T)
        whole, made, blocks = None, block_mask, block_mask.blocks
    modified, captured = _closed(score_mod)
    settings = _Settings(whole, blocks, scale, softcap, modified, dropout, implementation)
    seed = jnp.stack(seed_words(dropout_key)) if dropout else None
    extra = _Extra(made, seed, pages, captured)
    trained = q, k, v, sink_logits
    trained = _varying(trained, (trained, extra))
    run = functools.partial(_forward if implementation == "reference" else _attend, settings)
    out, lse = _kept_plain(run)(*trained, extra)
    if made is not None and made.overflow is not None:
        lost = _nan_where_lost(made, q.shape[2])
        out, lse = out + lost[..., None].astype(out.dtype), lse + lost
    results = [out]
    if return_lse:
        results.append(lse)
    if return_column_sums:
        q, k, lse = (jax.lax.stop_gradient(x) for x in (q, k, lse))
        lists = _lists(settings, extra, S, T)
        options = {name: x for name, x in _options(settings, extra).items() if name not in ("dropout", "seed")}
        sums = kernels.column_sums(q, k, lse, lists.by_key, lists.elements, **options)
        results.append(_varying(sums, (trained, extra)))
    return results[0] if len(results) == 1 else tuple(results)


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    *,
    mask: Mask | None = None,
    block_mask: BlockMask | None = None,
    rows: Any = None,
    score_mod: Callable[..., jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    pages: jax.Array | None = None,
    blocks: tuple[int, int] | None = None,
    reduce: kernels.Reduce = "sum",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns what every key gets of the attention of some rows, without a gradient.

    Args:
      q, k, mask, score_mod, scale, softcap, pages, blocks: as `attend` takes them.
      lse: float32 ``[B, S, H]`` that `attend` returned.
      block_mask: in place of ``mask``; with ``rows``, made with the same ones.
      rows: int32 ``[R]``, the queries that count; None for all.
      reduce: over rows and the query heads of a group: "sum" or "max" of the weights (0 for a key that no row sees), or
        "max_logit" of the scores (-inf).
      implementation: "mosaic_gpu", "xla", "reference"; None chooses.

    Returns:
      float32 ``[B, Hk, T]``.

    Raises:
      ValueError: operands that do not fit each other, an implementation that cannot run.
      TypeError: a mask that is none.
    """
    _check_operands(mask, q=q, k=k)
    T = k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    if block_mask is not None and (mask is not None or blocks is not None):
        raise ValueError("block_mask stands in place of mask and blocks")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"expected lse [B, S, H] for q {q.shape}, got {lse.shape}")
    if implementation == "cudnn":
        raise ValueError("cuDNN has no column sums; implementation must be 'mosaic_gpu', 'xla', 'reference' or None")
    how = _of_kernels(implementation)
    if block_mask is None:
        page = None if pages is None else k.shape[1]
        mask = masks.full() if mask is None else mask
        block_mask = block_lists(mask, q.shape, T, rows=rows, page=page, blocks=blocks, implementation=implementation)
    q, k, lse = (jax.lax.stop_gradient(x) for x in (q, k, lse))
    modified = score_mod
    if rows is not None:
        rows = jnp.asarray(rows, jnp.int32)
        q, lse = (jnp.take(x, rows, axis=1, mode="clip") for x in (q, lse))
        if score_mod is not None:
            modified = lambda s, b, h, q, k: score_mod(s, b, h, rows[q], k)  # noqa: E731
    _check_sizes(block_mask, q.shape[1], T)
    sums = kernels.column_sums(
        q,
        k,
        lse,
        block_mask.by_key,
        block_mask.elements,
        blocks=block_mask.blocks,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        score_mod=modified,
        pages=pages,
        reduce=reduce,
        implementation=how,
    )
    return _varying(sums, (q, k, lse, block_mask, pages))


def default_blocks(
    q_shape: tuple[int, ...], keys: int, page: int | None = None, implementation: Implementation | None = None
) -> tuple[int, int]:
    """Returns how many queries and keys `attend` takes as a block.

    128 of each for the kernels. For XLA the largest of 128, 256 and 512 of which a tile of scores stays below 32 MiB,
    and no more than there are.

    Args:
      q_shape: ``[B, S, H, D]``.
      keys: T.
      page: keys per page, which then are those of a block.
      implementation: as `attend` takes it.
    """
    if _of_kernels(implementation) in (None, "mosaic_gpu"):
        return 128, page or 128
    batch, queries, heads, _ = q_shape
    size = 128
    while size < 512 and batch * heads * 4 * (2 * size) ** 2 <= _TILE_BYTES:
        size *= 2
    most = (32 * math.ceil(n / 32) for n in (queries, keys))
    bq, bk = (min(size, n) for n in most)
    return bq, page or bk


def block_lists(
    mask: Mask,
    q_shape: tuple[int, ...],
    T: int,
    *,
    rows: Any = None,
    page: int | None = None,
    blocks: tuple[int, int] | None = None,
    implementation: Implementation | None = None,
) -> BlockMask:
    """Returns the lists of a mask as `attend` makes them: arrays of the program, which several calls may share.

    Args:
      mask: of the queries and keys.
      q_shape: ``[B, S, H, D]`` of the queries.
      T: keys.
      rows: int32 ``[R]``, the queries that take part; None for all.
      page: keys per page, which then are those of a block.
      blocks: queries and keys per block; None chooses.
      implementation: what is going to read them.
    """
    blocks = blocks or _fitted_blocks(mask, q_shape, T, rows, page, implementation)
    return block_mask_in_program(mask, q_shape[1], T, blocks=blocks, rows=rows)


def _fitted_blocks(
    mask: Mask, q_shape: tuple[int, ...], T: int, rows: Any, page: int | None, implementation: Implementation | None
) -> tuple[int, int]:
    """Returns `default_blocks`, for XLA small enough to divide what rectangles a mask selects, unless they are tiny.

    The truth of a rectangle is a flag per block then, and no bits of elements are stored.
    """
    batch, S, *rest = q_shape
    blocks = default_blocks((batch, S if rows is None else len(rows), *rest), T, page, implementation)
    if _of_kernels(implementation) != "xla":
        return blocks
    for _, size in mask.tile_data(S, T):
        common = math.gcd(blocks[0], size[0]), math.gcd(blocks[1], size[1])
        blocks = common if min(common) >= 32 else blocks
    return blocks


def _check_operands(mask: Any, **operands: Any) -> None:
    for name, array in operands.items():
        if array.ndim != 4:
            raise ValueError(f"{name}: expected [batch, positions, heads, width], got shape {array.shape}")
    if mask is not None and not isinstance(mask, Mask):
        made = "; it is called to make one" if callable(mask) else "; masks.array takes a table of bool"
        raise TypeError(f"mask: expected one of memjax.attention.masks, got {type(mask).__name__}{made}")


def _with_segments(mask: Mask | None, segment_ids: Any) -> Mask:
    if segment_ids is None:
        return masks.full() if mask is None else mask
    both = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
    if len(both) not in (1, 2):
        raise ValueError(f"segment_ids: expected [B, S] or a pair of [B, S] and [B, T], got {len(both)} arrays")
    same = masks.segments(*both)
    return same if mask is None else mask & same


def _check_sizes(block_mask: BlockMask, S: int, T: int) -> None:
    if (block_mask.S, block_mask.T) != (S, T):
        raise ValueError(f"block_mask is of S={block_mask.S}, T={block_mask.T}, the operands of S={S}, T={T}")


def _kept_plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fn``, which keeps its arguments alone where `memjax.remat` packs what is kept.

    Weights that are recovered from a log-sum-exp and decoded q and k do not sum to one; computed again they do.
    """
    return jax.checkpoint(fn, prevent_cse=False) if packing.value else fn


_captured = first_order("attend: no gradient flows to arrays that score_mod reads; apply jax.lax.stop_gradient to them")


def _closed(score_mod: Callable[..., jax.Array] | None) -> tuple[Any, list[jax.Array]]:
    """Returns ``score_mod`` and the arrays that it reads, which it then takes first, as one list."""
    if score_mod is None:
        return None, []
    scalar = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, *[jnp.int32] * 4)]
    jaxpr, _ = jaxpr_compat.trace(score_mod, *scalar)
    captured = [_captured(jnp.asarray(x)) for x in jaxpr_compat.consts_of(jaxpr)]
    if not captured:
        return score_mod, []
    closed = jaxpr_compat.without_consts(jaxpr)

    def elementwise(captured: list[jax.Array], *args: jax.Array) -> jax.Array:
        return jnp.vectorize(lambda *xs: jaxpr_compat.evaluate(closed, [*captured, *xs])[0])(*args)

    return elementwise, captured


def _nan_where_lost(block_mask: BlockMask, heads: int) -> jax.Array:
    """Returns float32 ``[B|1, S, H|1]``: NaN for queries that lost blocks to the capacity, 0 for others."""
    lost = jnp.swapaxes(jnp.asarray(block_mask.overflow), 1, 2)
    lost = jnp.repeat(lost, block_mask.blocks[0], axis=1)[:, : block_mask.S]
    if lost.shape[2] > 1:
        lost = jnp.repeat(lost, heads // lost.shape[2], axis=2)
    return jnp.where(lost, jnp.nan, 0.0)


def _of_kernels(implementation: Any) -> Any:
    """Returns "xla" in place of None where the kernels run neither on this device nor on pieces of arrays."""
    return "xla" if implementation is None and not _kernels_run() else implementation


def _kernels_run() -> bool:
    return on_hopper() and whole_arrays()


def _lists(settings: _Settings, extra: _Extra, S: int, T: int) -> BlockMask:
    if settings.mask is not None:
        return block_mask_in_program(settings.mask, S, T, blocks=settings.blocks)
    assert extra.block_mask is not None
    return extra.block_mask


def _options(settings: _Settings, extra: _Extra) -> dict[str, Any]:
    score_mod = settings.score_mod
    if score_mod is not None and extra.captured:
        score_mod = functools.partial(score_mod, extra.captured)
    return {
        "blocks": settings.blocks,
        "scale": settings.scale,
        "softcap": settings.softcap,
        "score_mod": score_mod,
        "dropout": settings.dropout,
        "seed": extra.seed,
        "pages": extra.pages,
        "implementation": settings.implementation,
    }


def _sizes(q: jax.Array, k: jax.Array, extra: _Extra) -> tuple[int, int]:
    return q.shape[1], k.shape[1] if extra.pages is None else extra.pages.shape[1] * k.shape[1]


def _forward(
    settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array | None, extra: _Extra
) -> tuple[jax.Array, jax.Array]:
    lists = _lists(settings, extra, *_sizes(q, k, extra))
    found = kernels.forward(q, k, v, lists.by_query, lists.elements, sink=sink, **_options(settings, extra))
    return _varying(found, (q, k, v, sink, extra))


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _keep(
    settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array | None, extra: _Extra
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    out, lse = _forward(settings, q, k, v, sink, extra)
    return (out, lse), (q, k, v, sink, extra, out, lse)


def _backward(settings: _Settings, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, sink, extra, out, lse = kept
    do, dlse = cotangents
    # Apart from what follows, XLA sums along a row by the threads of a warp; with it, each thread reads a row alone.
    delta = jax.lax.optimization_barrier(jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse)
    lists, options = _lists(settings, extra, *_sizes(q, k, extra)), _options(settings, extra)
    args = q, k, v, do, lse, delta
    dq = kernels.query_gradient(*args, lists.by_query, lists.elements, **options)
    dk, dv = kernels.key_value_gradients(*args, lists.by_key, lists.elements, **options)
    d_sink = None
    if sink is not None:
        weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(sink.astype(jnp.float32) - lse))
        d_sink = -jnp.sum(weight * delta, axis=(0, 1)).astype(sink.dtype)
    return *_varying((dq, dk, dv, d_sink), kept), None


def _varying(found: Any, inputs: Any) -> Any:
    """Marks what a kernel made as varying over the mesh axes of shard_map over which its inputs do."""
    leaves = jax.tree.leaves(inputs)
    return jax.tree.map(lambda x: jaxpr_compat.vary_like(x, leaves), found)


_attend.defvjp(_keep, _backward)
