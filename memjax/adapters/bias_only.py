"""BitFit: biases are trained, and nothing else.

The gradient of a bias is a sum of output gradients, so that reverse mode keeps no input of a frozen product.
Source: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import (
    METHODS,
    Adapter,
    Constants,
    MergeError,
    Theta,
    adapted,
    axes_table,
    bias_of,
    check_known,
    check_vector,
    float_dtype,
)
from memjax.codecs import Codec
from memjax.core.paths import leaf_paths, map_with_path
from memjax.core.views import Axes, WeightView, is_view
from memjax.weights import Delta
from memjax.weights.dense import in_order


@dataclass(frozen=True)
class BiasOnly(Adapter):
    """A bias-only adapter: settings and the functions that use them. `bias_only` makes one and describes the fields.

    Trains as many numbers as the target vectors have, and d_out per kernel.
    """

    targets: str | Sequence[str]
    kernels: str | Sequence[str]
    axes: Mapping[str, Any]
    dtype: Any

    method = "bias_only"

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns zeros.

        Returns:
          Logical path -> ``{"shift": [...]}``, what is added to a vector, or ``{"bias": [*batch, *outputs]}``, what is
          added to the outputs of a kernel. No constants.

        Raises:
          ValueError: a pattern that matches nothing, a target that is a packed weight, a kernel that has a bias which
            is no target.
        """
        leaves = dict(leaf_paths(params))
        theta: Theta = {}
        for path in self._targets(params):
            if is_view(leaves[path]):
                raise ValueError(
                    f"{path}: expected an array to add to, got {type(leaves[path]).__name__}; see kernels="
                )
            theta[path] = {"shift": jnp.zeros(leaves[path].shape, self.dtype)}
        for weight in replace(self, targets=self.kernels).weights(params):
            bias = bias_of(weight.path)
            if bias not in leaves:
                theta[weight.path] = {"bias": jnp.zeros((*weight.batch, *weight.outputs), self.dtype)}
            elif bias not in theta:
                raise ValueError(f"{weight.path}: the kernel has a bias, {bias}; name it in targets")
        return theta, {}

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) != {"bias"}:
            raise ValueError(f"{path}: expected the factor bias, found {sorted(factors)}")
        check_vector(path, base, "bias", factors["bias"], base.axes.outputs)
        return adapted(base, OutputBias(factors["bias"]))

    def attach(self, frozen: Any, theta: Theta, key: jax.Array | None = None) -> Any:
        """Returns ``frozen`` with the vectors shifted, and a view at every kernel of ``theta``.

        Raises:
          ValueError: a path that ``frozen`` does not have, factors that do not fit the leaf.
        """
        check_known(theta, frozen)
        shifts = {path: factors["shift"] for path, factors in theta.items() if "shift" in factors}

        def add(path: str, leaf: Any) -> Any:
            if path not in shifts:
                return leaf
            if leaf.shape != shifts[path].shape:
                raise ValueError(f"{path}: expected a shift of shape {leaf.shape}, got {shifts[path].shape}")
            return (leaf + shifts[path]).astype(leaf.dtype)

        kernels = {path: factors for path, factors in theta.items() if path not in shifts}
        return map_with_path(add, super().attach(frozen, kernels, key))

    def merge(self, frozen: Any, theta: Theta, to: str | Codec = "same") -> tuple[Any, dict[str, MergeError]]:
        """As `Adapter.merge`; vectors take their shifts.

        Raises:
          ValueError: a kernel without a bias leaf, which has no place for the bias that it was given.
        """
        stray = sorted(path for path, factors in theta.items() if "bias" in factors)
        if stray:
            raise ValueError(
                f"{', '.join(stray)}: an output bias is no part of a kernel, and the params have no bias leaf to merge "
                "it into; build the model with biases and name them in targets, or keep the adapter"
            )
        return super().merge(frozen, theta, to)


def bias_only(
    *,
    targets: str | Sequence[str] = "**/bias",
    kernels: str | Sequence[str] = (),
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> BiasOnly:
    """Returns a bias-only adapter.

    Args:
      targets: pattern(s) of the vectors that are trained, such as biases and the scales and shifts of norms; may be
        empty.
      kernels: pattern(s) of weights whose outputs get a trained bias, where the model has none.
      axes: pattern -> (input axes, output axes) for kernels that are not ``[*batch, in, out]``.
      dtype: of what is trained.

    Raises:
      ValueError: neither targets nor kernels, or a dtype that is not floating point.
    """
    if not targets and not kernels:
        raise ValueError("expected targets= or kernels=: there is nothing to train")
    return BiasOnly(targets or (), kernels, axes_table(axes), float_dtype(dtype))


METHODS["bias_only"] = bias_only


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bias"], meta_fields=[])
@dataclass(frozen=True)
class OutputBias(Delta):
    """A bias added to the outputs of a weight; affine, so no part of the weight itself.

    Attributes:
      bias: ``[*batch, *outputs]``.
    """

    bias: jax.Array

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        if transpose:
            raise ValueError("a weight with an output bias is multiplied along its outputs, which has no meaning")
        batch_ndim = self.bias.ndim - len(axes.outputs)
        rows = x.ndim - batch_ndim - len(axes.inputs)
        return jnp.expand_dims(self.bias, tuple(range(batch_ndim, batch_ndim + rows))).astype(dtype)

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        if (axis,) != axes.inputs:
            raise ValueError("a weight with an output bias is looked up along its outputs, which has no meaning")
        return in_order(self.bias, axes.outputs, tuple(sorted(axes.outputs))).astype(dtype)

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        channel = params["dimension_numbers"].out_spec[1]
        return self.bias.reshape([-1 if i == channel else 1 for i in range(x.ndim)]).astype(dtype)

    def materialize(self, axes: Axes) -> jax.Array:
        raise ValueError("an output bias is no part of the weight and has no dense form")

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        batch = spec[: len(spec) - axes.ndim]
        specs: dict[str, Any] = {"bias": PartitionSpec(*batch, *(spec[axis] for axis in axes.outputs))}
        return replace(self, **specs)
