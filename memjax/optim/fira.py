"""Fira: GaLore, and the rest of the gradient scaled as Adam scales the part within the subspace.

Source: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024.

Per channel (along the side that is not projected) Adam changes the norm of the coordinates by a factor; the gradient
outside of the subspace is multiplied by the same factor and added. State: GaLore's and one number per matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.core import Axes
from memjax.optim import low_rank
from memjax.optim.galore import galore_state_bytes
from memjax.optim.low_rank import Method, Projection, Side
from memjax.optim.matrices import as_matrices, from_matrices
from memjax.optim.routing import Label


class FiraState(NamedTuple):
    """State of `scale_by_fira`.

    Attributes:
      count: int32 scalar, steps done.
      basis: tree of ``[B, s, r]`` in the parameter's dtype; `optax.MaskedNode` for leaves in full.
      mu, nu: trees of float32 ``[B, r, n]`` or ``[B, m, r]``; whole for leaves in full.
      norm: tree of float32 ``[B]``, norm of the last update outside of the subspace; MaskedNode likewise.
    """

    count: jax.Array  # type: ignore[assignment]
    basis: Any
    mu: Any
    nu: Any
    norm: Any


def scale_by_fira(
    rank: int | float = 128,
    update_gap: int = 200,
    scale: Any = 0.25,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    growth: Any = 1.01,
    exact_residual: bool = False,
    side: Side = "short",
    method: Method = "eigh",
    stagger: bool = True,
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns Fira as a transformation of gradients; leaves that `routing.label` calls full get Adam.

    The gradient outside of the subspace is never formed: one product with the basis and one pass over the gradient
    give the whole update, and norms come from those of the gradient and its coordinates.

    Args:
      rank, update_gap, side, method, stagger, seed, rules, axes: as in `scale_by_galore`.
      scale: of the part within the subspace.
      b1, b2, eps: Adam's; eps is added before the bias of the second moment is corrected.
      growth: the norm of the part outside grows by no more than this factor per step.
      exact_residual: subtract all of the part within the subspace from the gradient, not ``scale`` times it as the
        reference does.

    Raises:
      TypeError, ValueError: as `scale_by_galore`.
    """
    low_rank.check(rank, update_gap, side, method, seed)

    def plan(tree: Any) -> list[Projection | None]:
        return low_rank.projections(tree, rank, side, rules, axes)

    def init(params: Any) -> FiraState:
        def start(projection: Projection | None, leaf: Any) -> tuple[Any, ...]:
            masked = optax.MaskedNode()
            if projection is None:
                return masked, jnp.zeros(leaf.shape, jnp.float32), jnp.zeros(leaf.shape, jnp.float32), masked
            shape = projection.coordinates_shape
            basis = jnp.zeros(projection.basis_shape, leaf.dtype)
            return (
                basis,
                jnp.zeros(shape, jnp.float32),
                jnp.zeros(shape, jnp.float32),
                jnp.zeros(projection.matrices, jnp.float32),
            )

        return FiraState(jnp.zeros((), jnp.int32), *low_rank.map_leaves(start, 4, plan(params), params))

    def update(updates: Any, state: FiraState, params: Any = None) -> tuple[Any, FiraState]:
        correction = low_rank.adam_correction(state.count, b1, b2)

        def step(projection: Projection | None, leaf: jax.Array, *kept: Any) -> tuple[Any, ...]:
            basis, mu, nu, norm = kept
            if projection is None:
                ratio, mu, nu = low_rank.adam_ratio(leaf, mu, nu, b1, b2, eps)
                return (correction * ratio).astype(leaf.dtype), basis, mu, nu, norm
            axis = projection.axis
            matrices = as_matrices(leaf, projection.spec)
            bases = low_rank.refreshed_basis(
                projection, matrices, basis, state.count, update_gap, method=method, stagger=stagger, seed=seed
            )
            coordinates = low_rank.project(matrices, bases, axis)
            ratio, new_mu, new_nu = low_rank.adam_ratio(coordinates, mu, nu, b1, b2, eps)
            inside = low_rank.square_sum(coordinates, axis)
            channel = jnp.sqrt(low_rank.square_sum(ratio, axis)) / (jnp.sqrt(inside) + 1e-8)
            part = 1.0 if exact_residual else scale
            outside = jnp.maximum(low_rank.square_sum(matrices, axis) - part * (2 - part) * inside, 0)
            factor, new_norm = low_rank.limit_growth(
                jnp.sqrt(jnp.sum(channel**2 * outside, axis=(-2, -1))), norm, growth
            )
            channel = channel * factor[:, None, None]
            back = low_rank.project_back(
                correction * (scale * ratio - part * channel * coordinates), bases, axis, leaf.dtype
            )
            whole = back + (correction * channel * matrices).astype(leaf.dtype)
            return (
                from_matrices(whole, projection.spec, leaf.shape),
                bases,
                new_mu,
                new_nu,
                new_norm,
            )

        updates, *kept = low_rank.map_leaves(
            step, 5, plan(updates), updates, state.basis, state.mu, state.nu, state.norm
        )
        return updates, FiraState(optax.safe_increment(state.count), *kept)

    return optax.GradientTransformation(init, update)


def fira(
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
    growth: Any = 1.01,
    exact_residual: bool = False,
    side: Side = "short",
    method: Method = "eigh",
    stagger: bool = True,
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns Fira with decoupled weight decay.

    Args:
      learning_rate: a number or schedule.
      weight_decay, mask: as in `optax.adamw`.
      rank, update_gap, scale, b1, b2, eps, growth, exact_residual, side, method, stagger, seed, rules, axes: as in
        `scale_by_fira`.
    """
    return optax.chain(
        scale_by_fira(
            rank, update_gap, scale, b1=b1, b2=b2, eps=eps, growth=growth, exact_residual=exact_residual, side=side,
            method=method, stagger=stagger, seed=seed, rules=rules, axes=axes,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def fira_state_bytes(
    params: Any,
    rank: int | float = 128,
    *,
    side: Side = "short",
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> int:
    """Returns the bytes of Fira's state: GaLore's, 4 more per matrix, 4 less for the one step counter.

    Args:
      params: pytree of arrays or abstract arrays.
      rank, side, rules, axes: as in `scale_by_galore`.
    """
    projected = low_rank.projections(params, rank, side, rules, axes)
    matrices = sum(projection.matrices for projection in projected if projection)
    return galore_state_bytes(params, rank, side=side, rules=rules, axes=axes) + 4 * matrices - 4
