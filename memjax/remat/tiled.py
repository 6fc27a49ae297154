"""Token-wise functions in chunks: what one chunk needs between its layers exists for one chunk at a time.

The idea is that of sequence-tiled MLPs and heads (Bekman et al., "Arctic Long Sequence Training", 2025) and of the
chunked feed-forward layers of Kitaev et al., "Reformer: The Efficient Transformer", 2020.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def tiled(f: Callable[..., Any], axis: int, chunks: int, *, params: tuple[int, ...] = (0,)) -> Callable[..., Any]:
    """Returns ``f`` run on one chunk of its inputs after another along ``axis``.

    ``f`` must treat the positions of ``axis`` alike and apart, as an MLP, a norm or an output head does. Forward
    keeps the inputs alone; backward runs ``f`` on each chunk again. So instead of what ``f`` holds for all
    positions, a chunk's share of it exists at a time. Values are those of ``f``; gradients of params are summed over
    chunks in float32.

    Args:
      f: ``f(*args) -> out``; pytrees of arrays.
      axis: the axis of every input (other than params) and of every output that is cut.
      chunks: number of chunks of ``ceil(n / chunks)`` positions; where they do not come out even, the last is shorter
        and at times there are fewer.
      params: the positions of arguments that every chunk gets whole.

    Returns:
      A function of the same positional arguments.

    Raises:
      ValueError: chunks below 1 or above the size of the axis, inputs that differ in it, or (when called) an output
        that does not have the axis of its chunk.
    """
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1")

    @functools.wraps(f)
    def run(*args: Any) -> Any:
        whole = {i: arg for i, arg in enumerate(args) if i in params}
        cut = {i: arg for i, arg in enumerate(args) if i not in params}
        total = _common_size(cut, axis)
        if chunks > total:
            raise ValueError(f"chunks={chunks} is more than the {total} positions of axis {axis}")
        size = -(-total // chunks)
        count, rest = divmod(total, size)
        # Cast here and back inside, so that the transpose of the scan sums gradients in float32. XLA cancels the two.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_half(x) else x, whole)

        def on_chunk(wide: Any, part: Any) -> Any:
            own = jax.tree.map(lambda w, x: w.astype(x.dtype) if _is_half(x) else w, wide, whole_like)
            out = f(*({**own, **part}[i] for i in range(len(args))))
            _check_outputs(out, axis, _common_size(part, axis))
            return out

        whole_like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), whole)
        again = jax.checkpoint(on_chunk, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        head, tail = (jax.tree.map(functools.partial(part, axis, count, size), cut) for part in (_stack, _tail))
        out = jax.tree.map(
            functools.partial(_unstack, axis), lax.scan(lambda _, part: (None, again(wide, part)), None, head)[1]
        )
        if not rest:
            return out
        last = jax.checkpoint(on_chunk, policy=jax.checkpoint_policies.nothing_saveable)(wide, tail)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), out, last)

    return run


def _is_half(x: Any) -> bool:
    return jnp.result_type(x) in (jnp.bfloat16, jnp.float16)


def _common_size(parts: dict[int, Any], axis: int) -> int:
    sizes = set()
    for i, part in parts.items():
        for leaf in jax.tree.leaves(part):
            if not -leaf.ndim <= axis < leaf.ndim:
                raise ValueError(f"argument {i} has an array of shape {leaf.shape}, which has no axis {axis} to cut")
            sizes.add(leaf.shape[axis])
    if len(sizes) != 1:
        raise ValueError(f"the arguments that are cut must have one size along axis {axis}, got {sorted(sizes)}")
    return sizes.pop()


def _check_outputs(out: Any, axis: int, size: int) -> None:
    for leaf in jax.tree.leaves(out):
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != size:
            raise ValueError(
                f"an output of shape {leaf.shape} does not have the {size} positions of its chunk along axis {axis}: "
                "only functions that treat positions apart can be tiled"
            )


def _stack(axis: int, count: int, size: int, x: jax.Array) -> jax.Array:
    """Returns the whole chunks of ``x`` along a new leading axis."""
    axis %= x.ndim
    x = lax.slice_in_dim(x, 0, count * size, axis=axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _tail(axis: int, count: int, size: int, x: jax.Array) -> jax.Array:
    """Returns what the whole chunks leave over."""
    return lax.slice_in_dim(x, count * size, x.shape[axis], axis=axis % x.ndim)


def _unstack(axis: int, x: jax.Array) -> jax.Array:
    """Joins chunks ``[count, ...]`` along ``axis`` of each."""
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
