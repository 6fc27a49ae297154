"""LISA: Adam on a few layers drawn at random, and on the embedding and the head all the time.

Source: LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, 2024.

Every ``switch_every`` steps ``active`` layers of the stack are drawn without replacement, independently of those
before; their moments start anew. Leaves outside of the stack keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optax

from memjax.core.paths import Patterns
from memjax.optim.badam import BlockStep, LayerBlocks, block_step, scale_by_blocks
from memjax.optim.fused_step import LossParts


def scale_by_lisa(
    switch_every: int = 20,
    *,
    active: int = 2,
    always: Patterns | None = "**",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layers: str = "layers",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Scales gradients of the drawn layers and of what is outside of the stack by Adam, and drops all others.

    Args:
      switch_every: steps between draws.
      active: layers that are drawn.
      always: patterns of the leaves outside of the stack that are trained; None freezes all.
      b1, b2, eps: of Adam.
      weight_decay: of the matrices that are trained.
      layers: the key in params of the tree of stacked leaves ``[L, ...]``.
      seed: of the draws.

    Returns:
      A transformation with `BlockState`: ``8 * (active layers + trained outer leaves)`` bytes and three counters.

    Raises:
      ValueError: settings out of range; by ``init``, params without a stack of so many layers.
      TypeError: by ``init``, a weight view among the parameters.
    """
    blocks = LayerBlocks(switch_every, active, "independent", always, layers, seed)
    return scale_by_blocks(blocks, optax.scale_by_adam(b1, b2, eps), weight_decay)


def lisa(
    learning_rate: optax.ScalarOrSchedule,
    switch_every: int = 20,
    *,
    active: int = 2,
    always: Patterns | None = "**",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layers: str = "layers",
    seed: int = 0,
) -> optax.GradientTransformation:
    """LISA on whole gradients, for any chain and loop; `lisa_step` computes no others than the drawn layers'.

    Args:
      learning_rate: a number or a schedule.
      switch_every and all others: as in `scale_by_lisa`.
    """
    scaled = scale_by_lisa(
        switch_every,
        active=active,
        always=always,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        layers=layers,
        seed=seed,
    )
    return optax.chain(scaled, optax.scale_by_learning_rate(learning_rate))


def lisa_step(
    loss_parts: LossParts | Sequence[Callable[..., Any]],
    learning_rate: optax.ScalarOrSchedule,
    switch_every: int = 20,
    *,
    active: int = 2,
    always: Patterns | None = "**",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layers: str = "layers",
    seed: int = 0,
) -> BlockStep:
    """LISA as a training step that computes gradients of what it trains only; see `block_step`.

    Args:
      loss_parts: (embed, block, head), see `LossParts`.
      learning_rate: a number or a schedule.
      switch_every and all others: as in `scale_by_lisa`.
    """
    blocks = LayerBlocks(switch_every, active, "independent", always, layers, seed)
    return block_step(loss_parts, blocks, optax.scale_by_adam(b1, b2, eps), learning_rate, weight_decay)
