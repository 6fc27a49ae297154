"""Block-sparse attention, its gradients and the mass per key: which implementation runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.codec.api import Implementation, runs_kernel
from pallas_kernels.flash_attention import backward, blockwise, kernel, reference
from pallas_kernels.flash_attention.lists import BlockList, Elements
from pallas_kernels.flash_attention.scores import Reduce, ScoreMod
from pallas_kernels.linear_cross_entropy.api import multiprocessors

_MODULES: dict[str | None, Any] = {None: blockwise, "xla": blockwise, "reference": reference}


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    by_query: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    sink: jax.Array | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    pages: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax attention over the blocks that are listed, and the log-sum-exp of every row.

    Scores are ``scale * q k``, then capped, then modified, then masked; the softmax is in float32.

    Args:
      q: bfloat16, float16 or float32 ``[B, S, H, D]``.
      k: ``[B, T, Hk, D]``; H is a multiple of Hk, and query head h reads key head ``h // (H / Hk)``.
      v: ``[B, T, Hk, Dv]``.
      by_query: the key blocks that each block of queries visits.
      elements: which elements of the blocks that are visited in part take part.
      blocks: queries and keys per block.
      scale: of the products.
      softcap: c of ``c * tanh(s / c)``.
      score_mod: ``(s, b, h, q, k) -> s``, of float32 scores and int32 positions that broadcast; elementwise.
      sink: float32 ``[H]``, one more logit of every row, whose value is 0.
      dropout: probability of dropping a weight, in [0, 1).
      seed: of dropout, as `pallas_kernels._bits.seed_words` takes it.
      pages: int32 ``[B, T / page]``: k and v are pools ``[pages, page, Hk, D]``, and key block j of batch b is page
        ``pages[b, j]``; keys per block are those of a page.
      implementation: ``"mosaic_gpu"`` (Hopper; lists of 128 queries, the last block of keys partial if T does not fill
        it), ``"xla"`` (a tile of scores at a time), ``"reference"`` (S x T scores); None takes the kernel on a Hopper
        GPU where it can run, else XLA.

    Returns:
      ``[B, S, H, Dv]`` in the dtype of ``q``, 0 in rows with no keys, and float32 ``[B, S, H]``, the sink included and
      -inf in rows with neither keys nor sink.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    _check(q, k, by_query, blocks, pages, 0, v=v, elements=elements)
    if sink is not None and sink.shape != q.shape[2:3]:
        raise ValueError(f"expected a sink logit per query head, [{q.shape[2]}], got {sink.shape}")
    _check_dropout(dropout, seed)
    reason = kernel.unsupported(q, k, v, blocks=blocks, pages=pages, score_mod=score_mod)
    if runs_kernel("flash_attention forward", reason, implementation):
        return kernel.forward(
            q,
            k,
            v,
            by_query,
            elements,
            blocks=blocks,
            scale=scale,
            softcap=softcap,
            score_mod=score_mod,
            sink=sink,
            dropout=dropout,
            seed=seed,
            pages=pages,
            multiprocessors=multiprocessors(),
        )
    return _MODULES[implementation].forward(
        q,
        k,
        v,
        by_query,
        elements,
        blocks=blocks,
        scale=scale,
        softcap=softcap,
        score_mod=score_mod,
        sink=sink,
        dropout=dropout,
        seed=seed,
        pages=pages,
    )


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    by_query: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    pages: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns the gradient of ``q``, in its shape and dtype.

    Args:
      q, k, v, by_query, elements: as in `forward`.
      do: gradient of the result, ``[B, S, H, Dv]``.
      lse: float32 ``[B, S, H]`` that `forward` returned.
      delta: float32 ``[B, S, H]``, the sum of ``do * out`` over Dv less the gradient of ``lse``.
      blocks, scale, softcap, score_mod, dropout, seed, pages, implementation: as in `forward`.

    Raises:
      ValueError: operands that do not fit each other.
    """
    settings: dict[str, Any] = {"blocks": blocks, "scale": scale, "softcap": softcap, "score_mod": score_mod}
    settings |= {"dropout": dropout, "seed": seed}
    operands = q, k, v, do, lse, delta, by_query, elements
    return _gradients("query_gradient", 0, operands, settings, pages, implementation)


def key_value_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    by_key: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    pages: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``k`` and ``v``, each in its shape and dtype, summed over the query heads of a group.

    Args:
      q, k, v, elements: as in `forward`.
      do, lse, delta: as in `query_gradient`.
      by_key: the query blocks that visit each block of keys.
      blocks, scale, softcap, score_mod, dropout, seed, pages, implementation: as in `forward`.

    Raises:
      ValueError: operands that do not fit each other.
    """
    settings: dict[str, Any] = {"blocks": blocks, "scale": scale, "softcap": softcap, "score_mod": score_mod}
    settings |= {"dropout": dropout, "seed": seed}
    operands = q, k, v, do, lse, delta, by_key, elements
    return _gradients("key_value_gradients", 1, operands, settings, pages, implementation)


def _gradients(
    name: str, side: int, operands: tuple[Any, ...], settings: dict[str, Any], pages: Any, implementation: Any
) -> Any:
    """Returns what the function ``name`` of an implementation makes of the operands; side: as in `_check`."""
    q, k, v, do, lse, delta, lists, elements = operands
    _check(q, k, lists, settings["blocks"], pages, side, v=v, do=do, lse=lse, delta=delta, elements=elements)
    _check_dropout(settings["dropout"], settings["seed"])
    reason = backward.backward_unsupported(
        q, k, v, blocks=settings["blocks"], score_mod=settings["score_mod"], pages=pages
    )
    if runs_kernel(f"flash_attention {name}", reason, implementation):
        return getattr(backward, name)(*operands, **settings)
    return getattr(_MODULES[implementation], name)(*operands, pages=pages, **settings)


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    by_key: BlockList,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    pages: jax.Array | None = None,
    reduce: Reduce = "sum",
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns what every key gets of the attention of all rows, of all query heads of its group.

    Args:
      q, k, elements: as in `forward`.
      lse: float32 ``[B, S, H]`` that `forward` returned.
      by_key: the query blocks that visit each block of keys.
      blocks, scale, softcap, score_mod, pages, implementation: as in `forward`.
      reduce: "sum" or "max" of the weights (0 for a key of no row), or "max_logit" of the scores (-inf).

    Returns:
      float32 ``[B, Hk, T]``.

    Raises:
      ValueError: operands that do not fit each other.
    """
    _check(q, k, by_key, blocks, pages, 1, lse=lse, elements=elements)
    if reduce not in ("sum", "max", "max_logit"):
        raise ValueError(f"reduce must be 'sum', 'max' or 'max_logit', got {reduce!r}")
    reason = kernel.unsupported(q, k, blocks=blocks, pages=pages, score_mod=score_mod, keys_have_lists=True)
    if runs_kernel("flash_attention column_sums", reason, implementation):
        return kernel.column_sums(
            q,
            k,
            lse,
            by_key,
            elements,
            blocks=blocks,
            scale=scale,
            softcap=softcap,
            score_mod=score_mod,
            pages=pages,
            reduce=reduce,
            multiprocessors=multiprocessors(),
        )
    return _MODULES[implementation].column_sums(
        q,
        k,
        lse,
        by_key,
        elements,
        blocks=blocks,
        scale=scale,
        softcap=softcap,
        score_mod=score_mod,
        pages=pages,
        reduce=reduce,
    )


def merge(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the attention over two disjoint sets of keys from that over each; associative and commutative.

    Args:
      first, second: a result ``[..., Dv]`` and its log-sum-exp, float32 ``[...]``, -inf for no keys.

    Returns:
      The same of both, the result in the wider dtype.
    """
    (out, lse), (other, other_lse) = first, second
    top = jnp.maximum(lse, other_lse)
    base = jnp.where(top == -jnp.inf, 0, top)
    weight, other_weight = jnp.exp(lse - base), jnp.exp(other_lse - base)
    total = weight + other_weight
    some = jnp.where(total == 0, 1, total)
    joined = (weight / some)[..., None] * out + (other_weight / some)[..., None] * other
    joined_lse = jnp.where(total == 0, -jnp.inf, base + jnp.log(some))
    return joined.astype(jnp.promote_types(out.dtype, other.dtype)), joined_lse


def _check_dropout(dropout: float, seed: Any) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    if dropout and seed is None:
        raise ValueError(f"dropout={dropout} needs a seed")


def _check(
    q: jax.Array,
    k: jax.Array,
    lists: BlockList,
    blocks: tuple[int, int],
    pages: jax.Array | None,
    side: int,
    *,
    elements: Elements,
    v: jax.Array | None = None,
    **by_row: jax.Array,
) -> None:
    """Raises ValueError unless the operands fit each other; side: of which the lists are, 0 queries and 1 keys."""
    layout = "expected q [B, S, H, D] and k [B, T, Hk, D] with H a multiple of Hk"
    if q.ndim != 4 or k.ndim != 4 or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{layout}, got {q.shape} and {k.shape}")
    if pages is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{layout}, got {q.shape} and {k.shape}")
    if v is not None and (v.ndim != 4 or v.shape[:3] != k.shape[:3]):
        raise ValueError(f"expected v {(*k.shape[:3], 'Dv')} beside k {k.shape}, got {v.shape}")
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != q.shape[0]):
        raise ValueError(f"expected pages [B, T / page] for q {q.shape}, got {pages.shape}")
    if pages is not None and blocks[1] != k.shape[1]:
        raise ValueError(f"with pages, keys per block are those of a page, {k.shape[1]}, got {blocks[1]}")
    for name, x in by_row.items():
        if x.shape[:3] != q.shape[:3]:
            raise ValueError(f"expected {name} [B, S, H, ...] for q {q.shape}, got {x.shape}")
    sizes = q.shape[1], k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    count = -(-sizes[side] // blocks[side])
    batch, heads, listed, _ = lists.index.shape
    if batch not in (1, q.shape[0]) or heads not in (1, k.shape[2], q.shape[2]) or listed != count:
        raise ValueError(
            f"expected lists [1 or {q.shape[0]}, 1, {k.shape[2]} or {q.shape[2]}, {count}, M] for blocks of {blocks}, "
            f"got {lists.index.shape}"
        )
    if elements.bits is not None and (elements.bits.shape[1:] != (blocks[0] // 32, blocks[1]) or blocks[0] % 32):
        raise ValueError(f"expected bits [n, bq / 32, bk] for blocks of {blocks}, got {elements.bits.shape}")
