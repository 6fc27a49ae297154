"""A packed weight: codes and scales that decode inside each product, forward and backward, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memjax.codecs import Packed
from memjax.core import jaxpr_compat
from memjax.core.views import Axes, WeightView
from memjax.weights.dense import cast_chain, in_order, product


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
    def shape(self):
        return self.packed.shape

    @property
    def dtype(self):
        return self.packed.dtype

    def dot(self, x, *, transpose=False, casts=(), precision=None, preferred_element_type=None):
        into, out_of = (
            (self.axes.outputs, self.axes.inputs) if transpose else (self.axes.inputs, self.axes.outputs)
        )
        multiply = functools.partial(
            product,
            contract=into,
            batch_ndim=self.batch_ndim,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        y = _linear(multiply, x, self.packed, casts)
        return in_order(y, tuple(sorted(out_of)), out_of)

    def take(self, indices, *, axis, casts=()):
        rows = jnp.moveaxis(self.packed.take(indices.reshape(-1), axis), axis, 0)
        return cast_chain(rows.reshape(indices.shape + rows.shape[1:]), casts)

    def conv(self, x, *, permutation, casts, params):
        def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
            return lax.conv_general_dilated_p.bind(x, w.transpose([axis % w.ndim for axis in permutation]), **params)

        return _linear(convolve, x, self.packed, casts)

    def materialize(self):
        return self.packed.decode()

    def astype(self, dtype):
        return replace(self, packed=self.packed.astype(dtype))

    def specs(self, spec):
        return replace(self, packed=jax.tree.map(lambda leaf: PartitionSpec(*spec), self.packed))


def _linear(
    fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, packed: Packed, casts: tuple[Any, ...]
) -> jax.Array:
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
