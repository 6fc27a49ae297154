"""A weight whose output features and input features are scaled by vectors, as one weight view."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax.core.views import Axes, WeightView
from memjax.weights.dense import in_order


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "column", "row"], meta_fields=[])
@dataclass(frozen=True)
class Rescaled(WeightView):
    """``diag(row) @ base @ diag(column)``, never formed.

    Products scale their input and their output. Reverse mode keeps the unscaled one only for a vector that is trained,
    in the product's dtype; the arithmetic is done in the wider of the vector's and the product's dtypes.

    Attributes:
      base: the weight, itself a view.
      column: ``[*batch, *outputs]`` in the order of ``axes.outputs``, or None for ones.
      row: ``[*batch, *inputs]`` in the order of ``axes.inputs``, or None for ones. An axis may have size 1; in
        convolutions the axes of the window must.
    """

    base: WeightView
    column: jax.Array | None = None
    row: jax.Array | None = None

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.base.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        into, out_of = (self.column, self.row) if transpose else (self.row, self.column)
        if into is not None:
            x = scale(x, self._behind_rows(into, x.ndim))
        y = self.base.dot(
            x,
            transpose=transpose,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        return y if out_of is None else scale(y, self._behind_rows(out_of, y.ndim))

    def _behind_rows(self, vector: jax.Array, ndim: int) -> jax.Array:
        """Returns ``vector`` with axes of size 1 after its batch axes, such that it has ``ndim`` axes."""
        return jnp.expand_dims(vector, tuple(self.batch_ndim + i for i in range(ndim - vector.ndim)))

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        y = self.base.take(indices, axis=axis, casts=casts)
        for vector, group in ((self.column, self.axes.outputs), (self.row, self.axes.inputs)):
            if vector is None:
                continue
            if (axis,) == group:
                vector = jnp.take(jnp.broadcast_to(vector, self.shape[axis]), indices, mode="clip")
                y = scale(y, vector.reshape(vector.shape + (1,) * (y.ndim - vector.ndim)))
            else:
                spread = jnp.squeeze(self._spread(vector, group), axis)
                y = scale(y, spread)
        return y

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        numbers = params["dimension_numbers"]
        if self.row is not None:
            channel = self.axes.inputs.index(permutation[numbers.rhs_spec[1]])
            if self.row.size != self.row.shape[channel]:
                raise ValueError(
                    "a convolution kernel can be scaled per input channel: expected a row of size 1 along the axes of "
                    f"the window, got shape {tuple(self.row.shape)}"
                )
            per_channel = jnp.broadcast_to(self.row.reshape(-1), self.shape[self.axes.inputs[channel]])
            per_channel = jnp.tile(per_channel, params["feature_group_count"])
            x = scale(x, _along(per_channel, numbers.lhs_spec[1], x.ndim))
        y = self.base.conv(x, permutation=permutation, casts=casts, params=params)
        return y if self.column is None else scale(y, _along(self.column, numbers.out_spec[1], y.ndim))

    def _spread(self, vector: jax.Array, group: tuple[int, ...]) -> jax.Array:
        """Returns ``vector``, which has the axes ``group``, with the weight's axis order and 1 for its other axes."""
        others = [axis for axis in range(-self.axes.ndim, 0) if axis not in group]
        return jnp.expand_dims(in_order(vector, group, tuple(sorted(group))), [axis + self.ndim for axis in others])

    def materialize(self) -> jax.Array:
        w = self.base.astype(jnp.promote_types(self.dtype, jnp.float32)).materialize()
        for vector, group in ((self.column, self.axes.outputs), (self.row, self.axes.inputs)):
            if vector is not None:
                w = w * self._spread(vector, group)
        return w.astype(self.dtype)

    def astype(self, dtype: Any) -> Rescaled:
        return replace(self, base=self.base.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        batch = spec[: self.batch_ndim]

        def of(vector: jax.Array | None, group: tuple[int, ...]) -> Any:
            if vector is None:
                return None
            sizes = vector.shape[self.batch_ndim :]
            return PartitionSpec(*batch, *(None if size == 1 else spec[axis] for size, axis in zip(sizes, group)))

        specs: dict[str, Any] = {
            "base": self.base.specs(spec),
            "column": of(self.column, self.axes.outputs),
            "row": of(self.row, self.axes.inputs),
        }
        return replace(self, **specs)


def scale(y: jax.Array, vector: jax.Array) -> jax.Array:
    """Returns ``y * vector`` in the dtype of ``y``, computed in the wider dtype of the two.

    Reverse mode keeps ``y`` as it is, never a wider copy, and only if the gradient of ``vector`` is asked for.
    """

    def multiply(y: jax.Array, vector: jax.Array) -> jax.Array:
        return (y * vector).astype(y.dtype)

    if y.dtype == jnp.result_type(y, vector):
        return multiply(y, vector)
    return jax.checkpoint(multiply, prevent_cse=False)(y, vector)


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])
