"""GaLore: Adam on gradients projected to the leading singular subspace of each matrix.

Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024.

A matrix of short side s and long side l keeps ``r s`` numbers of its basis and twice ``r l`` of moments, against
``2 s l`` of Adam. The rest of the gradient is dropped until the basis is found anew. Moments are neither reset nor
rotated then, as in the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.core import Axes
from memjax.optim import low_rank
from memjax.optim.low_rank import Method, Projection, Side
from memjax.optim.matrices import as_matrices, from_matrices
from memjax.optim.routing import Label


class AdamState(NamedTuple):
    """State of `scale_by_adam_before_correction`.

    Attributes:
      count: int32 scalar, steps done.
      mu, nu: float32 trees of the shapes of the gradients.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def scale_by_adam_before_correction(b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-6) -> optax.GradientTransformation:
    """Returns Adam as GaLore's reference has it: eps is added before the bias of the second moment is corrected.

    Args:
      b1, b2: decay of the moments, float32 whatever the gradients.
      eps: added to the root of the second moment.
    """

    def init(params: Any) -> AdamState:
        def zeros(leaf: Any) -> jax.Array:
            return jnp.zeros(leaf.shape, jnp.float32)

        return AdamState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params))

    def update(updates: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        correction = low_rank.adam_correction(state.count, b1, b2)
        mu = jax.tree.map(lambda g, m: low_rank.decayed(m, g, b1, 1), updates, state.mu)
        nu = jax.tree.map(lambda g, v: low_rank.decayed(v, g, b2, 2), updates, state.nu)
        scaled = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return scaled, AdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


class GaLoreState(NamedTuple):
    """State of `scale_by_galore`.

    Attributes:
      count: int32 scalar, steps done.
      basis: tree of ``[B, s, r]`` in the parameter's dtype; `optax.MaskedNode` for leaves in full.
      inner: state of the inner transformation over coordinates ``[B, r, n]`` or ``[B, m, r]``.
    """

    count: jax.Array  # type: ignore[assignment]
    basis: Any
    inner: Any


def scale_by_galore(
    rank: int | float = 128,
    update_gap: int = 200,
    scale: Any = 0.25,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    inner: optax.GradientTransformation | None = None,
    side: Side = "short",
    method: Method = "eigh",
    stagger: bool = True,
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns GaLore as a transformation of gradients; leaves that `routing.label` calls full get the inner one alone.

    Args:
      rank: coordinates per matrix, or a fraction of its projected side.
      update_gap: steps between two searches for the basis.
      scale: of the updates of projected leaves, the reference's alpha.
      b1, b2, eps: of `scale_by_adam_before_correction`, in the absence of ``inner``.
      inner: a transformation of the coordinates that needs no parameters, for example with 8-bit state.
      side: the axis that coordinates replace; ``"short"`` (inputs if square) is the reference's, ``"long"`` keeps less.
      method: how the subspace is found; see `low_rank.find_subspace`. ``"subspace_iteration"`` multiplies by the matrix
        only, so that a sharded one is never gathered.
      stagger: search for the matrices' bases at different steps, evenly over the gap, rather than all at once.
      seed: of random starts.
      rules: pattern -> label overrides, as in `routing.label`.
      axes: pattern -> `Axes` of weights that are not ``[*batch, inputs, outputs]``.

    Raises:
      TypeError: (by ``init``) a weight view among the parameters.
      ValueError: an unknown side or method, or a gap or rank out of range; by ``init``, a rank larger than a matrix.
    """
    low_rank.check(rank, update_gap, side, method, seed)
    if inner is None:
        inner = scale_by_adam_before_correction(b1, b2, eps)

    def plan(tree: Any) -> list[Projection | None]:
        return low_rank.projections(tree, rank, side, rules, axes)

    def init(params: Any) -> GaLoreState:
        def start(projection: Projection | None, leaf: Any) -> tuple[Any, Any]:
            if projection is None:
                return optax.MaskedNode(), leaf
            basis = jnp.zeros(projection.basis_shape, leaf.dtype)
            return basis, jnp.zeros(projection.coordinates_shape, jnp.float32)

        basis, coordinates = low_rank.map_leaves(start, 2, plan(params), params)
        return GaLoreState(jnp.zeros((), jnp.int32), basis, inner.init(coordinates))

    def update(updates: Any, state: GaLoreState, params: Any = None) -> tuple[Any, GaLoreState]:
        projected = plan(updates)

        def up(projection: Projection | None, leaf: jax.Array, basis: Any, scaled: jax.Array) -> tuple[jax.Array]:
            if projection is None:
                return (scaled.astype(leaf.dtype),)
            back = low_rank.project_back(scale * scaled, basis, projection.axis, leaf.dtype)
            return (from_matrices(back, projection.spec, leaf.shape),)

        scaled, state = _advance(projected, updates, state, inner, update_gap, method, stagger, seed)
        (updates,) = low_rank.map_leaves(up, 1, projected, updates, state.basis, scaled)
        return updates, state

    return optax.GradientTransformation(init, update)


def _advance(
    projected: list[Projection | None],
    gradients: Any,
    state: GaLoreState,
    inner: optax.GradientTransformation,
    update_gap: int,
    method: Method,
    stagger: bool,
    seed: int,
) -> tuple[Any, GaLoreState]:
    """Returns the inner transformation's updates, of coordinates, and the next state."""

    def down(projection: Projection | None, leaf: jax.Array, basis: Any) -> tuple[Any, Any]:
        if projection is None:
            return leaf, basis
        matrices = as_matrices(leaf, projection.spec)
        basis = low_rank.refreshed_basis(
            projection, matrices, basis, state.count, update_gap, method=method, stagger=stagger, seed=seed
        )
        return low_rank.project(matrices, basis, projection.axis), basis

    coordinates, basis = low_rank.map_leaves(down, 2, projected, gradients, state.basis)
    scaled, inner_state = inner.update(coordinates, state.inner)
    return scaled, GaLoreState(optax.safe_increment(state.count), basis, inner_state)


def galore(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    rank: int | float = 128,
    update_gap: int = 200,
    scale: Any = 0.25,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Any = None,
    inner: optax.GradientTransformation | None = None,
    side: Side = "short",
    method: Method = "eigh",
    stagger: bool = True,
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns GaLore with decoupled weight decay.

    Args:
      learning_rate: about ten times that of Adam, for ``scale`` multiplies it.
      weight_decay, mask: as in `optax.adamw`.
      rank, update_gap, scale, b1, b2, eps, inner, side, method, stagger, seed, rules, axes: as in `scale_by_galore`.
    """
    return optax.chain(
        scale_by_galore(
            rank, update_gap, scale, b1=b1, b2=b2, eps=eps, inner=inner, side=side, method=method, stagger=stagger,
            seed=seed, rules=rules, axes=axes,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def apply_galore(
    params: Any,
    grads: Any,
    state: GaLoreState,
    learning_rate: Any,
    rank: int | float = 128,
    update_gap: int = 200,
    scale: Any = 0.25,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    inner: optax.GradientTransformation | None = None,
    side: Side = "short",
    method: Method = "eigh",
    stagger: bool = True,
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> tuple[Any, GaLoreState]:
    """One step of `galore` from gradients to parameters; of a stack, one matrix's update exists at a time.

    Args:
      params: pytree of arrays; donate them and the state where this is jitted.
      grads: tree of ``params``.
      state: of `scale_by_galore` with the same settings.
      learning_rate, weight_decay: scalars, traced or not.
      rank, update_gap, scale, b1, b2, eps, inner, side, method, stagger, seed, rules, axes: as in `scale_by_galore`.

    Returns:
      (params, state), equal to what ``galore(learning_rate, ...)`` and `optax.apply_updates` give.
    """
    low_rank.check(rank, update_gap, side, method, seed)
    inner = scale_by_adam_before_correction(b1, b2, eps) if inner is None else inner
    projected = low_rank.projections(params, rank, side, rules, axes)
    scaled, state = _advance(projected, grads, state, inner, update_gap, method, stagger, seed)

    def moved(leaf: jax.Array, update: jax.Array) -> jax.Array:
        return (leaf - learning_rate * (update + weight_decay * leaf)).astype(leaf.dtype)

    def apply(projection: Projection | None, leaf: Any, gradient: Any, basis: Any, scaled: Any) -> tuple[jax.Array]:
        if projection is None:
            return (moved(leaf, scaled.astype(gradient.dtype)),)

        def one(b: jax.Array, matrices: jax.Array) -> jax.Array:
            here, basis_here, scaled_here = (lax.dynamic_slice_in_dim(x, b, 1) for x in (matrices, basis, scaled))
            back = low_rank.project_back(scale * scaled_here, basis_here, projection.axis, gradient.dtype)
            return lax.dynamic_update_slice_in_dim(matrices, moved(here, back), b, 0)

        matrices = lax.fori_loop(0, projection.matrices, one, as_matrices(leaf, projection.spec))
        return (from_matrices(matrices, projection.spec, leaf.shape),)

    (params,) = low_rank.map_leaves(apply, 1, projected, params, grads, state.basis, scaled)
    return params, state


def galore_state_bytes(
    params: Any,
    rank: int | float = 128,
    *,
    side: Side = "short",
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> int:
    """Returns the bytes of GaLore's state with Adam inside: ``r (s w + 8 l)`` per matrix, 8 per number of other leaves.

    s is the projected side, l the other, w the bytes of a parameter; two step counters add 8.

    Args:
      params: pytree of arrays or abstract arrays.
      rank, side, rules, axes: as in `scale_by_galore`.
    """

    def leaf_bytes(projection: Projection | None, leaf: Any) -> tuple[int]:
        if projection is None:
            return (8 * math.prod(leaf.shape),)
        width = jnp.dtype(leaf.dtype).itemsize
        return (projection.matrices * projection.rank * (projection.projected * width + 8 * projection.kept),)

    (sizes,) = low_rank.map_leaves(leaf_bytes, 1, low_rank.projections(params, rank, side, rules, axes), params)
    return 8 + sum(jax.tree.leaves(sizes))
