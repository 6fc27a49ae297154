"""APOLLO and APOLLO-Mini: gradients scaled per channel, or per matrix, as Adam scales a random projection of them.

Source: APOLLO: SGD-like Memory, AdamW-level Performance, 2025.

A matrix of long side l keeps ``2 r l`` numbers of moments and one norm. The projection, Gaussian with variance 1/r and
not orthonormal, is made of a counter hash whenever it is needed: no singular vectors, no basis in the state. Moments
are not reset when it changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from memjax.core import Axes
from memjax.optim import low_rank
from memjax.optim.low_rank import Projection, Side
from memjax.optim.matrices import as_matrices, from_matrices
from memjax.optim.routing import Label

ScaleType = Literal["channel", "tensor"]


class ApolloState(NamedTuple):
    """State of `scale_by_apollo`.

    Attributes:
      count: int32 scalar, steps done.
      mu, nu: trees of float32 ``[B, r, n]`` or ``[B, m, r]``; whole for leaves in full.
      norm: tree of float32 ``[B]``, norm of the last update; `optax.MaskedNode` for leaves in full.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any
    norm: Any


def scale_by_apollo(
    rank: int | float = 0.25,
    update_gap: int = 200,
    scale: Any = 1.0,
    scale_type: ScaleType = "channel",
    *,
    scale_front: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    growth: Any = 1.01,
    side: Side = "short",
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns APOLLO as a transformation of gradients; leaves that `routing.label` calls full get Adam.

    Args:
      rank: coordinates per matrix, or a fraction of its projected side.
      update_gap: steps for which a projection is kept.
      scale: updates of projected leaves are multiplied by its square root.
      scale_type: one factor per channel of the side that is not projected, or one per matrix.
      scale_front: apply ``scale`` before the norm is limited, not after.
      b1, b2, eps: Adam's; eps is added before the bias of the second moment is corrected.
      growth: the norm of a matrix's update grows by no more than this factor per step.
      side: the axis that coordinates replace; ``"short"`` (inputs if square) is the reference's.
      seed: of the projections.
      rules: pattern -> label overrides, as in `routing.label`.
      axes: pattern -> `Axes` of weights that are not ``[*batch, inputs, outputs]``.

    Raises:
      TypeError: (by ``init``) a weight view among the parameters.
      ValueError: an unknown side or scale type, or a gap, rank or seed out of range; by ``init``, a rank larger than a
        matrix.
    """
    low_rank.check(rank, update_gap, side, seed=seed)
    if scale_type not in get_args(ScaleType):
        raise ValueError(f"scale_type must be one of {', '.join(get_args(ScaleType))}, got {scale_type!r}")

    def plan(tree: Any) -> list[Projection | None]:
        return low_rank.projections(tree, rank, side, rules, axes)

    def init(params: Any) -> ApolloState:
        def start(projection: Projection | None, leaf: Any) -> tuple[Any, ...]:
            shape = leaf.shape if projection is None else projection.coordinates_shape
            norm = optax.MaskedNode() if projection is None else jnp.zeros(projection.matrices, jnp.float32)
            return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), norm

        return ApolloState(jnp.zeros((), jnp.int32), *low_rank.map_leaves(start, 3, plan(params), params))

    def update(updates: Any, state: ApolloState, params: Any = None) -> tuple[Any, ApolloState]:
        correction = low_rank.adam_correction(state.count, b1, b2)

        def step(projection: Projection | None, leaf: jax.Array, *kept: Any) -> tuple[Any, ...]:
            mu, nu, norm = kept
            if projection is None:
                ratio, mu, nu = low_rank.adam_ratio(leaf, mu, nu, b1, b2, eps)
                return (correction * ratio).astype(leaf.dtype), mu, nu, norm
            matrices = as_matrices(leaf, projection.spec)
            words = low_rank.matrix_words(projection, seed, state.count // update_gap)
            coordinates = low_rank.project(matrices, random_projection(words, projection), projection.axis)
            ratio, new_mu, new_nu = low_rank.adam_ratio(coordinates, mu, nu, b1, b2, eps)
            along = projection.axis if scale_type == "channel" else (-2, -1)
            factors = jnp.sqrt(low_rank.square_sum(ratio, along)) / (
                jnp.sqrt(low_rank.square_sum(coordinates, along)) + 1e-8
            )
            root = jnp.sqrt(scale)
            length = jnp.sqrt(jnp.sum(factors**2 * low_rank.square_sum(matrices, along), axis=(-2, -1)))
            limit, new_norm = low_rank.limit_growth(length * root if scale_front else length, norm, growth)
            scaled = (correction * root * limit[:, None, None] * factors * matrices).astype(leaf.dtype)
            return (
                from_matrices(scaled, projection.spec, leaf.shape),
                new_mu,
                new_nu,
                new_norm,
            )

        updates, *kept = low_rank.map_leaves(step, 4, plan(updates), updates, state.mu, state.nu, state.norm)
        return updates, ApolloState(optax.safe_increment(state.count), *kept)

    return optax.GradientTransformation(init, update)


def random_projection(words: jax.Array, projection: Projection) -> jax.Array:
    """Returns Gaussian projections of variance ``1 / r``, float32 ``[B, s, r]``, from seed words ``[B, 3]``."""
    shape = (projection.projected, projection.rank)
    return jax.vmap(lambda w: low_rank.gaussian(w, shape))(words) / math.sqrt(projection.rank)


def apollo(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    rank: int | float = 0.25,
    update_gap: int = 200,
    scale: Any = 1.0,
    scale_type: ScaleType = "channel",
    *,
    scale_front: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Any = None,
    growth: Any = 1.01,
    side: Side = "short",
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns APOLLO with decoupled weight decay.

    Args:
      learning_rate: a number or schedule.
      weight_decay, mask: as in `optax.adamw`.
      rank, update_gap, scale, scale_type, scale_front, b1, b2, eps, growth, side, seed, rules, axes: as in
        `scale_by_apollo`.
    """
    return optax.chain(
        scale_by_apollo(
            rank, update_gap, scale, scale_type, scale_front=scale_front, b1=b1, b2=b2, eps=eps, growth=growth,
            side=side, seed=seed, rules=rules, axes=axes,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule = 0.01, update_gap: int = 200, scale: Any = 128.0, **options: Any
) -> optax.GradientTransformation:
    """Returns APOLLO-Mini: rank 1 and one factor per matrix, so that its state is that of SGD but for ``8 l`` bytes.

    Args:
      learning_rate, update_gap, scale: as in `apollo`.
      options: of `apollo`, but for ``rank`` and ``scale_type``.
    """
    return apollo(learning_rate, 1, update_gap, scale, "tensor", **options)


def apollo_state_bytes(
    params: Any,
    rank: int | float = 0.25,
    *,
    side: Side = "short",
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> int:
    """Returns the bytes of APOLLO's state: ``8 r l + 4`` per matrix, 8 per number of other leaves, 4 for the counter.

    Args:
      params: pytree of arrays or abstract arrays.
      rank, side, rules, axes: as in `scale_by_apollo`; rank 1 for APOLLO-Mini.
    """

    def leaf_bytes(projection: Projection | None, leaf: Any) -> tuple[int]:
        if projection is None:
            return (8 * math.prod(leaf.shape),)
        return (projection.matrices * (8 * projection.rank * projection.kept + 4),)

    (sizes,) = low_rank.map_leaves(leaf_bytes, 1, low_rank.projections(params, rank, side, rules, axes), params)
    return 4 + sum(jax.tree.leaves(sizes))
