"""BAdam: Adam on one block of layers at a time, with gradients and state of that block only.

Source: BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models, 2024.

A block is a slice (or several) of a stack of layers. For ``switch_every`` steps it alone is trained, with fresh
moments; then the next one is. `scale_by_badam` takes whole gradients and drops those of other blocks; `badam_step`
never computes them: below the lowest active layer backward stops, through an inactive one it only passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.core.paths import Patterns, leaf_paths, map_with_path, select
from memjax.core.roles import check_trained
from memjax.optim import splits, tables
from memjax.optim.fused_step import LossParts, stack_length
from memjax.optim.sharding import sliced

Order = Literal["random", "independent", "ascending", "descending", "mirror"]


@sliced("moments")
class BlockState(NamedTuple):
    """State of optimizers that train a few layers at a time.

    Attributes:
      count: int32 scalar, steps done.
      moments: of the inner transform for the active layers, ``{"layers": tree of float32 [k, ...]}``.
      outer: of the inner transform for leaves outside of the stack that are always trained.
      master: float32 copies of the active layers, of the same form, or ``()``.
    """

    count: jax.Array  # type: ignore[assignment]
    moments: Any
    outer: Any
    master: Any


class BlockStep(NamedTuple):
    """A training step and the state that it starts from.

    Attributes:
      init: params -> `BlockState`.
      step: (params, state, batch) -> (params, state, loss); donate the first two.
    """

    init: Callable[[Any], BlockState]
    step: Callable[[Any, BlockState, Any], tuple[Any, BlockState, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LayerBlocks:
    """Which layers are trained when.

    Attributes:
      switch_every: steps for which a block stays active.
      active: layers per block.
      order: ``"random"`` draws a permutation per pass, in which every layer has its turn; ``"independent"`` draws
        anew at each switch; the others walk in a circle, ``"mirror"`` from both ends.
      always: patterns of leaves outside of the stack that are trained all the time; all others there are frozen.
      layers: the key in params of the tree of stacked leaves ``[L, ...]``.
      seed: of the order.
    """

    switch_every: Any = 50
    active: int = 1
    order: Order = "random"
    always: Patterns | None = None
    layers: str = "layers"
    seed: Any = 0

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}")
        if isinstance(self.switch_every, int) and self.switch_every < 1:
            raise ValueError(f"switch_every must be at least 1, got {self.switch_every}")
        if self.active < 1:
            raise ValueError(f"active must be at least 1, got {self.active}")

    def choose(self, count: jax.Array, total: int) -> jax.Array:
        """Returns the numbers of the active layers at step ``count``, int32 ``[k]``."""
        words, epoch = tables.leaf_words(self.seed, 0), count // self.switch_every
        if self.order == "independent":
            return tables.random_order(tables.leaf_words(jnp.stack(words), epoch), (total,))[: self.active]
        split = splits.Blocks((total,), (1, 1), self.active, self.order)
        return split.draw(words, epoch, 0, [], None)[: self.active]

    def divide(self, params: Any) -> tuple[Any, Any, int]:
        """Returns the stacked leaves, the leaves outside that are trained (others None), and the number of layers.

        Raises:
          TypeError: a weight view, or params that are no dict.
          ValueError: no stack, leaves of different lengths, or fewer layers than are active.
        """
        check_trained(params, floats=False)
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params must be a dict with stacked layers at {self.layers!r}, got {type(params).__name__}"
            )
        stack = params.get(self.layers, {})
        outer = {name: tree for name, tree in params.items() if name != self.layers}
        if not leaf_paths(stack):
            if leaf_paths(outer):
                raise ValueError(f"params have no stack of layers at {self.layers!r}; their keys are {list(params)}")
            return stack, outer, 0
        total = stack_length(stack, self.layers)
        if self.active > total:
            raise ValueError(f"active={self.active} is more than the {total} layers at {self.layers!r}")
        chosen = set() if self.always is None or not leaf_paths(outer) else set(select(outer, self.always))
        return stack, map_with_path(lambda path, leaf: leaf if path in chosen else None, outer), total


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _take(stack: Any, active: jax.Array) -> Any:
    return jax.tree.map(lambda x: jnp.take(jnp.asarray(x), active, axis=0, mode="clip"), stack)


def _fresh(inner: optax.GradientTransformation, due: jax.Array, state: Any, like: Any) -> Any:
    """Returns the state of ``inner``, started anew where ``due``."""
    start = inner.init(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like))
    return jax.tree.map(lambda new, now: jnp.where(due, new, now), start, state)


def _init(blocks: LayerBlocks, inner: optax.GradientTransformation, params: Any, master: bool) -> BlockState:
    stack, outer, total = blocks.divide(params)
    kept = min(blocks.active, total)
    block = {blocks.layers: jax.tree.map(lambda x: jnp.zeros((kept, *x.shape[1:]), jnp.float32), stack)}
    whole = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), outer)
    # The first step is a switch, which loads the copies.
    return BlockState(jnp.zeros((), jnp.int32), inner.init(block), inner.init(whole), block if master else ())


def _decayed(updates: Any, params: Any, weight_decay: Any, axes: int) -> Any:
    """Adds decay to the updates of leaves with at least so many axes: not to biases and norms."""
    return jax.tree.map(lambda u, p: u + weight_decay * p if u.ndim >= axes else u, updates, params)


def scale_by_blocks(
    blocks: LayerBlocks, inner: optax.GradientTransformation, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """Scales gradients of the active layers by ``inner`` and drops those of all others.

    Args:
      blocks: which layers are active when.
      inner: any optax transform; its state for the layers starts anew at a switch.
      weight_decay: added to the updates as this times the parameter; of matrices that are trained only.

    Returns:
      A transformation with `BlockState`, whose update needs the parameters where there is weight decay.
    """
    transform = optax.with_extra_args_support(inner)

    def update(updates: Any, state: BlockState, params: Any = None, **extra: Any) -> tuple[Any, BlockState]:
        stack, outer, total = blocks.divide(updates)
        out = jax.tree.map(jnp.zeros_like, updates)
        if not total:
            return out, state._replace(count=state.count + 1)
        active = blocks.choose(state.count, total)
        due = state.count % blocks.switch_every == 0
        gradients, whole = {blocks.layers: _float32(_take(stack, active))}, _float32(outer)
        weights = whole_weights = None
        if params is not None:
            stack_now, outer_now, _ = blocks.divide(params)
            weights, whole_weights = {blocks.layers: _float32(_take(stack_now, active))}, _float32(outer_now)
        moments = _fresh(transform, due, state.moments, gradients)
        steps, moments = transform.update(gradients, moments, weights, **extra)
        whole_steps, whole_state = transform.update(whole, state.outer, whole_weights, **extra)
        if not (isinstance(weight_decay, float) and weight_decay == 0):
            if params is None:
                raise ValueError("weight decay needs params: update(updates, state, params)")
            steps = _decayed(steps, weights, weight_decay, 3)
            whole_steps = _decayed(whole_steps, whole_weights, weight_decay, 2)
        matches = jnp.arange(total)[:, None] == active
        slot, is_active = jnp.argmax(matches, axis=1), matches.any(axis=1)

        def put(step: jax.Array, g: jax.Array) -> jax.Array:
            mask = is_active.reshape(-1, *[1] * (g.ndim - 1))
            return jnp.where(mask, jnp.take(step, slot, axis=0, mode="clip"), 0).astype(g.dtype)

        out[blocks.layers] = jax.tree.map(put, steps[blocks.layers], stack)
        for name, tree in whole_steps.items():
            out[name] = jax.tree.map(
                lambda u, zero: zero if u is None else u.astype(zero.dtype),
                tree,
                out[name],
                is_leaf=_is_none,
            )
        return out, BlockState(state.count + 1, moments, whole_state, state.master)

    return optax.GradientTransformationExtraArgs(lambda params: _init(blocks, inner, params, False), update)


def block_value_and_grad(
    loss_parts: LossParts | Sequence[Callable[..., Any]], blocks: LayerBlocks
) -> Callable[[Any, jax.Array, Any], tuple[jax.Array, Any, Any]]:
    """Returns a function that differentiates a loss by the active layers only, inside the scan over layers.

    The forward scan keeps the inputs of layers, the backward scan computes a layer again: through inactive layers it
    passes without their gradients, and where nothing outside of the stack is trained it stops at the lowest active one.

    Args:
      loss_parts: (embed, block, head), see `LossParts`.
      blocks: which leaves outside of the stack are trained.

    Returns:
      ``f(params, active, batch) -> (loss, gradients [k, ...] of the active layers, gradients of trained outer leaves)``
      with active int32 ``[k]``.
    """
    embed, block, head = loss_parts

    def value_and_grad(params: Any, active: jax.Array, batch: Any) -> tuple[jax.Array, Any, Any]:
        stack, trained, total = blocks.divide(params)
        has_outer = bool(jax.tree.leaves(trained))

        def whole(trained: Any) -> Any:
            outer = {name: params[name] for name in trained}
            known = jax.tree.map(lambda new, old: old if new is None else new, trained, outer, is_leaf=_is_none)
            return {**known, blocks.layers: stack}

        def forward(x: Any, slices: Any) -> Any:
            layer, index = slices
            return block(layer, x, batch, index), x

        numbers = jnp.arange(total, dtype=jnp.int32)
        start, pull_embed = jax.vjp(lambda trained: embed(whole(trained), batch), trained)
        x, kept = lax.scan(forward, start, (stack, numbers))
        loss, pull = jax.vjp(lambda trained, x: head(whole(trained), x, batch), trained, x)
        outer_grads, dx = pull(jnp.ones_like(loss))
        lowest = jnp.int32(0) if has_outer else jnp.min(active)

        def backward(carry: Any, slices: Any) -> Any:
            dx, total_grads = carry
            layer, x, index = slices
            matches = active == index

            def none(layer: Any) -> Any:
                return jax.tree.map(jnp.zeros_like, layer)

            def skip(layer: Any, x: Any, dx: Any) -> Any:
                return none(layer), dx

            def through(layer: Any, x: Any, dx: Any) -> Any:
                (dx,) = jax.vjp(lambda x: block(layer, x, batch, index), x)[1](dx)
                return none(layer), dx

            def train(layer: Any, x: Any, dx: Any) -> Any:
                return jax.vjp(lambda layer, x: block(layer, x, batch, index), layer, x)[1](dx)

            case = jnp.where(matches.any(), 2, jnp.where(index >= lowest, 1, 0))
            grads, dx = lax.switch(case, [skip, through, train], layer, x, dx)
            slot = jnp.argmax(matches)

            def store(all_grads: jax.Array, g: jax.Array) -> jax.Array:
                now = lax.dynamic_index_in_dim(all_grads, slot, keepdims=False)
                return lax.dynamic_update_index_in_dim(all_grads, jnp.where(matches.any(), g, now), slot, 0)

            return (dx, jax.tree.map(store, total_grads, grads)), None

        zeros = jax.tree.map(lambda x: jnp.zeros((active.shape[0], *x.shape[1:]), x.dtype), stack)
        (dx, grads), _ = lax.scan(backward, (dx, zeros), (stack, kept, numbers), reverse=True)
        if has_outer:
            outer_grads = jax.tree.map(jnp.add, outer_grads, pull_embed(dx)[0])
        return loss, grads, outer_grads

    return value_and_grad


def _is_none(x: Any) -> bool:
    return x is None


def block_step(
    loss_parts: LossParts | Sequence[Callable[..., Any]],
    blocks: LayerBlocks,
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.0,
) -> BlockStep:
    """Builds a training step that computes, keeps and applies the gradients of the active layers only.

    The active layers have float32 copies, loaded at a switch, on which the optimizer works; their rounded values go
    back into params after each step.

    Args:
      loss_parts: (embed, block, head), see `LossParts`.
      blocks: which layers are trained when.
      inner: any optax transform; its state for the layers starts anew at a switch.
      learning_rate: a number or a schedule of steps.
      weight_decay: decoupled; of matrices that are trained only.

    Returns:
      `BlockStep`. For M parameters of 2 bytes in D equal blocks, its params, gradients and state take
      ``2 M + 14 M / D`` bytes: gradients in 2, copies and two moments in 4 each.
    """
    gradients_of = block_value_and_grad(loss_parts, blocks)

    def step(params: Any, state: BlockState, batch: Any) -> tuple[Any, BlockState, jax.Array]:
        stack, trained, total = blocks.divide(params)
        active = blocks.choose(state.count, total)
        due = state.count % blocks.switch_every == 0
        loss, grads, outer_grads = gradients_of(params, active, batch)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        loaded = {blocks.layers: _float32(_take(stack, active))}
        master = jax.tree.map(lambda new, now: jnp.where(due, new, now), loaded, state.master)

        def descend(gradients: Any, moments: Any, weights: Any, axes: int) -> tuple[Any, Any]:
            steps, moments = inner.update(_float32(gradients), moments, weights)
            steps = _decayed(steps, weights, weight_decay, axes)
            return jax.tree.map(lambda w, u: w - rate * u, weights, steps), moments

        master, moments = descend({blocks.layers: grads}, _fresh(inner, due, state.moments, master), master, 3)
        outer, outer_state = descend(outer_grads, state.outer, _float32(trained), 2)

        def overwrite(leaf: jax.Array, new: jax.Array) -> jax.Array:
            for i in range(blocks.active):
                leaf = lax.dynamic_update_index_in_dim(leaf, new[i].astype(leaf.dtype), active[i], 0)
            return leaf

        new_outer = {
            name: jax.tree.map(
                lambda new, old: old if new is None else new.astype(old.dtype), tree, params[name], is_leaf=_is_none
            )
            for name, tree in outer.items()
        }
        new_params = {**new_outer, blocks.layers: jax.tree.map(overwrite, stack, master[blocks.layers])}
        return new_params, BlockState(state.count + 1, moments, outer_state, master), loss

    return BlockStep(lambda params: _init(blocks, inner, params, True), step)


def scale_by_badam(
    switch_every: int = 50,
    *,
    active: int = 1,
    order: Order = "random",
    always: Patterns | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layers: str = "layers",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Scales gradients of the active block by Adam and drops those of all others.

    Args:
      switch_every: steps for which a block stays active; the paper takes samples / (batch * blocks), within 50 to 100.
      active: layers per block.
      order: ``"random"`` (each layer once in a pass), ``"ascending"``, ``"descending"``, ``"mirror"``, or
        ``"independent"`` draws.
      always: patterns of leaves outside of the stack that are trained all the time, such as a new head, without which
        training stalls; all others there are frozen.
      b1, b2, eps: of Adam.
      weight_decay: of the matrices that are trained.
      layers: the key in params of the tree of stacked leaves ``[L, ...]``.
      seed: of the order.

    Returns:
      A transformation with `BlockState`: ``8 * (active layers + always trained)`` bytes and three counters.

    Raises:
      ValueError: settings out of range; by ``init``, params without a stack of so many layers.
      TypeError: by ``init``, a weight view among the parameters.
    """
    blocks = LayerBlocks(switch_every, active, order, always, layers, seed)
    return scale_by_blocks(blocks, optax.scale_by_adam(b1, b2, eps), weight_decay)


def badam(
    learning_rate: optax.ScalarOrSchedule,
    switch_every: int = 50,
    *,
    active: int = 1,
    order: Order = "random",
    always: Patterns | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layers: str = "layers",
    seed: int = 0,
) -> optax.GradientTransformation:
    """BAdam on whole gradients, for any chain and loop; `badam_step` computes no others than the block's.

    Args:
      learning_rate: a number or a schedule.
      switch_every and all others: as in `scale_by_badam`.
    """
    scaled = scale_by_badam(
        switch_every,
        active=active,
        order=order,
        always=always,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        layers=layers,
        seed=seed,
    )
    return optax.chain(scaled, optax.scale_by_learning_rate(learning_rate))


def badam_step(
    loss_parts: LossParts | Sequence[Callable[..., Any]],
    learning_rate: optax.ScalarOrSchedule,
    switch_every: int = 50,
    *,
    active: int = 1,
    order: Order = "random",
    always: Patterns | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layers: str = "layers",
    seed: int = 0,
) -> BlockStep:
    """BAdam as a training step that computes gradients of the active block only; see `block_step`.

    Args:
      loss_parts: (embed, block, head), see `LossParts`.
      learning_rate: a number or a schedule.
      switch_every and all others: as in `scale_by_badam`.
    """
    blocks = LayerBlocks(switch_every, active, order, always, layers, seed)
    return block_step(loss_parts, blocks, optax.scale_by_adam(b1, b2, eps), learning_rate, weight_decay)
