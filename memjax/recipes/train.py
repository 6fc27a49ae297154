"""The training step: gradients of the trained pytree only, accumulated by a scan, with donated state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from memjax.core.paths import leaf_paths
from memjax.core.roles import check_trained
from memjax.optim import apply_updates_stochastic, state_shardings

Schedule = Literal["constant", "linear", "cosine"]
# (theta, frozen, batch, key) -> (weighted sum of losses, sum of weights), float32 scalars
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """All that a training step changes; donated to it."""

    theta: Any  # the trained pytree, float32 arrays
    opt_state: Any  # the state of the optax transformation
    step: jax.Array  # int32 scalar, steps done


class Metrics(NamedTuple):
    """What a step reports."""

    loss: jax.Array  # float32 scalar, mean over the batch in nats, before the update
    grad_norm: jax.Array | None  # float32 scalar, of all gradients before clipping; None where they never all exist
    tokens: jax.Array  # float32 scalar, sum of the weights of the targets
    finite: Any  # a bool scalar per leaf of theta: its gradient is finite


class Training(NamedTuple):
    """How a run trains: what the optimizer's state starts as, and the step.

    Attributes:
      init: theta -> the optimizer's state.
      step: jitted ``(state, frozen, batch) -> (state, Metrics)``; the state is donated.
    """

    init: Callable[[Any], Any]
    step: jax.stages.Wrapped


def make_schedule(lr: float, steps: int, *, schedule: Schedule = "constant", warmup: int = 0) -> optax.Schedule:
    """Returns the learning rate by the number of steps done.

    Args:
      lr: highest learning rate.
      steps: length of the run; ``linear`` and ``cosine`` reach zero there.
      schedule: what follows the warm-up.
      warmup: steps over which the rate rises linearly from zero; step 0 already has ``lr / warmup``.

    Raises:
      ValueError: numbers out of range, or an unknown schedule.
    """
    if not 0 < lr < math.inf or steps < 1 or not 0 <= warmup < steps:
        raise ValueError(f"expected finite lr > 0, steps >= 1 and 0 <= warmup < steps; got {lr=}, {steps=}, {warmup=}")
    decays = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, steps - warmup),
        "cosine": optax.cosine_decay_schedule(lr, steps - warmup),
    }
    if schedule not in decays:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(decays)}")
    if not warmup:
        return decays[schedule]
    # The ramp is shifted by one step, because a step at rate 0 would learn nothing.
    ramp = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
    return optax.join_schedules([ramp, decays[schedule]], [warmup])


def make_optimizer(
    lr: float,
    steps: int,
    *,
    schedule: Schedule = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW under a learning-rate schedule, after clipping by the global norm.

    Args:
      lr, steps, schedule, warmup: as in `make_schedule`.
      weight_decay: decoupled weight decay.
      clip: largest global norm of the gradients; None does not clip.

    Raises:
      ValueError: numbers out of range, or an unknown schedule.
    """
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip} must be finite and above 0, or None")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} must be finite and at least 0")
    rate = make_schedule(lr, steps, schedule=schedule, warmup=warmup)
    clipping = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return optax.chain(*clipping, optax.adamw(rate, weight_decay=weight_decay))


def init_state(theta: Any, tx: optax.GradientTransformation | Training) -> TrainState:
    """Returns the state before the first step; the optimizer's is made by one program, which holds nothing beside it.

    Raises:
      TypeError: ``theta`` holds a weight view, or an array that is not of floats.
    """
    check_trained(theta)
    return TrainState(theta, jax.jit(tx.init)(theta), jnp.zeros((), jnp.int32))


def init_on_mesh(theta: Any, training: Training) -> tuple[TrainState, Training]:
    """Returns the state before the first step, and the training that leaves every array of it where it is.

    Args:
      theta: the trained pytree, every array on a mesh; the optimizer's state is split as it is.
      training: whose step computes on that mesh.

    Raises:
      TypeError: as `init_state`.
    """
    check_trained(theta)
    places = jax.tree.map(lambda leaf: leaf.sharding, theta)
    whole = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec())
    tx = optax.GradientTransformation(training.init, lambda *args: args)
    held = TrainState._make((places, state_shardings(tx, theta, places), whole))
    state = TrainState(
        theta, jax.jit(training.init, out_shardings=held.opt_state)(theta), jax.device_put(jnp.int32(0), whole)
    )
    step = jax.jit(
        lambda state, frozen, batch: training.step(state, frozen, batch),
        donate_argnums=0,
        out_shardings=(held, None),
    )
    return state, training._replace(step=step)


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1, seed: int = 0
) -> jax.stages.Wrapped:
    """Builds the jitted training step.

    The loss is the sum of ``loss_fn``'s losses over the sum of its weights, over the whole batch:
    accumulating over microbatches gives the big batch's gradient also when they hold different numbers of
    targets. The scan over microbatches holds one sum of gradients and runs forward and backward once per
    microbatch. Leaves of theta that are bfloat16 are rounded stochastically. When a gradient or the loss is not
    finite, the step leaves theta and the optimizer's state as they were, and says so in its metrics.

    Args:
      loss_fn: ``(theta, frozen, batch, key) -> (sum of losses, sum of weights)``; pure.
      tx: the optimizer; it sees gradients of ``theta`` only.
      accumulate: number of microbatches; divides the batch axis, the first axis of every array of the batch.
      seed: of the dropout key, which is also folded with the step and the microbatch.

    Returns:
      ``step(state, frozen, batch) -> (state, Metrics)``; ``state`` is donated, ``frozen`` never is.

    Raises:
      ValueError: by the step, a batch that ``accumulate`` does not divide.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1")

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % accumulate:
            raise ValueError(f"accumulate={accumulate} does not divide the batch of {x.shape[0]}")
        return x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            (total, count), grads = grad_fn(state.theta, frozen, batch, key)
        else:

            def add(carry: Any, part: Any) -> tuple[Any, None]:
                microbatch, i = part
                (total, count), grads = grad_fn(state.theta, frozen, microbatch, jax.random.fold_in(key, i))
                return jax.tree.map(jnp.add, carry, (total, count, grads)), None

            zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.theta))
            parts = (jax.tree.map(split, batch), jnp.arange(accumulate))
            (total, count, grads), _ = jax.lax.scan(add, zeros, parts)
        loss = total / count
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        finite = jax.tree.map(lambda g: jnp.isfinite(g).all(), grads)
        good = jnp.stack([jnp.isfinite(loss), *jax.tree.leaves(finite)]).all()
        updates, opt_state = tx.update(grads, state.opt_state, state.theta)
        theta = apply_updates_stochastic(state.theta, updates, jax.random.fold_in(key, accumulate))
        new = TrainState(theta, opt_state, state.step + 1)
        new = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return new, Metrics(loss, optax.tree.norm(grads), count, finite)

    # Constants that only the start of an adapter needs are held all the same: they stay arguments, and are counted.
    return jax.jit(step, donate_argnums=0, keep_unused=True)


def check_finite(metrics: Metrics, step: int) -> None:
    """Raises when the step's loss or a gradient was not finite.

    Args:
      metrics: of the step.
      step: its number, counted from 0.

    Raises:
      FloatingPointError: says the step, the loss, and the first leaf of theta whose gradient is not finite.
    """
    bad = [path for path, finite in leaf_paths(metrics.finite) if not bool(finite)]
    loss = float(metrics.loss)
    if not bad and jnp.isfinite(loss):
        return
    gradients = (
        f"the gradient of {bad[0]!r} is not finite, the first of {len(bad)} such leaves"
        if bad
        else "every gradient is finite"
    )
    raise FloatingPointError(f"step {step}: loss is {loss}; {gradients}")
