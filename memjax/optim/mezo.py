"""MeZO: training by forward passes alone, at the memory of inference.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023. The weights are never perturbed in
place: a forward pass regenerates the noise of a layer where it uses the layer, as ZO2 (Wang et al., 2025) visits blocks
one by one. So there is nothing to restore, and no drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.core.paths import leaf_paths
from memjax.core.random_bits import hash_bits, normal
from memjax.core.roles import check_trained
from memjax.optim.fused_step import LossParts, check_stack
from memjax.optim.tables import leaf_words
from pallas_kernels._bits import flat_counter

Rule = Literal["sgd", "momentum", "adam"]


class MezoState(NamedTuple):
    """What MeZO keeps between steps.

    With ``window`` that is ``window * samples`` numbers. Without it, momentum and Adam keep moments as large as params.
    """

    step: jax.Array  # int32 scalar, steps done
    slopes: jax.Array | None  # float32 [window, samples], of the last steps, newest first; None without a window
    momentum: Any  # float32 tree of params, or None
    second: Any  # float32 tree of params, or None


class MezoMetrics(NamedTuple):
    """What a step reports; ``slopes`` of all steps are the log from which `Mezo.replay` makes the same weights."""

    loss: jax.Array  # float32 scalar, mean of the two sides and all samples
    slopes: jax.Array  # float32 [samples], projections of the gradient on the noise; not finite where a loss was not


class Mezo(NamedTuple):
    """The functions of a MeZO optimizer.

    Attributes:
      init: params -> `MezoState`.
      step: (params, state, batch) -> (params, state, `MezoMetrics`); donate params and state.
      replay: (params, slopes ``[T, samples]``) -> params after the T steps from the start that gave these slopes,
        without data or passes through the model.
    """

    init: Callable[[Any], MezoState]
    step: Callable[[Any, MezoState, Any], tuple[Any, MezoState, MezoMetrics]]
    replay: Callable[[Any, jax.Array], Any]


def noise(seed: Any, step: Any, sample: Any, leaf: Any, layer: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal noise, a function of its arguments alone: on any device, in any sharding.

    Args:
      seed: as in `memjax.core.random_bits.seed_words`.
      step, sample: integers: the optimizer's step, and which of its draws.
      leaf: number of the leaf, counted over params in tree order.
      layer: number of the layer of a stacked leaf, else 0.
      shape: of one layer's part, at most 2**32 elements.

    Returns:
      float32 of ``shape``; element i is the normal quantile of the hash of i, so within 5.4 deviations.
    """
    return normal(hash_bits(leaf_words(seed, step, sample, leaf, layer), flat_counter(shape)))


def mezo(
    loss: Callable[[Any, Any], jax.Array] | LossParts | Sequence[Callable[..., Any]],
    learning_rate: float | Callable[[jax.Array], jax.Array],
    *,
    eps: float = 1e-3,
    rule: Rule = "sgd",
    samples: int = 1,
    window: int | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    b1: float = 0.9,
    b2: float = 0.999,
    adam_eps: float = 1e-8,
    seed: Any = 0,
    layers: str = "layers",
) -> Mezo:
    """Builds MeZO: two forward passes give the slope of the loss along random noise, and the noise is the direction.

    With noise z of the step, ``slope = (loss(params + eps z) - loss(params - eps z)) / (2 eps)`` estimates the gradient
    as ``slope * z``; z is regenerated wherever it is used. Beside params, a step holds what inference holds, one
    perturbed layer, and the perturbed leaves outside of the stack. A step of which a slope is not finite leaves
    params as they are, and counts as slopes of zero. Leave dropout off. The reference uses, with constant rates and
    batches of 16: all weights eps 1e-3, rate 1e-7 to 1e-6; LoRA eps 1e-2, rate 5e-5 to 1e-4; prefixes eps 1e-1, rate
    1e-3 to 1e-2.

    Args:
      loss: `LossParts` or its three functions, for params with stacked layers, which are perturbed slice by slice; or
        any ``(params, batch) -> scalar``, for which all params are perturbed at once, as is right for adapters. What is
        frozen, views among it, goes into batch.
      learning_rate: a number, or a schedule of the step number.
      eps: size of the perturbation; in bfloat16 params it is rounded to what they can express.
      rule: what follows from the estimate g: "sgd"; "momentum", ``m = b1 m + g``; "adam" with bias correction.
      samples: number of independent draws per step, of which the estimates are averaged.
      window: momentum and moments are computed again from the slopes of the last so many steps, at the cost of
        regenerating their noise, instead of being kept.
      weight_decay: decoupled, times the learning rate.
      mask: pytree of bools like params, or params -> such: which leaves decay.
      b1, b2, adam_eps: of momentum and Adam.
      seed: of the noise.
      layers: the key in params of the stacked layers, with loss parts.

    Returns:
      `Mezo`, functions for `jax.jit`.

    Raises:
      ValueError: settings out of range; by the functions, params that are no stack.
      TypeError: by the functions, params that hold a view or an array that is not of floats.
    """
    if rule not in ("sgd", "momentum", "adam"):
        raise ValueError(f"rule must be 'sgd', 'momentum' or 'adam', got {rule!r}")
    if eps <= 0 or samples < 1 or (window is not None and window < 1):
        raise ValueError(f"expected eps > 0, samples >= 1 and window >= 1; got {eps=}, {samples=}, {window=}")
    if window is not None and rule == "sgd":
        raise ValueError("rule='sgd' has no moments for a window of past steps")
    parts = None if callable(loss) else LossParts(*loss)

    def check(params: Any) -> list[bool]:
        """Returns which leaves are stacked."""
        if parts is not None:
            check_stack(params, layers)
            return [path.split("/")[0] == layers for path, _ in leaf_paths(params)]
        check_trained(params)
        return [False] * len(jax.tree.leaves(params))

    def perturbed(tree: Any, step: Any, sample: Any, first: int, layer: Any, amount: Any) -> Any:
        """Returns a tree plus noise, its leaves numbered from ``first``."""
        numbers = itertools.count(first)

        def add(leaf: jax.Array) -> jax.Array:
            z = noise(seed, step, sample, next(numbers), layer, leaf.shape)
            return (leaf.astype(jnp.float32) + amount * z).astype(leaf.dtype)

        return jax.tree.map(add, tree)

    def value(params: Any, batch: Any, step: Any, sample: Any, amount: Any) -> jax.Array:
        if parts is None:
            found = loss(perturbed(params, step, sample, 0, 0, amount), batch)  # type: ignore[operator]
        else:
            stack = params[layers]
            numbers: dict[str, int] = {}
            for number, (path, _) in enumerate(leaf_paths(params)):
                numbers.setdefault(path.split("/")[0], number)
            outer = {
                name: perturbed(tree, step, sample, numbers[name], 0, amount)
                for name, tree in params.items()
                if name != layers and name in numbers
            }
            near = {**params, **outer}

            def body(x: Any, slices: Any) -> tuple[Any, None]:
                layer, index = slices
                layer = perturbed(layer, step, sample, numbers[layers], index, amount)
                return parts.block(layer, x, batch, index), None

            count = jax.tree.leaves(stack)[0].shape[0]
            xs = (stack, jnp.arange(count, dtype=jnp.int32))
            found = parts.head(near, lax.scan(body, parts.embed(near, batch), xs)[0], batch)
        return found.astype(jnp.float32)

    def measure(params: Any, batch: Any, step: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the losses ``[samples, 2]`` on the two sides, and the slopes ``[samples]``."""

        def side(number: Any) -> jax.Array:
            amount = jnp.where(number % 2 == 0, jnp.float32(eps), jnp.float32(-eps))
            return value(params, batch, step, number // 2, amount)

        # One after another in one loop: two sides at once would hold two sets of activations.
        losses = lax.map(side, jnp.arange(2 * samples)).reshape(samples, 2)
        return losses, (losses[:, 0] - losses[:, 1]) / np.float32(2 * eps)

    def estimate(step: Any, slopes: jax.Array, leaf: int, layer: Any, shape: tuple[int, ...]) -> jax.Array:
        """Returns the estimated gradient of a leaf's part in one layer, float32, from the slopes of a step."""

        def one(sample: Any) -> jax.Array:
            return slopes[sample] * noise(seed, step, sample, leaf, layer, shape)

        if samples == 1:
            return one(0)
        total = lax.fori_loop(0, samples, lambda i, total: total + one(i), jnp.zeros(shape, jnp.float32))
        return total / np.float32(samples)

    def past(
        step: Any, history: Any, leaf: int, layer: Any, shape: tuple[int, ...], decay: float, power: int
    ) -> jax.Array:
        """Returns the decayed sum of powers of the estimates in the window."""

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + jnp.float32(decay) ** k * estimate(step - k, history[k], leaf, layer, shape) ** power

        return lax.fori_loop(0, window, add, jnp.zeros(shape, jnp.float32))

    def weights(decay: float, count: jax.Array) -> jax.Array:
        """Returns the sum of the weights of the estimates that a decayed sum holds after ``count`` steps."""
        terms = count if window is None else jnp.minimum(count, window)
        return (1 - jnp.float32(decay) ** terms) / np.float32(1 - decay)

    def init(params: Any) -> MezoState:
        check(params)

        def zeros() -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

        kept = rule != "sgd" and window is None
        return MezoState(
            jnp.zeros((), jnp.int32),
            None if window is None else jnp.zeros((window, samples), jnp.float32),
            zeros() if kept else None,
            zeros() if kept and rule == "adam" else None,
        )

    def advance(params: Any, state: MezoState, slopes: jax.Array) -> tuple[Any, MezoState]:
        """Returns params and state after a step with these slopes."""
        stacked = check(params)
        good = jnp.isfinite(slopes).all()
        slopes = jnp.where(good, slopes, 0)
        history = None if state.slopes is None else jnp.concatenate([slopes[None], state.slopes[:-1]])
        rate = jnp.asarray(learning_rate(state.step) if callable(learning_rate) else learning_rate, jnp.float32)
        decays = (
            jax.tree.leaves(mask(params) if callable(mask) else mask) if mask is not None else [True] * len(stacked)
        )
        leaves, structure = jax.tree.flatten(params)
        if len(decays) != len(leaves):
            raise ValueError(f"mask has {len(decays)} leaves, but params have {len(leaves)}")
        count = state.step + 1

        def moved(arrays: Any, leaf: int, layer: Any) -> Any:
            """Returns a leaf's part in one layer after the step, and its moments where they are kept."""
            x, first, second = arrays
            g = estimate(state.step, slopes, leaf, layer, x.shape)
            if rule == "sgd":
                direction = g
            elif rule == "momentum" and window is None:
                direction = first = b1 * first + g
            elif rule == "momentum":
                direction = past(state.step, history, leaf, layer, x.shape, b1, 1)
            else:
                if window is None:
                    first = b1 * first + (1 - b1) * g
                    second = b2 * second + (1 - b2) * g**2
                    mean, square = first / (1 - jnp.float32(b1) ** count), second / (1 - jnp.float32(b2) ** count)
                else:
                    mean, square = (
                        past(state.step, history, leaf, layer, x.shape, decay, power) / weights(decay, count)
                        for decay, power in ((b1, 1), (b2, 2))
                    )
                direction = mean / (jnp.sqrt(square) + adam_eps)
            wide = x.astype(jnp.float32)
            if weight_decay and decays[leaf]:
                direction = direction + np.float32(weight_decay) * wide
            return jnp.where(good, wide - rate * direction, wide).astype(x.dtype), first, second

        def each_layer(arrays: Any, leaf: int) -> Any:
            """Overwrites the layers of a stacked leaf, and of its moments, one by one."""

            def one(layer: jax.Array, arrays: Any) -> Any:
                part = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False), arrays)
                # What is read late, fused with what overwrites it, would make XLA copy the stack.
                part = lax.optimization_barrier(moved(lax.optimization_barrier(part), leaf, layer))
                return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, layer, 0), arrays, part)

            return lax.fori_loop(0, arrays[0].shape[0], one, arrays)

        moments = [
            [None] * len(leaves) if tree is None else jax.tree.leaves(tree) for tree in (state.momentum, state.second)
        ]
        columns = [
            each_layer(arrays, leaf) if stacked[leaf] else moved(arrays, leaf, 0)
            for leaf, arrays in enumerate(zip(leaves, *moments))
        ]
        new, first, second = (
            None if column[0] is None else jax.tree.unflatten(structure, column) for column in zip(*columns)
        )
        return new, MezoState(count, history, first, second)

    def step(params: Any, state: MezoState, batch: Any) -> tuple[Any, MezoState, MezoMetrics]:
        check(params)
        losses, slopes = measure(params, batch, state.step)
        # Params are overwritten when the passes that read them are over.
        params, slopes = lax.optimization_barrier((params, slopes))
        params, state = advance(params, state, slopes)
        return params, state, MezoMetrics(jnp.mean(losses), slopes)

    def replay(params: Any, slopes: jax.Array) -> Any:
        if slopes.ndim != 2 or slopes.shape[1] != samples:
            raise ValueError(f"expected slopes [steps, {samples}], got {slopes.shape}")

        def one(carry: tuple[Any, MezoState], slopes: jax.Array) -> tuple[Any, None]:
            return advance(carry[0], carry[1], slopes), None

        return lax.scan(one, (params, init(params)), slopes)[0][0]

    return Mezo(init, step, replay)
