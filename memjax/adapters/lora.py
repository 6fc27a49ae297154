"""LoRA: a trained low-rank delta on frozen weights.

y = x W + s (dropout(x) A) B with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
Sources: LoRA: Low-Rank Adaptation of Large Language Models, 2021; A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from memjax.adapters.adapter import (
    METHODS,
    Adapter,
    Constants,
    Theta,
    adapted,
    axes_table,
    float_dtype,
    path_seed,
)
from memjax.core.paths import lookup, select
from memjax.core.views import WeightView
from memjax.weights import LowRank

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclass(frozen=True)
class Lora(Adapter):
    """A LoRA adapter: settings and the functions that use them. `lora` makes one and describes the fields.

    Trains ``r (d_in + d_out)`` numbers per matrix.
    """

    rank: int | Mapping[str, int]
    alpha: float | Mapping[str, float] | None
    targets: str | Sequence[str]
    dropout: float
    initializer: str | Initializer
    scaling: str
    axes: Mapping[str, Any]
    dtype: Any

    method = "lora"

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns factors such that the adapted weights equal the frozen ones.

        Returns:
          Logical path -> ``{"a": [*batch, *inputs, r], "b": [*batch, r, *outputs]}`` in the adapter's dtype. ``b``
          is zero; for embeddings (leaves named ``embedding``), ``a`` is zero and ``b`` normal. No constants.

        Raises:
          ValueError: a pattern that matches nothing, a leaf of fewer than two axes, a rank above the matrix's.
        """
        theta: Theta = {}
        for weight in self.weights(params):
            path, rank = weight.path, self._rank(weight.path)
            check_rank(path, rank, weight.d_in, weight.d_out)
            a_shape, b_shape = (*weight.batch, *weight.inputs, rank), (*weight.batch, rank, *weight.outputs)
            leaf_key = jax.random.fold_in(key, path_seed(path))
            if path.rpartition("/")[2] == "embedding":
                a, b = jnp.zeros(a_shape, self.dtype), jax.random.normal(leaf_key, b_shape, self.dtype)
            else:
                a, b = self._init_a(leaf_key, a_shape, weight.d_in), jnp.zeros(b_shape, self.dtype)
            theta[path] = {"a": a, "b": b}
        return theta, {}

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) != {"a", "b"}:
            raise ValueError(f"{path}: expected the factors a and b, found {sorted(factors)}")
        a, b = factors["a"], factors["b"]
        check_factors(path, base, a, b)
        words = key if self.dropout else None
        return adapted(base, LowRank(a, b, self.scale(path, a.shape[-1]), self.dropout, words))

    def scale(self, path: str, rank: int) -> float:
        """Returns the factor of the low-rank product at ``path``."""
        alpha = lookup(dict(self.alpha), path) if isinstance(self.alpha, Mapping) else self.alpha
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        init = settings.pop("initializer")
        return settings | {"init": "kaiming" if init == "callable" else init}

    def _targets(self, params: Any) -> list[str]:
        for table in (self.rank, self.alpha):
            for pattern in table if isinstance(table, Mapping) else ():
                select(params, pattern)
        return super()._targets(params)

    def _rank(self, path: str) -> int:
        if isinstance(self.rank, int):
            return self.rank
        rank = lookup(dict(self.rank), path)
        if rank is None:
            raise ValueError(f"{path}: no pattern of rank={dict(self.rank)} matches it; add '**': <rank> as a default")
        return rank

    def _init_a(self, key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
        if callable(self.initializer):
            return self.initializer(key, shape, self.dtype)
        if self.initializer == "gaussian":
            return jax.random.normal(key, shape, self.dtype) / shape[-1]
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, self.dtype, -bound, bound)


def lora(
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    dropout: float = 0.0,
    init: str | Initializer = "kaiming",
    scaling: str = "alpha_over_r",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Lora:
    """Returns a LoRA adapter.

    Args:
      rank: r, or pattern -> r (the first pattern that matches a path counts).
      alpha: numerator of the scale, or pattern -> alpha; None means the rank, that is a scale of 1.
      targets: pattern(s) of the weights to adapt: matrices, stacks of matrices, embeddings, convolution kernels.
      dropout: probability with which an input element of the delta is dropped, where `Lora.attach` gets a key.
      init: of A. ``"kaiming"``: uniform within 1 / sqrt(inputs); ``"gaussian"``: normal with deviation 1 / r; or a
        function of (key, shape, dtype). B starts at zero.
      scaling: ``"alpha_over_r"`` or ``"rslora"`` (alpha / sqrt(r)).
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``, such as
        `memjax.weights.infer_axes` returns.
      dtype: of the factors; they are cast to the weight's dtype in products.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    ranks = rank.values() if isinstance(rank, Mapping) else [rank]
    if any(not isinstance(r, int) or r < 1 for r in ranks):
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not callable(init) and init not in ("kaiming", "gaussian"):
        raise ValueError(f"init must be 'kaiming', 'gaussian' or a function, got {init!r}")
    if scaling not in ("alpha_over_r", "rslora"):
        raise ValueError(f"scaling must be 'alpha_over_r' or 'rslora', got {scaling!r}")
    return Lora(rank, alpha, targets, dropout, init, scaling, axes_table(axes), float_dtype(dtype))


METHODS["lora"] = lora


def check_rank(path: str, rank: int, d_in: int, d_out: int) -> None:
    """Raises a ValueError for a rank above the matrix's."""
    if rank > min(d_in, d_out):
        raise ValueError(f"{path}: rank {rank} is larger than the matrix, which is {d_in} x {d_out}")


def check_factors(path: str, base: WeightView, a: jax.Array, b: jax.Array) -> None:
    """Raises a ValueError unless ``a`` and ``b`` are low-rank factors for ``base``."""
    batch = base.shape[: base.batch_ndim]
    rank = a.shape[-1]
    wanted = (
        (*batch, *(base.shape[axis] for axis in base.axes.inputs), rank),
        (*batch, rank, *(base.shape[axis] for axis in base.axes.outputs)),
    )
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise ValueError(
            f"{path}: expected factors of shapes {wanted[0]} and {wanted[1]} for a weight of shape {base.shape}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
