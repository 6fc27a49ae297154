"""The dense weight as a view: the base under an adapter, and the arithmetic that other views share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memjax.core.views import Axes, WeightView

Product = Callable[[jax.Array, jax.Array], jax.Array]


def cast_chain(w: jax.Array, casts: tuple[Any, ...]) -> jax.Array:
    """Casts ``w`` to each dtype in turn."""
    for dtype in casts:
        w = w.astype(dtype)
    return w


def product(
    x: jax.Array,
    w: jax.Array,
    *,
    contract: tuple[int, ...],
    batch_ndim: int,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Contracts the trailing axes of ``x`` with axes ``contract`` of ``w``; both lead with the batch axes.

    Args:
      x: ``[*batch, *rows, *contracted]``.
      w: ``[*batch, ...]``.
      contract: negative axes of ``w`` in the order in which ``x`` has them.

    Returns:
      ``[*batch, *rows, *rest of w]``.
    """
    batch = tuple(range(batch_ndim))
    x_axes = tuple(range(x.ndim - len(contract), x.ndim))
    w_axes = tuple(axis % w.ndim for axis in contract)
    return lax.dot_general(
        x, w, ((x_axes, w_axes), (batch, batch)), precision=precision, preferred_element_type=preferred_element_type
    )


def casting(fn: Product, x: jax.Array, w: jax.Array, casts: tuple[Any, ...], *, barrier: bool = True) -> jax.Array:
    """Returns ``fn(x, cast of w)`` such that reverse mode keeps ``w`` itself, never the cast copy.

    Without ``barrier`` XLA may share the cast between forward and backward where no loop separates them: it costs
    less to schedule around, and suits weights whose copy is small.
    """
    if not casts or all(jnp.dtype(dtype) == w.dtype for dtype in casts):
        return fn(x, w)
    return jax.checkpoint(lambda x, w: fn(x, cast_chain(w, casts)), prevent_cse=barrier)(x, w)


def in_order(y: jax.Array, produced: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
    """Reorders the trailing axes of ``y`` from the order of ``produced`` to that of ``wanted``."""
    lead = y.ndim - len(produced)
    return y.transpose([*range(lead), *(lead + produced.index(axis) for axis in wanted)])


def dot_by(
    multiply: Callable[[Product], jax.Array], view: WeightView, *, transpose: bool, **settings: Any
) -> jax.Array:
    """Evaluates `WeightView.dot` for a view whose dense form has the view's own axis order.

    Args:
      multiply: applies a `product` of ``(x, dense)`` to the operands, however the view gets its dense form.
      view: gives the axes.
      transpose: contract the output axes instead of the input axes.
      **settings: precision and preferred_element_type of the product.
    """
    into, out_of = view.axes[::-1] if transpose else view.axes
    y = multiply(functools.partial(product, contract=into, batch_ndim=view.batch_ndim, **settings))
    return in_order(y, tuple(sorted(out_of)), out_of)


def convolution(permutation: tuple[int, ...], params: dict[str, Any]) -> Product:
    """Returns the convolution of ``(x, dense kernel)`` that `WeightView.conv` asks for."""
    return lambda x, w: lax.conv_general_dilated_p.bind(x, w.transpose([a % w.ndim for a in permutation]), **params)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclass(frozen=True)
class Dense(WeightView):
    """A dense weight.

    Attributes:
      array: ``[*batch, ...]`` in its own dtype.
      axes: its input and output axes.
    """

    array: jax.Array
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

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
            lambda fn: casting(fn, x, self.array, casts),
            self,
            transpose=transpose,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        rows = cast_chain(jnp.take(self.array, indices.reshape(-1), axis=axis, mode="clip"), casts)
        rows = jnp.moveaxis(rows, axis, 0)
        return rows.reshape(indices.shape + rows.shape[1:])

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        return casting(convolution(permutation, params), x, self.array, casts)

    def materialize(self) -> jax.Array:
        return self.array

    def astype(self, dtype: Any) -> Dense:
        return replace(self, array=self.array.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        specs: dict[str, Any] = {"array": PartitionSpec(*spec)}
        return replace(self, **specs)
