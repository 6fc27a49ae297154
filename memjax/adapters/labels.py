"""Optimizers that treat an adapter's factors unlike: by factor name, by pattern, and LoRA+.

LoRA+ gives B a learning rate ``ratio`` times that of A, for at equal rates A hardly learns features in wide models.
Source: LoRA+: Efficient Low Rank Adaptation of Large Models, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import optax

from memjax.core.paths import map_with_path, match, select

INPUT_FACTORS = ("a", "s", "p", "down")
"""Factors on the input's side of a product and cores between: the slow ones of LoRA+; all others are fast."""


def labels(theta: Any) -> Any:
    """Returns the tree of ``theta`` with each leaf's factor name (``"a"``, ``"b"``, ``"m"``...) in place of the array.

    These are labels for `optax.multi_transform`, in any chain.
    """
    return map_with_path(lambda path, leaf: path.rpartition("/")[2], theta)


def by_label(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Gives every trained leaf the transform of the first pattern that matches it: rates, schedules, weight decay.

    Args:
      transforms: pattern -> transform, over paths that end in the factor's name, such as ``"**/q_proj/kernel/b"``,
        ``"**/b"`` or ``"**"``; `optax.set_to_zero` freezes.

    Raises:
      ValueError: (by ``init``) a pattern that matches nothing, a leaf that no pattern matches.
    """

    def assign(theta: Any) -> Any:
        for pattern in transforms:
            select(theta, pattern)
        return map_with_path(pick, theta)

    def pick(path: str, leaf: Any) -> str:
        found = next((pattern for pattern in transforms if match(pattern, path)), None)
        if found is None:
            raise ValueError(f"no pattern of {list(transforms)} matches {path}; add '**' for the rest")
        return found

    return optax.multi_transform(dict(transforms), assign)


def lora_plus(
    tx_factory: Callable[[Any], optax.GradientTransformation],
    lr: float | optax.Schedule,
    ratio: float = 16.0,
    *,
    embedding_lr: float | optax.Schedule = 1e-6,
    slow: Collection[str] = INPUT_FACTORS,
) -> optax.GradientTransformation:
    """Returns LoRA+: a rate for A and one ``ratio`` times higher for B and for vectors.

    Args:
      tx_factory: learning rate -> transform, such as `optax.adamw`, or ``lambda lr: optax.adamw(lr, weight_decay=0)``.
      lr: of the slow factors; a number or a schedule.
      ratio: at least 1.
      embedding_lr: of both factors of embeddings (weights named ``embedding``).
      slow: names of the slow factors.

    Raises:
      ValueError: a ratio below 1.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}")

    def fast_rate(step: Any) -> Any:
        return ratio * lr(step)  # type: ignore[operator]

    def group(path: str, leaf: Any) -> str:
        *_, weight, factor = ["", *path.split("/")]
        return "embedding" if weight == "embedding" else "slow" if factor in slow else "fast"

    transforms = {
        "slow": tx_factory(lr),
        "fast": tx_factory(fast_rate if callable(lr) else ratio * lr),
        "embedding": tx_factory(embedding_lr),
    }
    return optax.multi_transform(transforms, lambda theta: map_with_path(group, theta))
