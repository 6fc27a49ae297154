"""A frozen base plus trained deltas, as one weight view."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memjax.core.paths import path_name
from memjax.core.rules import operation, register_rule
from memjax.core.views import Axes, WeightView
from memjax.weights.dense import Product, casting, in_order, product


class Delta(abc.ABC):
    """What an adapter adds to a weight; a registered pytree whose leaves carry the batch axes in front."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        """Multiplies by the delta, as `WeightView.dot` does; the factors are cast to ``dtype``."""

    @abc.abstractmethod
    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        """Looks up slices of the delta, as `WeightView.take` does."""

    @abc.abstractmethod
    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        """Convolves with the delta, as `WeightView.conv` does."""

    @abc.abstractmethod
    def materialize(self, axes: Axes) -> jax.Array:
        """Returns the dense delta, float32 or wider, in the axis order of the base."""

    @abc.abstractmethod
    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        """Returns PartitionSpecs of the leaves, given one entry per axis of the base."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "key"], meta_fields=["scale", "dropout"])
@dataclass(frozen=True)
class LowRank(Delta):
    """``scale * a @ b``, with optional dropout of the input.

    Attributes:
      a: ``[*batch, *inputs, r]``.
      b: ``[*batch, r, *outputs]``.
      scale: factor of the product.
      dropout: probability with which an input element is dropped in forward products, if there is a key.
      key: uint32 ``[*batch, 2]`` key words, or None for no dropout.
    """

    a: jax.Array
    b: jax.Array
    scale: float
    dropout: float = 0.0
    key: jax.Array | None = None

    def _batch_ndim(self, axes: Axes) -> int:
        return self.a.ndim - len(axes.inputs) - 1

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        n = self._batch_ndim(axes)
        if self.key is not None and self.dropout and not transpose:
            x = drop(x, self.key, self.dropout, n)
        a_axes = tuple(range(-1 - len(axes.inputs), -1))
        b_axes = tuple(range(-len(axes.outputs), 0))
        first = functools.partial(product, batch_ndim=n, precision=settings.get("precision"))
        then = functools.partial(product, batch_ndim=n, **settings)
        if transpose:
            h = self._by_b(functools.partial(first, contract=b_axes), x, dtype)
            return casting(functools.partial(then, contract=(-1,)), h, self.a, (dtype,), barrier=False)
        h = casting(functools.partial(first, contract=a_axes), x, self.a, (dtype,), barrier=False)
        return self._by_b(functools.partial(then, contract=(-1 - len(axes.outputs),)), h, dtype)

    def _by_b(self, fn: Product, x: jax.Array, dtype: Any) -> jax.Array:
        """Returns ``fn(x, scale * b)``, of which reverse mode keeps b: no array of tokens is scaled, either way."""

        def scaled(x: jax.Array, b: jax.Array) -> jax.Array:
            return fn(x, b.astype(dtype) * jnp.asarray(self.scale, dtype))

        return jax.checkpoint(scaled, prevent_cse=False)(x, self.b)

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        if (axis,) == axes.inputs:
            rows = jnp.take(self.a, indices, axis=0, mode="clip").astype(dtype)
            y = product(rows, self.b.astype(dtype), contract=(-1 - len(axes.outputs),), batch_ndim=0)
            rest = axes.outputs
        else:
            rows = jnp.moveaxis(jnp.take(self.b, indices.reshape(-1), axis=1, mode="clip"), 1, 0)
            rows = rows.reshape(*indices.shape, -1).astype(dtype)
            y = product(rows, self.a.astype(dtype), contract=(-1,), batch_ndim=0)
            rest = axes.inputs
        return in_order(y, rest, tuple(sorted(rest))) * jnp.asarray(self.scale, dtype)

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        """Convolves with ``a`` (r features per group), then mixes the r features pointwise with ``b``."""
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        rank, features = self.b.shape
        kernel = jnp.tile(self.a.astype(dtype), groups)
        order = [axes.inputs.index(axis) if axis in axes.inputs else len(axes.inputs) for axis in permutation]
        h = lax.conv_general_dilated_p.bind(x, kernel.transpose(order), **params)
        channel = numbers.out_spec[1]
        h = jnp.moveaxis(h, channel, -1) * jnp.asarray(self.scale, h.dtype)
        h = h.reshape(*h.shape[:-1], groups, rank)
        b = self.b.astype(dtype).reshape(rank, groups, features // groups)
        y = jnp.einsum("...gr,rgf->...gf", h, b, precision=params["precision"])
        return jnp.moveaxis(y.reshape(*y.shape[:-2], features), -1, channel)

    def materialize(self, axes: Axes) -> jax.Array:
        n = self._batch_ndim(axes)
        dtype = jnp.promote_types(self.a.dtype, jnp.float32)
        delta = product(
            self.a.astype(dtype),
            self.b.astype(dtype),
            contract=(-1 - len(axes.outputs),),
            batch_ndim=n,
            precision=lax.Precision.HIGHEST,
        )
        stored = axes.inputs + axes.outputs
        return in_order(delta, stored, tuple(sorted(stored))) * self.scale

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        batch = spec[: len(spec) - axes.ndim]
        specs: dict[str, Any] = {
            "a": PartitionSpec(*batch, *(spec[axis] for axis in axes.inputs), None),
            "b": PartitionSpec(*batch, None, *(spec[axis] for axis in axes.outputs)),
            "key": None if self.key is None else PartitionSpec(*batch, None),
        }
        return replace(self, **specs)


def drop(x: jax.Array, key: jax.Array, rate: float, batch_ndim: int) -> jax.Array:
    """Drops elements of ``x`` and scales the rest by 1 / (1 - rate).

    Args:
      x: ``[*batch, ...]``.
      key: uint32 ``[*batch, 2]`` key words.
      rate: probability of dropping an element.
      batch_ndim: number of batch axes.
    """

    def one(x: jax.Array, key: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(jax.random.wrap_key_data(key, impl="threefry2x32"), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

    for _ in range(batch_ndim):
        one = jax.vmap(one)
    return one(x, key)


def other_words(tree: Any, number: jax.Array) -> Any:
    """Returns ``tree``, whose words for dropout (uint32 leaves called ``key``, if any) differ between numbers."""
    words = jax.random.bits(jax.random.key(number), (2,), jnp.uint32)

    def fold(keys: Any, leaf: jax.Array) -> jax.Array:
        is_words = leaf.dtype == jnp.uint32 and f"/{path_name(keys)}".endswith("/key")
        return leaf ^ words if is_words else leaf

    return jax.tree_util.tree_map_with_path(fold, tree)


fold_keys = operation("fold_keys")(lambda weight, number: weight)
"""``(weight, number) -> weight``, with `other_words` under `memjax.lift`."""


def _fold_keys(lift: Any, weight: Any, number: jax.Array) -> Any:
    return replace(weight, view=other_words(weight.view, number))


register_rule("fold_keys", _fold_keys)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "deltas"], meta_fields=[])
@dataclass(frozen=True)
class Adapted(WeightView):
    """``base + sum of deltas``, never formed.

    Attributes:
      base: the frozen weight, itself a view.
      deltas: what adapters add.
    """

    base: WeightView
    deltas: tuple[Delta, ...]

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.base.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def _dtype(self, casts: tuple[Any, ...]) -> Any:
        return jnp.dtype(casts[-1]) if casts else self.dtype

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
        y = self.base.dot(x, transpose=transpose, casts=casts, **settings)
        for delta in self.deltas:
            y = y + delta.dot(x, self.axes, transpose=transpose, dtype=self._dtype(casts), **settings).astype(y.dtype)
        return y

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        y = self.base.take(indices, axis=axis, casts=casts)
        for delta in self.deltas:
            y = y + delta.take(indices, self.axes, axis=axis, dtype=self._dtype(casts)).astype(y.dtype)
        return y

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        y = self.base.conv(x, permutation=permutation, casts=casts, params=params)
        for delta in self.deltas:
            dtype = self._dtype(casts)
            y = y + delta.conv(x, self.axes, permutation=permutation, dtype=dtype, params=params).astype(y.dtype)
        return y

    def materialize(self) -> jax.Array:
        total = self.base.astype(jnp.promote_types(self.dtype, jnp.float32)).materialize()
        for delta in self.deltas:
            total = total + delta.materialize(self.axes)
        return total.astype(self.dtype)

    def astype(self, dtype: Any) -> Adapted:
        return replace(self, base=self.base.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        deltas = tuple(delta.specs(spec, self.axes) for delta in self.deltas)
        return replace(self, base=self.base.specs(spec), deltas=deltas)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "constants"], meta_fields=["method"])
@dataclass(frozen=True)
class Anchored(WeightView):
    """A frozen weight and the constants that an adapter keeps beside it; of no use until the adapter is attached.

    Attributes:
      base: what is left of the weight.
      constants: name -> array; batch axes lead.
      method: the adapter's method.
    """

    base: WeightView
    constants: dict[str, jax.Array]
    method: str

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.base.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the weight of shape {self.shape} was prepared for {self.method}: use it as adapter.attach(frozen, theta)"
        )

    dot = take = conv = materialize = _refuse

    def astype(self, dtype: Any) -> Anchored:
        return replace(self, base=self.base.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        constants: Any = dict.fromkeys(self.constants, PartitionSpec(*spec[: len(spec) - self.axes.ndim]))
        return replace(self, base=self.base.specs(spec), constants=constants)
