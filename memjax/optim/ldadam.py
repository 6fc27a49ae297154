"""LDAdam: Adam in a subspace that follows the gradient at every step, with moments carried from basis to basis.

Source: LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics, 2025.

What a step's subspace leaves out of the gradient and of the momentum is kept and added to the next gradient. The
reference hides this error in the gradient's buffer, which then lives from step to step; here it is state, in bfloat16
by default. A matrix ``[m, n]`` of short side s and long side l keeps ``r (s + 2 l)`` numbers and ``m n`` of the error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.core import Axes
from memjax.optim import low_rank
from memjax.optim.low_rank import HIGHEST, Method, Projection, Side
from memjax.optim.matrices import as_matrices, from_matrices
from memjax.optim.routing import Label


class LDAdamState(NamedTuple):
    """State of `scale_by_ldadam`.

    Attributes:
      count: int32 scalar, steps done.
      basis: tree of float32 ``[B, s, r]``; `optax.MaskedNode` for leaves in full.
      mu, nu: trees of float32 ``[B, r, n]`` or ``[B, m, r]``; whole for leaves in full.
      error: tree of the shapes of the parameters, what is to be added to the next gradient; MaskedNode for leaves in
        full and without error feedback.
    """

    count: jax.Array  # type: ignore[assignment]
    basis: Any
    mu: Any
    nu: Any
    error: Any


def transport_moments(
    mu: jax.Array, nu: jax.Array, change: jax.Array, axis: int, correction1: Any = 1.0, correction2: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Carries Adam's moments from one orthonormal basis to another.

    The variance of coordinates is carried as that of uncorrelated ones; with an unchanged basis nothing changes.

    Args:
      mu, nu: float32 ``[B, r, n]`` (axis -2) or ``[B, m, r]`` (axis -1), coordinates in the old basis.
      change: float32 ``[B, r, r]``, products of the new basis' vectors (rows) with the old one's.
      axis: of the coordinates.
      correction1, correction2: ``1 - b1**t`` and ``1 - b2**t`` of the moments' bias after t steps.

    Returns:
      Moments in the new basis.
    """

    def carry(matrix: jax.Array, moment: jax.Array) -> jax.Array:
        return jnp.einsum("brq,bqk->brk" if axis == -2 else "brq,bkq->bkr", matrix, moment, precision=HIGHEST)

    new_mu = carry(change, mu)
    variance = carry(change**2, nu / correction2 - (mu / correction1) ** 2)
    return new_mu, correction2 * jnp.abs(variance + (new_mu / correction1) ** 2)


def scale_by_ldadam(
    rank: int | float = 16,
    *,
    b1: Any = 0.908,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    rho: Any = 0.908,
    error_dtype: Any = jnp.bfloat16,
    side: Side = "short",
    method: Method = "eigh",
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns LDAdam as a transformation of gradients; leaves that `routing.label` calls full get Adam.

    The first basis holds the leading singular vectors of the gradient; every later one is one power step from its
    predecessor on ``rho * momentum + (1 - rho) * gradient``, a matrix that is never formed.

    Args:
      rank: coordinates per matrix, or a fraction of its projected side.
      b1, b2, eps: Adam's; eps is added after bias correction.
      rho: weight of the momentum in the search for the subspace.
      error_dtype: of the error that is kept; None keeps none (no error feedback).
      side: the axis that coordinates replace; ``"short"`` (outputs if square) is the reference's.
      method, seed: how the first basis is found; see `low_rank.find_subspace`.
      rules: pattern -> label overrides, as in `routing.label`.
      axes: pattern -> `Axes` of weights that are not ``[*batch, inputs, outputs]``.

    Raises:
      TypeError: (by ``init``) a weight view among the parameters.
      ValueError: an unknown side or method, or a rank or seed out of range; by ``init``, a rank larger than a matrix.
    """
    low_rank.check(rank, 1, side, method, seed)

    def plan(tree: Any) -> list[Projection | None]:
        return low_rank.projections(tree, rank, side, rules, axes, square="output")

    def init(params: Any) -> LDAdamState:
        def start(projection: Projection | None, leaf: Any) -> tuple[Any, ...]:
            masked = optax.MaskedNode()
            if projection is None:
                return masked, jnp.zeros(leaf.shape, jnp.float32), jnp.zeros(leaf.shape, jnp.float32), masked
            shape = projection.coordinates_shape
            basis = jnp.zeros(projection.basis_shape, jnp.float32)
            error = masked if error_dtype is None else jnp.zeros(leaf.shape, error_dtype)
            return basis, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), error

        return LDAdamState(jnp.zeros((), jnp.int32), *low_rank.map_leaves(start, 4, plan(params), params))

    def update(updates: Any, state: LDAdamState, params: Any = None) -> tuple[Any, LDAdamState]:
        count = state.count
        correction1, correction2 = (low_rank.bias_correction(b, count + 1) for b in (b1, b2))
        # Before the first step the moments are zero, so any divisor will do.
        previous1, previous2 = (jnp.where(count == 0, 1.0, low_rank.bias_correction(b, count)) for b in (b1, b2))

        def step(projection: Projection | None, leaf: jax.Array, *kept: Any) -> tuple[Any, ...]:
            old, old_mu, old_nu, error = kept
            if projection is None:
                mu, nu = low_rank.decayed(old_mu, leaf, b1, 1), low_rank.decayed(old_nu, leaf, b2, 2)
                return adam(mu, nu).astype(leaf.dtype), old, mu, nu, error
            axis, spec = projection.axis, projection.spec
            # The gradient with its error is a sum of matrices that is only ever multiplied.
            parts = [as_matrices(x, spec) for x in (leaf, error) if isinstance(x, jax.Array)]
            momentum = rho * old_mu / previous1
            sought = momentum + (1 - rho) * sum(low_rank.project(x, old, axis, HIGHEST) for x in parts)
            power = jnp.matmul(old, low_rank.multiply(momentum, sought, axis, HIGHEST), precision=HIGHEST)
            power += (1 - rho) * sum(low_rank.multiply(x, sought, axis, HIGHEST) for x in parts)

            def lead(matrix: jax.Array, previous: jax.Array, words: jax.Array) -> jax.Array:
                always = jnp.ones((), bool)
                return low_rank.find_subspace(matrix, previous, axis, projection.rank, method, words, always)

            first = jnp.broadcast_to(count == 0, (projection.matrices,))
            words = low_rank.matrix_words(projection, seed, 0)
            new = low_rank.refresh(first, lead, parts[0], jnp.linalg.qr(power)[0], words)
            coordinates = jnp.asarray(sum(low_rank.project(x, new, axis, HIGHEST) for x in parts))
            change = jnp.einsum("bsr,bsq->brq", new, old, precision=HIGHEST)
            carried_mu, carried_nu = transport_moments(old_mu, old_nu, change, axis, previous1, previous2)
            new_mu = low_rank.decayed(carried_mu, coordinates, b1, 1)
            new_nu = low_rank.decayed(carried_nu, coordinates, b2, 2)
            if error_dtype is not None:
                share = b1 / (1 - b1)
                left_out = low_rank.project_back(share * old_mu, old, axis, jnp.float32, HIGHEST)
                left_out -= low_rank.project_back(coordinates + share * carried_mu, new, axis, jnp.float32, HIGHEST)
                left_out += sum(x.astype(jnp.float32) for x in parts)
                error = from_matrices(left_out, spec, leaf.shape).astype(error.dtype)
            scaled = low_rank.project_back(adam(new_mu, new_nu), new, axis, leaf.dtype)
            return (
                from_matrices(scaled, spec, leaf.shape),
                new,
                new_mu,
                new_nu,
                error,
            )

        def adam(mu: jax.Array, nu: jax.Array) -> jax.Array:
            return mu / correction1 / (jnp.sqrt(nu / correction2) + eps)

        updates, *kept = low_rank.map_leaves(
            step, 5, plan(updates), updates, state.basis, state.mu, state.nu, state.error
        )
        return updates, LDAdamState(optax.safe_increment(count), *kept)

    return optax.GradientTransformation(init, update)


def ldadam(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rank: int | float = 16,
    *,
    b1: Any = 0.908,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    rho: Any = 0.908,
    error_dtype: Any = jnp.bfloat16,
    side: Side = "short",
    method: Method = "eigh",
    seed: int = 0,
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Returns LDAdam with decoupled weight decay.

    Args:
      learning_rate: a number or schedule.
      weight_decay, mask: as in `optax.adamw`.
      rank, b1, b2, eps, rho, error_dtype, side, method, seed, rules, axes: as in `scale_by_ldadam`.
    """
    return optax.chain(
        scale_by_ldadam(
            rank, b1=b1, b2=b2, eps=eps, rho=rho, error_dtype=error_dtype, side=side, method=method, seed=seed,
            rules=rules, axes=axes,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def ldadam_state_bytes(
    params: Any,
    rank: int | float = 16,
    *,
    error_dtype: Any = jnp.bfloat16,
    side: Side = "short",
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> int:
    """Returns the bytes of LDAdam's state: ``4 r s + 8 r l + e s l`` per matrix, 8 per number of other leaves.

    s is the projected side, l the other, e the bytes of a number of the error; the step counter adds 4.

    Args:
      params: pytree of arrays or abstract arrays.
      rank, error_dtype, side, rules, axes: as in `scale_by_ldadam`.
    """
    width = 0 if error_dtype is None else jnp.dtype(error_dtype).itemsize

    def leaf_bytes(projection: Projection | None, leaf: Any) -> tuple[int]:
        if projection is None:
            return (8 * math.prod(leaf.shape),)
        short, long = projection.projected, projection.kept
        return (projection.matrices * (projection.rank * (4 * short + 8 * long) + width * short * long),)

    projected = low_rank.projections(params, rank, side, rules, axes, square="output")
    (sizes,) = low_rank.map_leaves(leaf_bytes, 1, projected, params)
    return 4 + sum(jax.tree.leaves(sizes))
