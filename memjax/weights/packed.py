"""A packed weight: codes and scales that decode inside each product, forward and backward, and nowhere else."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax.codecs import NestedScale, Packed
from memjax.core import jaxpr_compat
from memjax.core.views import Axes, WeightView
from memjax.weights.dense import Product, cast_chain, convolution, dot_by


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["axes"])
@dataclass(frozen=True)
class PackedWeight(WeightView):
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
        return dot_by(
            lambda fn: _linear(fn, x, self.packed, casts),
            self,
            transpose=transpose,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        rows = jnp.moveaxis(self.packed.take(indices.reshape(-1), axis), axis, 0)
        return cast_chain(rows.reshape(indices.shape + rows.shape[1:]), casts)

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        return _linear(convolution(permutation, params), x, self.packed, casts)

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


def _linear(fn: Product, x: jax.Array, packed: Packed, casts: tuple[Any, ...]) -> jax.Array:
    """Returns ``fn(x, w)``, linear in x, with w decoded in forward and again in backward, and never a residual."""
    x = jaxpr_compat.vary_like(x, jax.tree.leaves(packed))
    like = jaxpr_compat.abstract_like(x.shape, x.dtype, [x])

    def decode(packed: Packed) -> jax.Array:
        return cast_chain(packed.decode(), casts)

    @jax.custom_vjp
    def apply(x: jax.Array, packed: Packed) -> jax.Array:
        return fn(x, decode(packed))

    def forward(x: jax.Array, packed: Packed) -> tuple[jax.Array, Packed]:
        return apply(x, packed), packed

    def backward(packed: Packed, g: jax.Array) -> tuple[jax.Array, None]:
        w = decode(packed)
        return jax.linear_transpose(lambda x: fn(x, w), like)(g)[0], None

    apply.defvjp(forward, backward)
    return apply(x, packed)
