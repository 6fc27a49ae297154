"""(IA)^3: learned vectors that rescale the outputs of keys and values and the inputs of the feed-forward output.

y = (x W + b) * l for attention weights, y = (x * l) W + b for feed-forward ones.
Source: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from memjax.adapters.adapter import (
    METHODS,
    Adapter,
    Constants,
    Theta,
    axes_table,
    bias_of,
    check_vector,
    float_dtype,
)
from memjax.core.paths import map_with_path, select
from memjax.core.views import WeightView
from memjax.weights import Rescaled


@dataclass(frozen=True)
class Ia3(Adapter):
    """An (IA)^3 adapter: settings and the functions that use them. `ia3` makes one and describes the fields.

    Trains d_out numbers per matrix, d_in where it is feed-forward.
    """

    targets: str | Sequence[str]
    feedforward: str | Sequence[str]
    axes: Mapping[str, Any]
    dtype: Any

    method = "ia3"

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns vectors of ones.

        Returns:
          Logical path -> ``{"row": [*batch, *inputs]}`` for feed-forward weights, ``{"column": [*batch, *outputs]}``
          for others. No constants.

        Raises:
          ValueError: a pattern that matches nothing, a feed-forward weight that is no target.
        """
        weights = self.weights(params)
        patterns = [self.feedforward] if isinstance(self.feedforward, str) else list(self.feedforward)
        rows = set(select(params, patterns))
        if rows - {weight.path for weight in weights}:
            raise ValueError(f"feedforward={self.feedforward!r} selects weights that targets={self.targets!r} does not")
        theta: Theta = {}
        for weight in weights:
            name, sizes = ("row", weight.inputs) if weight.path in rows else ("column", weight.outputs)
            theta[weight.path] = {name: jnp.ones((*weight.batch, *sizes), self.dtype)}
        return theta, {}

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) not in ({"row"}, {"column"}):
            raise ValueError(f"{path}: expected the factor row or the factor column, found {sorted(factors)}")
        ((name, vector),) = factors.items()
        group = base.axes.inputs if name == "row" else base.axes.outputs
        check_vector(path, base, name, vector, group)
        return Rescaled(base, **{name: vector})

    def attach(self, frozen: Any, theta: Theta, key: jax.Array | None = None) -> Any:
        """As `Adapter.attach`; a bias beside a weight whose outputs are rescaled is rescaled too."""
        columns = {bias_of(path): factors["column"] for path, factors in theta.items() if "column" in factors}

        def rescale(path: str, leaf: Any) -> Any:
            if path not in columns:
                return leaf
            if leaf.shape != columns[path].shape:
                raise ValueError(f"{path}: expected a bias of shape {columns[path].shape}, got {leaf.shape}")
            return (leaf * columns[path]).astype(leaf.dtype)

        return map_with_path(rescale, super().attach(frozen, theta, key))


def ia3(
    *,
    targets: str | Sequence[str] = "**/{k,v,down}_proj/kernel",
    feedforward: str | Sequence[str] = "**/down_proj/kernel",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Ia3:
    """Returns an (IA)^3 adapter.

    Args:
      targets: pattern(s) of the weights to adapt.
      feedforward: pattern(s) of those whose inputs are rescaled; may be empty.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.
      dtype: of the vectors.

    Raises:
      ValueError: a dtype that is not floating point.
    """
    return Ia3(targets, feedforward, axes_table(axes), float_dtype(dtype))


METHODS["ia3"] = ia3
