"""Held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.recipes.data import Windows
from memjax.recipes.train import LossFn


class Evaluation(NamedTuple):
    """Mean negative log likelihood of held-out targets."""

    nll: float  # nats per target
    tokens: int  # targets that counted

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


def make_evaluate(loss_fn: LossFn | jax.stages.Compiled) -> Callable[[Any, Any, Windows, int], Evaluation]:
    """Builds ``evaluate(theta, frozen, windows, batch) -> Evaluation``.

    ``loss_fn`` is the one of `memjax.recipes.train.make_step`, without dropout, or it compiled for the batch. The last
    batch is filled up with windows of weight zero, so one shape is compiled.
    """
    compiled = loss_fn if isinstance(loss_fn, jax.stages.Compiled) else jax.jit(loss_fn)

    def evaluate(theta: Any, frozen: Any, windows: Windows, batch: int) -> Evaluation:
        total, count = 0.0, 0.0
        for start in range(0, len(windows.inputs), batch):
            part = jax.tree.map(lambda x, start=start: _fill(x[start : start + batch], batch), windows)
            nll, weight = compiled(theta, frozen, part, jax.random.key(0))
            total, count = total + float(nll), count + float(weight)
        return Evaluation(total / count, int(count))

    return evaluate


def _fill(rows: np.ndarray, batch: int) -> jax.Array:
    return jnp.asarray(np.pad(rows, [(0, batch - len(rows))] + [(0, 0)] * (rows.ndim - 1)))
