"""A weight view as a traced program currently arranges it: transposed, reshaped, cast, sliced along batch axes.

Each dimension that the program sees is a product of factors of the view's own axes. Structural operations rewrite
the factors and never touch the stored leaves; a consumer reads them to find out what is contracted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.core.views import WeightView


class Factor(NamedTuple):
    """A factor of one axis of a view; ``inner`` is the stride of its index within the axis."""

    axis: int
    size: int
    inner: int


Dims = tuple[tuple[Factor, ...], ...]


class UnsupportedError(Exception):
    """A view has no rule for what the program does with it; lift turns this into its strict TypeError."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["view"], meta_fields=["dims", "casts", "label"])
@dataclass(frozen=True)
class Arranged:
    """A view plus the arrangement in which the program holds it.

    Attributes:
      view: the weight view, its leaves as stored.
      dims: per dimension of the program's array, its factors, outermost first.
      casts: dtypes to which the program cast the weight, in turn.
      label: logical path of the weight, for messages.
    """

    view: WeightView
    dims: Dims
    casts: tuple[Any, ...]
    label: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(factor.size for factor in dim) for dim in self.dims)

    @property
    def dtype(self) -> Any:
        return self.casts[-1] if self.casts else self.view.dtype

    def cast(self, dtype: Any) -> Arranged:
        dtype = jnp.dtype(dtype)
        return self if dtype == self.dtype else replace(self, casts=(*self.casts, dtype))

    def transpose(self, permutation: Sequence[int]) -> Arranged:
        return replace(self, dims=tuple(self.dims[i] for i in permutation))

    def reshape(self, shape: Sequence[int]) -> Arranged:
        """Splits and merges dimensions in row-major order."""
        queue = [factor for dim in self.dims for factor in dim if factor.size > 1]
        dims: list[tuple[Factor, ...]] = []
        for size in shape:
            dim: list[Factor] = []
            while size > 1:
                factor = queue.pop(0)
                if size % factor.size == 0:
                    dim.append(factor)
                    size //= factor.size
                elif factor.size % size == 0:
                    rest = factor.size // size
                    dim.append(Factor(factor.axis, size, factor.inner * rest))
                    queue.insert(0, Factor(factor.axis, rest, factor.inner))
                    size = 1
                else:
                    raise UnsupportedError(f"a reshape from {self.shape} to {tuple(shape)} mixes axes unevenly")
            dims.append(tuple(_merge(dim)))
        return replace(self, dims=tuple(dims))._without_hidden_batch()

    def _without_hidden_batch(self) -> Arranged:
        """Squeezes batch axes of size 1 that no dimension shows any more."""
        shown = {factor.axis for dim in self.dims for factor in dim}
        batch = range(-self.view.ndim, -self.view.axes.ndim)
        hidden = [axis for axis in batch if self.view.shape[axis] == 1 and axis not in shown]
        if not hidden:
            return self
        view = jax.tree.map(lambda leaf: leaf.squeeze(tuple(axis + self.view.ndim for axis in hidden)), self.view)
        dims = tuple(
            tuple(f._replace(axis=f.axis + sum(f.axis < axis for axis in hidden)) for f in dim) for dim in self.dims
        )
        return replace(self, view=view, dims=dims)

    def batch_axis(self, dim: int) -> int:
        """Returns the view's (negative) batch axis that dimension ``dim`` is, whole; else raises."""
        factors = self.dims[dim]
        if len(factors) == 1 and is_whole(factors, [factors[0].axis], self.view):
            axis = factors[0].axis
            if axis < -self.view.axes.ndim:
                return axis
        raise UnsupportedError(
            f"it slices or iterates along dimension {dim}, which is not a batch axis of the weight "
            f"(shape {self.shape}, {self.view.axes})"
        )

    def map_batch(self, dim: int, fn: Callable[[jax.Array, int], jax.Array], keeps_axis: bool) -> Arranged:
        """Applies ``fn(leaf, leaf_axis)`` along a batch axis to every leaf; without ``keeps_axis`` fn removes it."""
        axis = self.batch_axis(dim)
        view = jax.tree.map(lambda leaf: fn(leaf, self.view.ndim + axis), self.view)
        if keeps_axis:
            dims = list(self.dims)
            dims[dim] = (Factor(axis, view.shape[axis], 1),)
            return replace(self, view=view, dims=tuple(dims))
        dims = [
            tuple(f._replace(axis=f.axis + 1) if f.axis < axis else f for f in factors)
            for i, factors in enumerate(self.dims)
            if i != dim
        ]
        return replace(self, view=view, dims=tuple(dims))

    def permutation(self) -> tuple[int, ...]:
        """Returns the view's axis that each dimension is, when the arrangement is a mere permutation."""
        axes = []
        for dim in self.dims:
            if len(dim) != 1 or not is_whole(dim, [dim[0].axis], self.view):
                raise UnsupportedError(
                    f"it needs the weight's own axes, but the program has reshaped them to {self.shape}"
                )
            axes.append(dim[0].axis)
        return tuple(axes)

    def materialize(self) -> jax.Array:
        """Returns the dense array that the program expects; only tests, merges and allow_dense come here."""
        dense = self.view.materialize()
        factors = split_axes([factor for dim in self.dims for factor in dim], range(-dense.ndim, 0))
        dense = dense.reshape([f.size for f in factors])
        order = [factors.index(factor) for dim in self.dims for factor in dim if factor.size > 1]
        order += [i for i in range(len(factors)) if i not in order]
        dense = dense.transpose(order).reshape(self.shape)
        for dtype in self.casts:
            dense = dense.astype(dtype)
        return dense


def arrange(view: WeightView, label: str) -> Arranged:
    """Returns ``view`` in its own arrangement."""
    ndim = view.ndim
    return Arranged(view, tuple((Factor(axis - ndim, size, 1),) for axis, size in enumerate(view.shape)), (), label)


def is_whole(factors: Sequence[Factor], axes: Sequence[int], view: WeightView) -> bool:
    """Returns whether ``factors`` are exactly all of the view's ``axes``, in any order (axes of size 1 aside)."""
    found = {f.axis for f in factors if f.size > 1}
    needed = {axis for axis in axes if view.shape[axis] > 1}
    return found == needed and math.prod(f.size for f in factors) == math.prod(view.shape[a] for a in needed)


def split_axes(factors: Sequence[Factor], axes: Sequence[int]) -> list[Factor]:
    """Returns the factors of each of ``axes`` in storage order, size-1 factors left out."""
    return [
        factor
        for axis in axes
        for factor in sorted((f for f in factors if f.axis == axis and f.size > 1), key=lambda f: -f.inner)
    ]


def _merge(factors: list[Factor]) -> list[Factor]:
    merged: list[Factor] = []
    for factor in factors:
        if merged and merged[-1].axis == factor.axis and merged[-1].inner == factor.size * factor.inner:
            factor = Factor(factor.axis, merged.pop().size * factor.size, factor.inner)
        merged.append(factor)
    return merged


def dot_general(w: Arranged, x: jax.Array, params: dict[str, Any], weight_first: bool) -> jax.Array:
    """Evaluates a dot_general between a view and an array, whatever its dimension numbers.

    Args:
      w: the weight operand.
      x: the other operand.
      params: parameters of the primitive.
      weight_first: whether the weight is the left operand.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    w_contract, x_contract = (lhs_contract, rhs_contract) if weight_first else (rhs_contract, lhs_contract)
    w_batch, x_batch = (lhs_batch, rhs_batch) if weight_first else (rhs_batch, lhs_batch)
    if params.get("out_sharding") is not None:
        raise UnsupportedError("it fixes out_sharding; build the mesh with AxisType.Auto")
    view, axes = w.view, w.view.axes
    contracted = [factor for dim in w_contract for factor in w.dims[dim] if factor.size > 1]
    if is_whole(contracted, axes.inputs, view):
        transpose, into, out_of = False, axes.inputs, axes.outputs
    elif is_whole(contracted, axes.outputs, view):
        transpose, into, out_of = True, axes.outputs, axes.inputs
    else:
        raise UnsupportedError(
            f"it contracts dimensions {tuple(w_contract)} of the weight of shape {w.shape}, which are neither all "
            f"of its input axes nor all of its output axes ({axes}); say which axes are which with axes=, or use "
            "memjax.weights.infer_axes"
        )

    w_free = [i for i in range(len(w.dims)) if i not in w_contract and i not in w_batch]
    x_free = [i for i in range(x.ndim) if i not in x_contract and i not in x_batch]
    rows = [x.shape[i] for i in x_free]
    batch_dim = {w.batch_axis(dim): i for i, dim in enumerate(w_batch) if w.shape[dim] > 1}
    stacked = [axis for axis in range(-view.ndim, -axes.ndim) if w.view.shape[axis] > 1]
    shared = [axis for axis in stacked if axis in batch_dim]
    unshared = [axis for axis in stacked if axis not in batch_dim]
    single = tuple(axis for axis in range(view.batch_ndim) if view.shape[axis] == 1)
    view = jax.tree.map(lambda leaf: lax.squeeze(leaf, single), view)

    # x as [*shared, *rows, *contracted], the contracted axes as the view orders them
    ones = [dim for i, dim in enumerate(x_batch) if i not in batch_dim.values()]
    lead = [*(w.view.shape[a] for a in shared), *rows]
    x = x.transpose([*ones, *(x_batch[batch_dim[a]] for a in shared), *x_free, *x_contract])
    x = x.reshape([*lead, *(f.size for f in contracted)])
    x = x.transpose([*range(len(lead)), *(len(lead) + contracted.index(f) for f in split_axes(contracted, into))])
    x = x.reshape([*lead, *(w.view.shape[a] for a in into)])

    def product(view: WeightView) -> jax.Array:
        return view.dot(
            x,
            transpose=transpose,
            casts=w.casts,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    for axis in unshared:
        product = jax.vmap(product, in_axes=stacked.index(axis))
    y = product(view)

    # y is [*unshared reversed, *shared, *rows, *produced]; bring it to [batch, lhs free, rhs free]
    free_dims = [[f for f in w.dims[dim] if f.size > 1] for dim in w_free]
    produced = split_axes([f for dim in free_dims for f in dim], out_of)
    names: list[Any] = [Factor(a, w.view.shape[a], 1) for a in reversed(unshared)]
    names += [("batch", batch_dim[a]) for a in shared] + [("row", i) for i in range(len(rows))] + produced
    y = y.reshape([*(f.size for f in names[: len(unshared)]), *lead, *(f.size for f in produced)])
    of_batch = [names.index(("batch", i)) for i in sorted(batch_dim.values())]
    of_rows = [names.index(("row", i)) for i in range(len(rows))]
    of_weight = [names.index(f) for dim in free_dims for f in dim]
    w_shape = [w.shape[dim] for dim in w_free]
    y = y.transpose([*of_batch, *(of_weight + of_rows if weight_first else of_rows + of_weight)])
    return y.reshape([w.shape[dim] for dim in w_batch] + (w_shape + rows if weight_first else rows + w_shape))


def gather(w: Arranged, indices: jax.Array, params: dict[str, Any]) -> jax.Array | Arranged:
    """Evaluates a gather that looks up whole slices along one dimension of a view, as embeddings do.

    A lookup along an input or output axis yields rows; along a batch axis, a view of the chosen slices.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        raise UnsupportedError("it gathers along more than one dimension of the weight")
    dim = numbers.start_index_map[0]
    if numbers.collapsed_slice_dims != (dim,) or any(
        size != (1 if i == dim else w.shape[i]) for i, size in enumerate(sizes)
    ):
        raise UnsupportedError("it gathers partial slices of the weight")
    indices = indices[..., 0]
    limit = w.shape[dim] - 1
    inside = (indices >= 0) & (indices <= limit)
    indices = jnp.clip(indices, 0, limit)
    if len(w.dims[dim]) == 1 and w.dims[dim][0].axis < -w.view.axes.ndim:
        if indices.ndim == 0:
            return w.map_batch(
                dim, lambda leaf, axis: lax.dynamic_index_in_dim(leaf, indices, axis, keepdims=False), False
            )
        raise UnsupportedError("it gathers several slices of a stack at once")
    rows = _rows(w, indices, dim)
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
        rows = jnp.where(inside.reshape(inside.shape + (1,) * (rows.ndim - inside.ndim)), rows, fill)
    return jnp.moveaxis(rows, range(indices.ndim, rows.ndim), numbers.offset_dims)


def row(w: Arranged, index: Any, dim: int) -> jax.Array:
    """Evaluates a slice of size 1 along an input or output axis: the lookup of one row, its axis kept."""
    index = jnp.clip(index, 0, w.shape[dim] - 1)
    return jnp.expand_dims(_rows(w, jnp.asarray(index), dim), dim)


def _rows(w: Arranged, indices: jax.Array, dim: int) -> jax.Array:
    """Looks up slices along dimension ``dim``; returns ``[*indices.shape, *other dimensions]``."""
    if w.view.batch_ndim:
        raise UnsupportedError("it looks up rows of a stack of weights at once")
    axis = w.permutation()[dim]
    if (axis,) not in w.view.axes:
        raise UnsupportedError(f"it looks up along axis {axis}, one of several input or output axes ({w.view.axes})")
    rows = w.view.take(indices, axis=axis, casts=w.casts)
    kept = [a for a in range(-w.view.ndim, 0) if a != axis]
    wanted = [a for i, a in enumerate(w.permutation()) if i != dim]
    return rows.transpose([*range(indices.ndim), *(indices.ndim + kept.index(a) for a in wanted)])


def conv(x: jax.Array, w: Arranged, params: dict[str, Any]) -> jax.Array:
    """Evaluates a convolution of an array with a view as the kernel."""
    numbers, axes, permutation = params["dimension_numbers"], w.view.axes, w.permutation()
    out_dim = numbers.rhs_spec[0]
    if w.view.batch_ndim or params["batch_group_count"] != 1:
        raise UnsupportedError("it convolves with a stack of kernels or with batch groups")
    if axes.outputs != (permutation[out_dim],):
        raise UnsupportedError(
            f"its output features are axis {permutation[out_dim]} of the weight, but the weight has {axes}; say "
            "which axes are which with axes=, or use memjax.weights.infer_axes"
        )
    return w.view.conv(x, permutation=permutation, casts=w.casts, params=params)
