"""A packed weight: codes and scales that decode inside each product, forward and backward, and nowhere else."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax.codecs import Grouped, NestedScale, Packed
from memjax.core import jaxpr_compat
from memjax.core.views import Axes
from memjax.weights import fused
from memjax.weights.decoded import Decoded, linear
from memjax.weights.dense import cast_chain, product

WIDE_BYTES = 2**28
_MOST_BLOCKS = 64


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
            count = 1 if transpose else self._blocks(casts)
            if count == 1:
                return super().dot(x, transpose=transpose, casts=casts, **settings)
            return linear(
                lambda x, view: view._in_blocks(x, count, casts, settings),
                x,
                self,
                gradient=lambda g, view: view._gradient_in_blocks(g, count, casts, precision),
            )
        return linear(
            lambda x, view: product(x, view.dense(casts), contract=(-2,), batch_ndim=0, **settings),
            x,
            self,
            forward=lambda x, view: fused.multiply(x, view.packed, form, preferred_element_type or x.dtype),
        )

    def _blocks(self, casts: tuple[Any, ...]) -> int:
        """Returns in how many blocks of output features the weight is decoded, so that none exceeds `WIDE_BYTES`.

        The head of a language model is many times the size of any other weight.
        """
        if self.ndim != 2 or self.axes != Axes() or self.packed.axes != (-2,):
            return 1
        dense_bytes = self.size * jnp.dtype(casts[-1] if casts else self.dtype).itemsize
        widths = {leaf.shape[-1] for leaf in jax.tree.leaves(self.packed)} - {1}
        enough = range(max(1, -(-dense_bytes // WIDE_BYTES)), _MOST_BLOCKS + 1)
        n = self.shape[-1]
        whole = 128 if n % 128 == 0 else 1  # as the kernels take them
        fits = (c for c in enough if n % (c * whole) == 0 and not any(width % c for width in widths))
        return next(fits, 1)

    def _block(self, i: jax.Array, count: int, casts: tuple[Any, ...]) -> jax.Array:
        """Returns the decoded block ``i`` of ``count`` blocks of output features."""

        def cut(leaf: Any) -> Any:
            width = leaf.shape[-1] // count
            return jax.lax.dynamic_slice_in_dim(leaf, i * width, width, -1) if width else leaf

        return replace(self, packed=jax.tree.map(cut, self.packed)).dense(casts)

    def _in_blocks(self, x: jax.Array, count: int, casts: tuple[Any, ...], settings: dict[str, Any]) -> jax.Array:
        def one(i: jax.Array) -> jax.Array:
            return product(x, self._block(i, count, casts), contract=(-2,), batch_ndim=0, **settings)

        parts = jnp.moveaxis(jax.lax.map(one, jnp.arange(count)), 0, -2)
        return parts.reshape(*x.shape[:-1], self.shape[-1])

    def _gradient_in_blocks(self, g: jax.Array, count: int, casts: tuple[Any, ...], precision: Any) -> jax.Array:
        width, sums = g.shape[-1] // count, jnp.promote_types(g.dtype, jnp.float32)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(g, i * width, width, -1)
            block = self._block(i, count, casts)
            options = {"precision": precision, "preferred_element_type": sums}
            return total + product(part.astype(block.dtype), block, contract=(-1,), batch_ndim=0, **options)

        zeros = jnp.zeros((*g.shape[:-1], self.shape[-2]), sums)
        start = jaxpr_compat.vary_like(zeros, [g, *jax.tree.leaves(self)])
        return jax.lax.fori_loop(0, count, add, start)

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


def format_of(leaf: Any) -> str:
    """Returns how a leaf is stored: the codec of packed weights, else the dtype."""
    if not isinstance(leaf, PackedWeight):
        return str(leaf.dtype)
    codec = leaf.packed.codec
    if kind := getattr(codec, "kind", None):
        return kind
    name = f"int{codec.bits}" if isinstance(codec, Grouped) else type(codec).__name__.lower()
    return f"{name}, group {codec.group}"
