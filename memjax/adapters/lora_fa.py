"""LoRA-FA: LoRA whose A is frozen, so that reverse mode keeps x A ``[T, r]`` in place of x ``[T, d_in]``.

y = x W + s (dropout(x) A) B; B is trained.
Source: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.adapters.adapter import METHODS, Constants, Theta, path_seed
from memjax.adapters.lora import Initializer, Lora, check_rank, lora
from memjax.core.paths import leaf_paths
from memjax.core.views import WeightView
from memjax.weights import Anchored


@dataclass(frozen=True)
class LoraFa(Lora):
    """A LoRA-FA adapter: settings and the functions that use them. `lora_fa` makes one and describes the fields.

    Trains ``r d_out`` numbers per matrix and keeps ``r d_in`` constants.
    """

    method = "lora_fa"
    anchored = True

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns factors such that the adapted weights equal the frozen ones.

        Returns:
          Logical path -> ``{"b": [*batch, r, *outputs]}``, zero, and logical path -> ``{"a": [*batch, *inputs, r]}``.
        """
        theta: Theta = {}
        constants: Constants = {}
        for weight in self.weights(params):
            rank = self._rank(weight.path)
            check_rank(weight.path, rank, weight.d_in, weight.d_out)
            leaf_key = jax.random.fold_in(key, path_seed(weight.path))
            a = self._init_a(leaf_key, (*weight.batch, *weight.inputs, rank), weight.d_in)
            theta[weight.path] = {"b": jnp.zeros((*weight.batch, rank, *weight.outputs), self.dtype)}
            constants[weight.path] = {"a": a}
        return theta, constants

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) != {"b"}:
            raise ValueError(f"{path}: expected the factor b, found {sorted(factors)}")
        return super().view(path, base, {"a": lax.stop_gradient(constants["a"]), "b": factors["b"]}, {}, key)


def lora_fa(
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    dropout: float = 0.0,
    init: str | Initializer = "kaiming",
    scaling: str = "alpha_over_r",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> LoraFa:
    """Returns a LoRA-FA adapter.

    Args:
      rank, alpha, targets, dropout, init, scaling, axes, dtype: as in `memjax.adapters.lora`.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    plain = lora(rank, alpha, targets=targets, dropout=dropout, init=init, scaling=scaling, axes=axes, dtype=dtype)
    return LoraFa(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})


METHODS["lora_fa"] = lora_fa


def lora_fa_correction(adapter: LoraFa, frozen: Any, damping: float = 1e-8) -> optax.GradientTransformation:
    """Returns a transform that turns the gradient of B into the one that moves W closest to its own gradient.

    With g = dL/dW, a step along d moves W by s A d. The d that minimises |s A d - g| is (A^T A)^-1 (dL/dB) / s^2, since
    dL/dB = s A^T g. Put it first in the chain.

    Args:
      adapter: a LoRA-FA adapter.
      frozen: the tree of `LoraFa.prepare`, which holds A.
      damping: added to the diagonal of A^T A.
    """
    grams = {}
    for path, leaf in leaf_paths(frozen):
        if isinstance(leaf, Anchored) and leaf.method == adapter.method:
            a = leaf.constants["a"]
            a = a.reshape(*leaf.shape[: leaf.batch_ndim], -1, a.shape[-1]).astype(jnp.float32)
            gram = jnp.einsum("...ik,...il->...kl", a, a, precision=lax.Precision.HIGHEST)
            grams[path] = adapter.scale(path, a.shape[-1]) ** 2 * (gram + damping * jnp.eye(a.shape[-1]))

    def correct(path: str, b: jax.Array) -> jax.Array:
        rows = b.reshape(*grams[path].shape[:-1], -1).astype(grams[path].dtype)
        return jnp.linalg.solve(grams[path], rows).reshape(b.shape).astype(b.dtype)

    def update(grads: Theta, params: Any = None) -> Theta:
        return {path: {"b": correct(path, factors["b"])} for path, factors in grads.items()}

    return optax.stateless(update)
