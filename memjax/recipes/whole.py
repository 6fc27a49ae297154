"""Training the weights themselves, in the place of an adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from memjax.core.paths import Patterns, leaf_paths
from memjax.core.roles import check_trained, combine, partition
from memjax.core.views import is_view


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """What `memjax.recipes.finetuning` asks of an adapter, of weights that are trained: theta is the chosen leaves.

    Attributes:
      targets: pattern(s) of the trained weights.
    """

    targets: Patterns = "**"

    def prepare(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """Returns (the other leaves, the chosen ones); nothing of them is random, so the key decides nothing.

        Raises:
          ValueError: a pattern that matches nothing.
          TypeError: a chosen leaf that is packed.
        """
        del key
        theta, frozen = partition(params, self.targets)
        for path, leaf in leaf_paths(theta):
            if is_view(leaf):
                raise TypeError(
                    f"{path} is packed and cannot be trained itself; load it dense (--format dense), or train an "
                    "adapter on it"
                )
        check_trained(theta)
        return frozen, theta

    def attach(self, frozen: Any, theta: Any, key: Any = None) -> Any:
        """Returns the params of the model."""
        return combine(frozen, theta)
