"""Training the weights themselves, in the place of an adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from memjax.core.paths import Patterns
from memjax.core.roles import check_trained, combine, partition


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
        check_trained(theta)
        return frozen, theta

    def attach(self, frozen: Any, theta: Any, key: Any = None) -> Any:
        """Returns the params of the model."""
        return combine(frozen, theta)
