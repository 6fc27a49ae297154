"""The adapters that the commands train, by name, with the settings that suit them where none are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import optax

from memjax import adapters
from memjax.adapters.adapter import bias_of
from memjax.core.paths import leaf_paths, select
from memjax.recipes.whole import TrainedWeights

AdapterName = Literal[
    "lora",
    "rslora",
    "dora",
    "pissa",
    "olora",
    "vera",
    "lora_fa",
    "lamda",
    "mos",
    "snell",
    "ce_ssl",
    "ia3",
    "bias_only",
    "none",
]
LINEAR = ("**/{q,k,v,o,gate,up,down}_proj/kernel",)


class Method(NamedTuple):
    """How a method is made, and its settings where none are given.

    Attributes:
      make: function of the params and, by name, of the settings that the method has, to an adapter.
      lr: learning rate.
      rank: None: the method has none.
      alpha: of the rank; None: the method has none.
      dropout: whether the method has dropout of its inputs.
      targets: patterns of the weights that are adapted.
      after: number of steps -> what follows the optimizer, or None: LaMDA freezes rows of B on the way.
    """

    make: Callable[..., adapters.Adapter | TrainedWeights]
    lr: float
    rank: int | None = 16
    alpha: Callable[[int], float] | None = lambda rank: 2.0 * rank
    dropout: bool = False
    targets: tuple[str, ...] = LINEAR
    after: Callable[[int], optax.GradientTransformation] | None = None


class Settings(NamedTuple):
    """Settings of a method, complete; None is what the method has not."""

    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    lr: float


def _plain(factory: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """Returns the factory as a function of the params too, which it does not need."""
    return lambda params, **settings: factory(**settings, **fixed)


def _mos(params: Any, *, rank: int, alpha: float, targets: Sequence[str]) -> adapters.Mos:
    equivalent = max(1, rank // 4)
    return adapters.mos(rank, equivalent, min(1, equivalent - 1), alpha=alpha, targets=targets)


def _ia3(params: Any, *, targets: Sequence[str]) -> adapters.Ia3:
    down = select(params, "**/down_proj/kernel")
    return adapters.ia3(targets=targets, feedforward=[path for path in select(params, targets) if path in down])


def _bias_only(params: Any, *, targets: Sequence[str]) -> adapters.BiasOnly:
    """The biases beside the targets; where the model has none of them, new ones."""
    known = {path for path, _ in leaf_paths(params)}
    biases = [bias for path in select(params, targets) if (bias := bias_of(path)) in known]
    return adapters.bias_only(targets=biases, kernels=() if biases else targets)


def _one(rank: int) -> float:
    return float(rank)  # a scale of 1


METHODS: dict[str, Method] = {
    "lora": Method(_plain(adapters.lora), 2e-3, dropout=True),
    "rslora": Method(_plain(adapters.lora, scaling="rslora"), 2e-3, alpha=lambda rank: 8.0, dropout=True),
    "dora": Method(_plain(adapters.dora), 2e-3, dropout=True),
    "pissa": Method(_plain(adapters.pissa, niter=4), 5e-4, alpha=_one, dropout=True),
    "olora": Method(_plain(adapters.olora), 5e-4, alpha=_one, dropout=True),
    "vera": Method(_plain(adapters.vera), 1e-2, rank=256, alpha=None, dropout=True),
    "lora_fa": Method(_plain(adapters.lora_fa), 5e-3, dropout=True),
    "lamda": Method(_plain(adapters.lamda), 3e-4, rank=32, alpha=_one, after=adapters.progressive_freeze),
    "mos": Method(_mos, 2e-3),
    "snell": Method(_plain(adapters.snell, threshold="bfloat16"), 2e-3, rank=16, alpha=None),
    "ce_ssl": Method(_plain(adapters.ce_ssl), 2e-3),
    "ia3": Method(_ia3, 1e-2, rank=None, alpha=None, targets=("**/{k,v,down}_proj/kernel",)),
    "bias_only": Method(_bias_only, 3e-3, rank=None, alpha=None),
    "none": Method(_plain(TrainedWeights), 1e-4, rank=None, alpha=None, targets=("**",)),
}


def complete(
    name: str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    lr: float | None = None,
) -> Settings:
    """Returns the settings with the method's own where None is given.

    Args:
      name: of the method, see `METHODS`.
      rank, alpha, targets: of the adapter.
      lr: learning rate.

    Raises:
      ValueError: an unknown method, or a setting that it does not have.
    """
    method = _method(name)
    for setting, value, own in (("rank", rank, method.rank), ("alpha", alpha, method.alpha)):
        if value is not None and own is None:
            raise ValueError(f"{name} has no {setting}; leave {setting}={value} out")
    rank = method.rank if rank is None else rank
    if alpha is None and method.alpha is not None:
        assert rank is not None  # what has an alpha has a rank
        alpha = method.alpha(rank)
    patterns = method.targets if targets is None else tuple(targets)
    return Settings(rank, alpha, patterns, method.lr if lr is None else lr)


def make_adapter(name: str, params: Any, settings: Settings, dropout: float = 0.0) -> adapters.Adapter | TrainedWeights:
    """Makes an adapter.

    Args:
      name: of the method, see `METHODS`.
      params: the frozen tree.
      settings: of `complete`.
      dropout: probability with which an input element of the adapter is dropped in training.

    Raises:
      ValueError: an unknown method, settings out of range, dropout for a method without it.
    """
    method = _method(name)
    if dropout and not method.dropout:
        raise ValueError(f"{name} has no dropout; leave dropout={dropout} out")
    given = {"rank": settings.rank, "alpha": settings.alpha, "dropout": dropout if method.dropout else None}
    known = {setting: value for setting, value in given.items() if value is not None}
    return method.make(params, targets=settings.targets, **known)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown adapter {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]
