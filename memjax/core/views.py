"""The weight-view protocol: pytrees that stand where a dense weight stood.

A view stores ``*batch`` leading axes in every leaf, and knows which of its logical axes are contracted (``inputs``)
and which are produced (``outputs``). `memjax.lift` lets any function take views in place of arrays.
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Axes(NamedTuple):
    """Which axes of a weight are inputs and outputs; counted from the end, so leading axes may come and go.

    Every axis that is neither is a batch axis (a stack of layers, experts) and must lead.

    Attributes:
      inputs: axes that a forward product contracts, or along which an embedding is looked up.
      outputs: axes that a forward product yields.
    """

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)

    @property
    def ndim(self) -> int:
        """Number of axes that are not batch axes."""
        return len(self.inputs) + len(self.outputs)


def make_axes(inputs: int | tuple[int, ...], outputs: int | tuple[int, ...], ndim: int) -> Axes:
    """Returns `Axes` of a weight with ``ndim`` axes, from axis numbers of either sign.

    Raises:
      ValueError: axes out of range, named twice, or batch axes that do not lead.
    """
    groups = []
    for group in (inputs, outputs):
        group = (group,) if isinstance(group, int) else tuple(group)
        for axis in group:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axis {axis} is out of range for a weight with {ndim} axes")
        groups.append(tuple(axis if axis < 0 else axis - ndim for axis in group))
    axes = Axes(*groups)
    if not axes.inputs or not axes.outputs:
        raise ValueError(f"a weight needs input and output axes, got {axes}")
    if sorted(axes.inputs + axes.outputs) != list(range(-axes.ndim, 0)):
        raise ValueError(
            f"input and output axes must be distinct and be the trailing axes (batch axes lead), got {axes} "
            f"for a weight with {ndim} axes"
        )
    return axes


class WeightView(abc.ABC):
    """A registered pytree that stands for a dense weight.

    Laws: ``shape`` is computed from leaves, never stored; static metadata holds facts of the format only; every leaf
    carries the batch axes in front, so indexing all leaves by a batch index indexes the view; unflattening never
    validates.
    """

    axes: Axes

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape: ``[*batch, ...]`` with the input and output axes at `axes`."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of the dense weight that the view stands for."""

    @abc.abstractmethod
    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """Multiplies by the weight.

        Args:
          x: ``[*batch, *rows, *contracted]`` with the batch axes of the view; the contracted axes are the input
            axes in the order of ``axes.inputs`` (the output axes when ``transpose``).
          transpose: contract the output axes instead of the input axes.
          casts: dtypes that the weight is cast to, in turn, before the product.
          precision, preferred_element_type: as in `jax.lax.dot_general`.

        Returns:
          ``[*batch, *rows, *outputs]`` in the order of ``axes.outputs`` (the input axes when ``transpose``).
        """

    @abc.abstractmethod
    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        """Looks up slices along one of the view's non-batch axes; the view must have no batch axes.

        Args:
          indices: integer array ``[...]``, in range.
          axis: negative axis number; the only input axis or the only output axis of the view.

        Returns:
          ``[..., *rest]`` where rest are the other axes in logical order.
        """

    @abc.abstractmethod
    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        """Convolves as `jax.lax.conv_general_dilated` does; the view must have no batch axes.

        Args:
          x: the left-hand side.
          permutation: for each axis of the kernel that the program convolves with, the axis of the view.
          casts: dtypes that the weight is cast to, in turn, before the product.
          params: the other parameters of the primitive.
        """

    @abc.abstractmethod
    def materialize(self) -> jax.Array:
        """Returns the dense weight ``[*batch, ...]`` in `dtype`."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> WeightView:
        """Returns the view of the weight cast to ``dtype``; codes and trained factors keep their own dtypes."""

    @abc.abstractmethod
    def specs(self, spec: tuple[Any, ...]) -> Any:
        """Returns a pytree of `jax.sharding.PartitionSpec` with the view's structure.

        Args:
          spec: one entry (mesh axis name, tuple of names or None) per logical axis.
        """

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def batch_ndim(self) -> int:
        """Number of leading batch axes."""
        return self.ndim - self.axes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def _outside_lift(self: WeightView, *operands: Any) -> Any:
    raise TypeError(
        f"{type(self).__name__} of shape {self.shape} is a weight view, not an array: call the function that uses it "
        "as memjax.lift(fn)(params, ...)"
    )


for _name in ("getitem", "matmul", "rmatmul", "mul", "rmul", "add", "radd", "sub", "rsub", "truediv", "neg"):
    setattr(WeightView, f"__{_name}__", _outside_lift)


def is_view(x: Any) -> bool:
    """Returns whether ``x`` is a weight view (use as ``is_leaf=`` in `jax.tree` functions)."""
    return isinstance(x, WeightView)


def materialize(tree: Any) -> Any:
    """Returns ``tree`` with every weight view replaced by its dense weight."""
    return jax.tree.map(lambda leaf: leaf.materialize() if is_view(leaf) else leaf, tree, is_leaf=is_view)
