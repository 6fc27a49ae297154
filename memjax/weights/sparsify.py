"""Storing pruned weights sparse: one function for every sparse format."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from memjax.codecs import Codec
from memjax.core.paths import Patterns, map_with_path, select
from memjax.core.views import Axes
from memjax.weights import bitmap, nm_sparse, tiled_csl
from memjax.weights.quantize import AxesTable, axes_of, check_dense, check_table


def sparsify(
    params: Any,
    pattern: str,
    where: Patterns = "**/kernel",
    *,
    sparsity: float | None = None,
    masks: Mapping[str, Any] | None = None,
    codec: Codec | None = None,
    storage: Literal["indices", "bitmap"] | None = None,
    axes: AxesTable | None = None,
) -> Any:
    """Returns ``params`` with the selected weights stored sparse.

    Without ``masks``, ``"n:m"`` keeps the n largest elements of every m consecutive ones along the last input axis of a
    column; ``"bitmap"`` and ``"tiled_csl"`` keep the largest elements of every batch slice down to ``sparsity``, or
    without one the nonzero elements.

    Args:
      params: any pytree of arrays.
      pattern: ``"2:4"`` or any ``"n:m"``, ``"bitmap"`` or ``"tiled_csl"``.
      where: pattern(s) over logical paths, or a predicate of (path, leaf).
      sparsity: fraction of elements that become zero; for ``"bitmap"`` and ``"tiled_csl"``.
      masks: path -> bool array of the weight's shape, true where an element is kept, for every selected weight.
      codec: format of the kept values of an ``"n:m"`` pattern stored by indices; groups count kept elements.
      storage: how an ``"n:m"`` pattern is stored: ``"indices"`` (`NMSparse`) or ``"bitmap"`` (`Bitmap`); None takes
        indices up to m = 16, a bitmap above, where it is smaller.
      axes: pattern -> input and output axes, for weights that are not ``[*batch, in, out]``.

    Raises:
      ValueError: a pattern that matches nothing or is unknown, arguments that do not go together, sizes that do not fit
        the pattern, a mask that is missing, of another shape or too full, a weight that is not finite.
      TypeError: a selected leaf that is a view already or not floating point.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found and pattern not in ("bitmap", "tiled_csl"):
        raise ValueError(f"expected a pattern such as '2:4', 'bitmap' or 'tiled_csl', got {pattern!r}")
    n, m = map(int, found.groups()) if found else (0, 0)
    by_indices = bool(found) and (m <= 16 if storage is None else storage == "indices")
    if found and sparsity is not None:
        raise ValueError(f"pattern {pattern} says how many elements are kept; leave out sparsity={sparsity}")
    if not found and storage is not None:
        raise ValueError(f"pattern {pattern!r} is a way of storing already; leave out storage={storage!r}")
    if storage not in (None, "indices", "bitmap"):
        raise ValueError(f"expected storage 'indices' or 'bitmap', got {storage!r}")
    if codec is not None and not by_indices:
        raise ValueError(f"values can be coded in an n:m pattern stored by indices only, got {pattern!r} and {codec}")
    if sparsity is not None and (masks is not None or not 0 <= sparsity <= 1):
        raise ValueError(f"expected a sparsity between 0 and 1, or masks in its place, got {sparsity}")
    chosen = set(select(params, where))
    check_table(params, axes)
    if masks is not None and set(masks) != chosen:
        raise ValueError(f"expected masks of exactly the selected weights, these differ: {sorted(set(masks) ^ chosen)}")

    def store(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        check_dense(path, leaf)
        w, leaf_axes = jnp.asarray(leaf), axes_of(path, leaf.shape, axes)
        try:
            if masks is not None:
                mask = _given(masks[path], w)
            elif found:
                mask = nm_sparse.by_magnitude(w, leaf_axes, n, m)
            else:
                mask = w != 0 if sparsity is None else by_magnitude(w, leaf_axes, sparsity)
            if by_indices:
                return nm_sparse.encode(w, mask, leaf_axes, n, m, codec)
            if found:
                nm_sparse.check_mask(mask, leaf_axes, n, m)
            return (tiled_csl if pattern == "tiled_csl" else bitmap).encode(w, mask, leaf_axes)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None

    return map_with_path(store, params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def by_magnitude(w: jax.Array, axes: Axes, sparsity: float) -> jax.Array:
    """Returns the mask of the largest elements of every batch slice, all but ``round(sparsity * size)`` of them."""
    flat = jnp.abs(w).reshape(*w.shape[: w.ndim - axes.ndim], -1)
    dropped = round(sparsity * flat.shape[-1])
    rank = jnp.argsort(jnp.argsort(flat, -1, stable=True), -1)
    return (rank >= dropped).reshape(w.shape)


def _given(mask: Any, w: jax.Array) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.shape != w.shape or mask.dtype != jnp.bool_:
        raise ValueError(f"expected a bool mask of shape {w.shape}, got {mask.dtype} {mask.shape}")
    return mask
