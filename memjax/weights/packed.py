"""A packed weight: codes and scales that decode inside each product, forward and backward, and nowhere else."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax.codecs import NestedScale, Packed
from memjax.core.views import Axes
from memjax.weights import fused
from memjax.weights.decoded import Decoded, linear
from memjax.weights.dense import cast_chain, product


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["axes"])
@dataclass(frozen=True)
class PackedWeight(Decoded):
    """A weight stored as codes.

    Attributes:
      packed: the codes; groups run along the input axes.
      axes: input and output axes.
    """

    packed: Packed
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def dtype(self) -> Any:
        return self.packed.dtype

    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        settings = {"precision": precision, "preferred_element_type": preferred_element_type}
        form = None if transpose else fused.kernel_format(self.packed, self.axes, casts)
        if form is None or not fused.takes(x, settings):
            return super().dot(x, transpose=transpose, casts=casts, **settings)
        return linear(
            lambda x, view: product(x, view.dense(casts), contract=(-2,), batch_ndim=0, **settings),
            x,
            self,
            forward=lambda x, view: fused.multiply(x, view.packed, form, preferred_element_type or x.dtype),
        )

    def dense(self, casts: tuple[Any, ...]) -> jax.Array:
        form = fused.kernel_format(self.packed, self.axes, casts)
        return super().dense(casts) if form is None else fused.decode(self.packed, form)

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        rows = jnp.moveaxis(self.packed.take(indices.reshape(-1), axis), axis, 0)
        return cast_chain(rows.reshape(indices.shape + rows.shape[1:]), casts)

    def materialize(self) -> jax.Array:
        return self.packed.decode()

    def astype(self, dtype: Any) -> PackedWeight:
        return replace(self, packed=self.packed.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        packed = jax.tree.map(lambda leaf: PartitionSpec(*spec), self.packed)
        scale = self.packed.scale
        if isinstance(scale, NestedScale):
            # What all groups along an axis share has size 1 there, and every shard gets it whole.
            shared: dict[str, Any] = {
                name: PartitionSpec(*(entry if size > 1 else None for entry, size in zip(spec, leaf.shape)))
                for name, leaf in (("absmax", scale.absmax), ("mean", scale.mean))
            }
            packed = replace(packed, scale=packed.scale._replace(**shared))
        return replace(self, packed=packed)
