"""DoRA: a low-rank change of each column's direction, and a trained magnitude per column.

y = (m / n) * (x W + s (x A) B) with n_j the norm of column j of W + s A B, held constant in reverse mode.
Source: DoRA: Weight-Decomposed Low-Rank Adaptation, 2024.

The norms come from products with thin factors; no dense delta and no decoded copy of the weight is made for them:

    n_j^2 = c_j + 2 s sum_k G_kj B_kj + s^2 sum_k B_kj (H B)_kj,   c_j = |W_j|^2,   G = A^T W,   H = A^T A
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import METHODS, Constants, Theta, check_vector
from memjax.adapters.lora import Initializer, Lora, check_factors, lora
from memjax.adapters.matrices import matrix_of, per_matrix
from memjax.core.views import Axes, WeightView
from memjax.weights import Adapted, LowRank, Rescaled
from memjax.weights.adapted import drop


@dataclass(frozen=True)
class Dora(Lora):
    """A DoRA adapter: settings and the functions that use them. `dora` makes one and describes the fields.

    Trains ``r (d_in + d_out) + d_out`` numbers per matrix and keeps d_out constants, the squared column norms of the
    weight that `prepare` saw: what other adapters had attached to it then must not change later.
    """

    method = "dora"
    anchored = True

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns LoRA's factors, and magnitudes such that the adapted weights equal the frozen ones.

        Returns:
          Logical path -> ``{"a", "b", "m": [*batch, *outputs]}``, the magnitudes in float32 or wider, and logical
          path -> ``{"squares": [*batch, *outputs]}``.
        """
        theta, _ = super().start(key, params)
        constants: Constants = {}
        for weight in self.weights(params):
            squares = per_matrix(_squares, self._as_view(weight.path, weight.leaf))
            squares = squares.reshape(*weight.batch, *weight.outputs)
            theta[weight.path]["m"] = _root(squares)
            constants[weight.path] = {"squares": squares}
        return theta, constants

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) != {"a", "b", "m"}:
            raise ValueError(f"{path}: expected the factors a, b and m, found {sorted(factors)}")
        a, b, m = factors["a"], factors["b"], factors["m"]
        check_factors(path, base, a, b)
        check_vector(path, base, "m", m, base.axes.outputs)
        scale = self.scale(path, a.shape[-1])
        fixed = (lax.stop_gradient(a), lax.stop_gradient(b), constants["squares"])
        norms = per_matrix(functools.partial(_norms, scale=scale), base, *fixed)
        view = Rescaled(Adapted(base, (LowRank(a, b, scale),)), column=m / lax.stop_gradient(norms))
        return Dropped(view, key, self.dropout) if key is not None and self.dropout else view


def dora(
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    dropout: float = 0.0,
    init: str | Initializer = "kaiming",
    scaling: str = "alpha_over_r",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Dora:
    """Returns a DoRA adapter.

    Attach computes the norms, at the cost of one product of r rows with each weight; attach outside `shard_map`, where
    a weight is whole.

    Args:
      rank, alpha, targets, init, scaling, axes, dtype: as in `memjax.adapters.lora`.
      dropout: probability with which an input element is dropped, where attach gets a key. As in peft, the dropped
        input goes through all that the adapter adds, and so W multiplies both: y = x W + (m / n - 1) (drop(x) W) +
        (m / n) s (drop(x) A) B.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    plain = lora(rank, alpha, targets=targets, dropout=dropout, init=init, scaling=scaling, axes=axes, dtype=dtype)
    return Dora(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})


METHODS["dora"] = dora


def _squares(view: WeightView) -> jax.Array:
    """Returns the squared column norms ``[d_out]`` of a view without batch axes."""
    return jnp.sum(matrix_of(view) ** 2, axis=0)


def _root(squares: jax.Array) -> jax.Array:
    root = jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
    return lax.optimization_barrier(root)  # else XLA divides by it as a product with rsqrt, and m / n is not 1 at start


def _norms(base: WeightView, a: jax.Array, b: jax.Array, squares: jax.Array, *, scale: float) -> jax.Array:
    """Returns the column norms ``[*outputs]`` of base + scale a b, for a base without batch axes.

    Args:
      base: the weight.
      a: ``[*inputs, r]``.
      b: ``[r, *outputs]``.
      squares: ``[*outputs]``, squared column norms of the base.
    """
    highest, wide = lax.Precision.HIGHEST, squares.dtype
    a, b = a.astype(base.dtype), b.astype(base.dtype)  # as the products of the forward pass use them
    g = base.dot(jnp.moveaxis(a, -1, 0), precision=highest, preferred_element_type=wide)
    a, b = a.reshape(-1, a.shape[-1]).astype(wide), b.astype(wide)
    hb = jnp.tensordot(jnp.matmul(a.T, a, precision=highest), b, 1, precision=highest)
    return _root(squares + jnp.sum(b * (2 * scale * g + scale**2 * hb), axis=0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["view", "key"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropped(WeightView):
    """A DoRA weight in training: dropout of the input of all that the adapter adds to the frozen weight.

    Attributes:
      view: the weight without dropout; its base's base is the frozen weight.
      key: uint32 ``[*batch, 2]`` key words.
      rate: probability with which an input element is dropped in forward products.
    """

    view: Rescaled
    key: jax.Array
    rate: float

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.view.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def dtype(self) -> Any:
        return self.view.dtype

    def dot(self, x: jax.Array, *, transpose: bool = False, **settings: Any) -> jax.Array:
        if transpose:
            return self.view.dot(x, transpose=True, **settings)
        dropped = drop(x, self.key, self.rate, self.batch_ndim)
        adapted: Any = self.view.base
        return adapted.base.dot(x - dropped, **settings) + self.view.dot(dropped, **settings)

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        return self.view.take(indices, axis=axis, casts=casts)

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        return self.view.conv(x, permutation=permutation, casts=casts, params=params)

    def materialize(self) -> jax.Array:
        return self.view.materialize()

    def astype(self, dtype: Any) -> Dropped:
        return replace(self, view=self.view.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        specs: dict[str, Any] = {
            "view": self.view.specs(spec),
            "key": PartitionSpec(*spec[: self.batch_ndim], None),
        }
        return replace(self, **specs)
