"""What weights stored in some code share: they decode inside each product, forward and backward, and nowhere else."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from memjax.core import jaxpr_compat
from memjax.core.views import Axes, WeightView
from memjax.weights.dense import Product, cast_chain, convolution, dot_by, in_order


class Decoded(WeightView):
    """A frozen weight whose dense form exists only inside a product; a format gives leaves, `materialize` and `take`.

    Products are linear in the input, which is the only operand with a gradient, and keep the stored leaves alone for
    the backward pass.
    """

    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        return dot_by(
            lambda fn: self._linear(fn, x, casts),
            self,
            transpose=transpose,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        return self._linear(convolution(permutation, params), x, casts)

    def _linear(self, fn: Product, x: jax.Array, casts: tuple[Any, ...]) -> jax.Array:
        return linear(lambda x, view: fn(x, view.dense(casts)), x, self)

    def dense(self, casts: tuple[Any, ...]) -> jax.Array:
        """Returns the dense weight as a product takes it: cast to each of ``casts`` in turn."""
        return cast_chain(self.materialize(), casts)


def linear(
    multiply: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    stored: Any,
    forward: Callable[[jax.Array, Any], jax.Array] | None = None,
    gradient: Callable[[jax.Array, Any], jax.Array] | None = None,
) -> jax.Array:
    """Returns ``multiply(x, stored)``, linear in x, evaluated again for the backward pass; only ``stored`` is kept.

    Args:
      multiply: the product; decodes ``stored`` inside.
      x: the operand that has a gradient.
      stored: a pytree of frozen leaves.
      forward: computes the value in place of ``multiply``, whose transpose stays the gradient (straight-through).
      gradient: that transpose, where it is to be computed in another way than JAX derives.
    """
    x = jaxpr_compat.vary_like(x, jax.tree.leaves(stored))
    like = jaxpr_compat.abstract_like(x.shape, x.dtype, [x])

    @jax.custom_vjp
    def apply(x: jax.Array, stored: Any) -> jax.Array:
        return (forward or multiply)(x, stored)

    def apply_and_keep(x: jax.Array, stored: Any) -> tuple[jax.Array, Any]:
        return apply(x, stored), stored

    def backward(stored: Any, g: jax.Array) -> tuple[jax.Array, None]:
        if gradient is not None:
            return gradient(g, stored).astype(like.dtype), None
        return jax.linear_transpose(lambda x: multiply(x, stored), like)(g)[0], None

    apply.defvjp(apply_and_keep, backward)
    return apply(x, stored)


def to_matrix(w: jax.Array, axes: Axes) -> jax.Array:
    """Returns a weight as ``[*batch, K, N]``: inputs and outputs each flattened in the order of ``axes``."""
    batch = w.ndim - axes.ndim
    order = [*range(batch), *(axis % w.ndim for axis in (*axes.inputs, *axes.outputs))]
    sizes = [math.prod(w.shape[axis] for axis in group) for group in axes]
    return w.transpose(order).reshape(*w.shape[:batch], *sizes)


def sizes_of(shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the sizes of the input axes, and of the output axes but the first, as `Matrix` keeps them."""
    return tuple(shape[axis] for axis in axes.inputs), tuple(shape[axis] for axis in axes.outputs[1:])


class Matrix(Decoded):
    """A weight stored as a matrix ``[*batch, K, N]``, all inputs flattened to K and all outputs to N.

    A mesh may shard the batch axes and, where the format allows it, the first output axis.

    Attributes:
      input_sizes: sizes of the input axes, in the order of ``axes.inputs``.
      inner_sizes: sizes of the output axes but the first, whose size follows from the leaves.
    """

    input_sizes: tuple[int, ...]
    inner_sizes: tuple[int, ...]

    @property
    @abc.abstractmethod
    def lead(self) -> tuple[int, ...]:
        """Shape of the batch axes, then N: what the leaves say."""

    @abc.abstractmethod
    def matrix(self) -> jax.Array:
        """Returns the dense ``[*batch, K, N]`` in `dtype`."""

    def columns(self, indices: jax.Array) -> jax.Array:
        """Returns columns ``[K, n]`` of a weight without batch axes, given n indices."""
        return self.matrix()[:, indices]

    def rows(self, indices: jax.Array) -> jax.Array:
        """Returns rows ``[n, N]`` of a weight without batch axes, given n indices."""
        return self.matrix()[indices]

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, n = self.lead
        stored = (*self.axes.inputs, *self.axes.outputs)
        sizes = (*self.input_sizes, n // math.prod(self.inner_sizes), *self.inner_sizes)
        return (*batch, *(sizes[stored.index(axis)] for axis in range(-len(stored), 0)))

    def materialize(self) -> jax.Array:
        return _materialize(self)

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        flat = indices.reshape(-1)
        if (axis,) == self.axes.inputs:
            found, rest = self.rows(flat), self.axes.outputs
        else:
            found, rest = self.columns(flat).T, self.axes.inputs
        found = found.reshape(*indices.shape, *(self.shape[axis] for axis in rest))
        return cast_chain(in_order(found, rest, tuple(sorted(rest))), casts)

    def check(self) -> None:
        """Raises a ValueError for leaves or sizes that do not fit each other."""
        sizes = (len(self.input_sizes), len(self.inner_sizes) + 1)
        if sizes != tuple(map(len, self.axes)) or self.lead[-1] % math.prod(self.inner_sizes):
            raise ValueError(f"sizes {self.input_sizes}, {self.inner_sizes} of {self.lead} do not fit {self.axes}")

    def shards(self, spec: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        """Returns the mesh axes of the batch axes, and of N, from one entry per logical axis.

        Raises:
          ValueError: a spec that shards an input axis, or an output axis but the first.
        """
        whole = (*self.axes.inputs, *self.axes.outputs[1:])
        if any(spec[axis] is not None for axis in whole):
            raise ValueError(
                f"{type(self).__name__} of shape {self.shape} keeps its inputs together: a mesh can shard batch axes "
                f"and the first output axis {self.axes.outputs[0]} only, got {PartitionSpec(*spec)}"
            )
        return tuple(spec[: len(spec) - self.axes.ndim]), spec[self.axes.outputs[0]]


@functools.partial(jax.jit, inline=True)
def _materialize(view: Matrix) -> jax.Array:
    shape, stored = view.shape, (*view.axes.inputs, *view.axes.outputs)
    batch = len(shape) - len(stored)
    w = view.matrix().reshape(*shape[:batch], *(shape[axis] for axis in stored))
    return in_order(w, stored, tuple(range(-len(stored), 0)))
