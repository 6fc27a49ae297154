"""The optimizers of the commands by name, and the training step of each: whole gradients, layers in turn, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax import optim
from memjax.core.bytes import nbytes
from memjax.core.paths import leaf_paths
from memjax.parallel import device_bytes
from memjax.recipes.train import LossFn, Metrics, Training, TrainState, make_schedule, make_step

if TYPE_CHECKING:
    from memjax.recipes.settings import FinetuneSettings

OptimizerName = Literal[
    "adamw",
    "adamw8bit",
    "adamw4bit",
    "lion8bit",
    "adam_mini",
    "micro_adam",
    "frugal",
    "frugal8bit",
    "galore",
    "q_galore",
    "fira",
    "apollo",
    "apollo_mini",
    "ldadam",
    "badam",
    "lisa",
    "mezo",
]


class Optimizer(NamedTuple):
    """How an optimizer is made.

    Attributes:
      make: (learning-rate schedule, weight decay, of `settings`) -> optax transformation, or what `kind` needs.
      rate: its learning rate where none is given, times the one that AdamW has for what is trained.
      settings: those of ``density``, ``update_gap`` and ``seed`` that it has -> its names for them.
      kind: "gradients": an optax transformation of whole gradients; "blocks": trains layers in turn, and gradients are
        of those only; "passes": forward passes alone.
      block: of "blocks": layers in a block, and whether weights outside of the layers are trained too.
    """

    make: Callable[..., Any]
    rate: float = 1.0
    settings: dict[str, str] = {}  # noqa: RUF012
    kind: Literal["gradients", "blocks", "passes"] = "gradients"
    block: tuple[int, bool] = (0, False)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns ``tx`` with state and arithmetic in float32, whatever the dtype of the parameters."""

    @jax.jit  # so that the copies in float32 are never made
    def init(params: Any) -> Any:
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return tx.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


_FRUGAL = {"density": "density", "update_gap": "update_gap", "seed": "seed"}
_SUBSPACE = _FRUGAL | {"density": "rank"}
_BLOCKS = {"update_gap": "switch_every", "seed": "seed"}
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(lambda rate, **options: in_float32(optax.adamw(rate, **options))),
    "adamw8bit": Optimizer(optim.adamw8bit),
    "adamw4bit": Optimizer(optim.adamw4bit),
    "lion8bit": Optimizer(optim.lion8bit, rate=0.1),
    "adam_mini": Optimizer(optim.adam_mini),
    "micro_adam": Optimizer(optim.micro_adam, settings={"density": "density"}),
    "frugal": Optimizer(optim.frugal, settings=_FRUGAL),
    "frugal8bit": Optimizer(functools.partial(optim.frugal, state_bits=8), settings=_FRUGAL),
    "galore": Optimizer(functools.partial(optim.galore, rank=0.25), settings=_SUBSPACE),
    "q_galore": Optimizer(functools.partial(optim.q_galore, rank=0.25), settings=_SUBSPACE),
    "fira": Optimizer(functools.partial(optim.fira, rank=0.25), settings=_SUBSPACE),
    "apollo": Optimizer(optim.apollo, settings=_SUBSPACE),
    "apollo_mini": Optimizer(optim.apollo_mini, settings={"update_gap": "update_gap", "seed": "seed"}),
    "ldadam": Optimizer(functools.partial(optim.ldadam, rank=0.25), settings={"density": "rank", "seed": "seed"}),
    "badam": Optimizer(optim.badam_step, settings=_BLOCKS, kind="blocks", block=(1, False)),
    "lisa": Optimizer(optim.lisa_step, settings=_BLOCKS, kind="blocks", block=(2, True)),
    "mezo": Optimizer(optim.mezo, rate=0.01, settings={"seed": "seed"}, kind="passes"),
}


def make_training(
    settings: FinetuneSettings,
    loss: LossFn,
    parts: optim.LossParts,
    layers: int,
    after: optax.GradientTransformation | None = None,
    rate: optax.Schedule | None = None,
) -> Training:
    """Builds the training of a run.

    Args:
      settings: of the run, checked.
      loss: of what is trained, as `memjax.recipes.train.make_step` takes it.
      parts: the loss of a model whose weights are all trained, for steps that go through its layers.
      layers: of the model.
      after: follows the optimizer, for methods that change its updates.
      rate: learning rate by the number of steps done; None takes that of the settings.

    Returns:
      `Training`; its step takes and gives a `TrainState`.
    """
    optimizer = OPTIMIZERS[settings.optimizer]
    assert settings.lr is not None  # of settings that are checked
    if rate is None:
        rate = make_schedule(settings.lr, settings.steps, schedule=settings.schedule, warmup=settings.warmup)
    given = {"density": settings.density, "update_gap": settings.update_gap, "seed": settings.seed}
    if settings.update_gap is None:
        most, changes = (50, layers) if optimizer.kind == "blocks" else (200, 5)
        given["update_gap"] = min(most, max(1, settings.steps // changes))
    options = {name: given[setting] for setting, name in optimizer.settings.items() if given[setting] is not None}
    options["weight_decay"] = settings.weight_decay
    if optimizer.kind == "blocks":
        return _of_blocks(optimizer.make(parts, rate, **options))
    if optimizer.kind == "passes":
        eps = 1e-3 if settings.adapter == "none" else 1e-2
        make = functools.partial(optimizer.make, learning_rate=rate, eps=eps, **options)
        return _of_passes(make(parts)) if every_weight(settings) else _of_passes(make(_mean(loss)), with_frozen=True)
    tx = optimizer.make(rate, **options)
    if after is not None:
        tx = optax.chain(tx, after)
    if settings.fused:
        keep = "inputs" if settings.remat == "full" else "residuals"
        return _layer_by_layer(tx, parts, keep, settings.clip, settings.seed)
    if settings.clip is not None:
        tx = optax.chain(optax.clip_by_global_norm(settings.clip), tx)
    return Training(tx.init, make_step(loss, tx, accumulate=settings.accumulate, seed=settings.seed))


def gradient_bytes(settings: FinetuneSettings, theta: Any, layers: int) -> int:
    """Returns the bytes of the gradients that exist at a time, by formula; on a mesh those of one device.

    Args:
      settings: of the run, checked.
      theta: what is trained.
      layers: of the model.
    """
    optimizer, total = OPTIMIZERS[settings.optimizer], device_bytes(theta)
    if optimizer.kind == "passes":
        return 0
    if optimizer.kind == "gradients" and not settings.fused:
        return total * (2 if settings.accumulate > 1 else 1)
    stacked = sum(nbytes(leaf) for path, leaf in leaf_paths(theta) if path.startswith("layers/"))
    active, outer = (1, True) if settings.fused else optimizer.block
    return stacked // layers * active + (total - stacked if outer else 0)


def every_weight(settings: FinetuneSettings) -> bool:
    """Whether the weights themselves are trained, all of them."""
    return settings.adapter == "none" and settings.targets in (None, ("**",))


def _layer_by_layer(
    tx: optax.GradientTransformation, parts: optim.LossParts, keep: Any, clip: float | None, seed: int
) -> Training:
    update = optax.with_extra_args_support(tx).update

    def apply(params: Any, grads: Any, state: Any, key: Any, layer: jax.Array) -> tuple[Any, Any]:
        updates, state = update(grads, state, params, layer=layer)
        return optim.apply_updates_stochastic(params, updates, key), state

    fused = optim.fused_step(parts, tx, clip=clip, keep=keep, apply=apply)

    def step(state: TrainState, batch: Any) -> tuple[Any, Any, jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        theta, opt_state, metrics = fused(state.theta, state.opt_state, batch, key)
        return theta, opt_state, metrics.loss, metrics.grad_norm

    return Training(tx.init, _jitted(lambda state, frozen, batch: step(state, batch)))


def _of_blocks(blocks: optim.BlockStep) -> Training:
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[Any, Any, jax.Array, None]:
        return *blocks.step(state.theta, state.opt_state, batch), None

    return Training(blocks.init, _jitted(step))


def _of_passes(method: optim.Mezo, with_frozen: bool = False) -> Training:
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[Any, Any, jax.Array, None]:
        given = (frozen, batch) if with_frozen else batch
        theta, opt_state, metrics = method.step(state.theta, state.opt_state, given)
        return theta, opt_state, metrics.loss, None

    return Training(method.init, _jitted(step))


def _mean(loss: LossFn) -> Callable[[Any, Any], jax.Array]:
    """Returns the loss as a function of what is trained and of all else, without dropout."""

    def value(theta: Any, given: Any) -> jax.Array:
        frozen, batch = given
        total, count = loss(theta, frozen, batch, jax.random.key(0))
        return total / count

    return value


def _jitted(step: Callable[..., tuple[Any, Any, jax.Array, jax.Array | None]]) -> jax.stages.Wrapped:
    """Returns the step of a `Training` from one that gives what is trained, the optimizer's state, loss and norm."""

    def whole(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        theta, opt_state, loss, norm = step(state, frozen, batch)
        return TrainState(theta, opt_state, state.step + 1), Metrics(loss, norm, batch.weights.sum(), ())

    return jax.jit(whole, donate_argnums=0, keep_unused=True)
