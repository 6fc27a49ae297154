"""FLRML: low-rank metric learning as a search on the Stiefel manifold, without a dense D x D or n x n matrix.

Sources: Liu et al., "Fast Low-rank Metric Learning for Large-scale and High-dimensional Data", 2019; the search along
curves is that of Wen and Yin, "A feasible method for optimization with orthogonality constraints", 2013.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Triplets(NamedTuple):
    """Triplets of column numbers: the anchor shall be nearer to the positive than to the negative."""

    anchor: jax.Array  # int32 [T]
    positive: jax.Array  # int32 [T]
    negative: jax.Array  # int32 [T]


class Spectral(NamedTuple):
    """Data and triplets in the coordinates of the data's singular vectors."""

    v: jax.Array  # float32 [n, r], right singular vectors
    pull: jax.Array  # float32 [n, r]: of each anchor, the mean of positives minus negatives


class Search(NamedTuple):
    """Where a search on the Stiefel manifold is."""

    P: jax.Array  # float32 [r, d], orthonormal columns
    grad: jax.Array  # float32 [r, d], gradient of the objective on the manifold
    value: jax.Array  # float32 scalar, objective
    reference: jax.Array  # float32 scalar, decayed mean of past objectives, which steps have to beat
    weight: jax.Array  # float32 scalar, sum of the weights in that mean
    tau: jax.Array  # float32 scalar, the step to try next
    active: jax.Array  # bool [n], anchors that violate the margin


class Flrml(NamedTuple):
    """A learned metric.

    Attributes:
      L: float32 ``[d, D]``; distances are ``|L (x - y)|``.
      values: float32 ``[iterations]``: the objective after each; of mini-batches the sum of violations before each.
    """

    L: jax.Array
    values: jax.Array


def cayley_step(P: jax.Array, grad: jax.Array, tau: Any) -> jax.Array:
    """Moves on the Stiefel manifold against a gradient, by the Cayley transform in its low-rank form.

    Args:
      P: ``[r, d]`` with orthonormal columns.
      grad: ``[r, d]``, the plain gradient.
      tau: step.

    Returns:
      ``(I + tau/2 A)^-1 (I - tau/2 A) P`` with ``A = grad P^T - P grad^T``, at the cost of a ``[2d, 2d]`` solve.
    """
    U, V = jnp.concatenate([grad, P], 1), jnp.concatenate([P, -grad], 1)
    inner = jnp.eye(U.shape[1], dtype=P.dtype) + (tau / 2) * (V.T @ U)
    return P - tau * (U @ jnp.linalg.solve(inner, V.T @ P))


def polar_retraction(X: jax.Array) -> jax.Array:
    """Returns the matrix with orthonormal columns that is nearest to ``X [r, d]``, its polar factor."""
    u, _, vt = jnp.linalg.svd(X, full_matrices=False)
    return u @ vt


def spectral(x: Any, triplets: Triplets, *, rank: int | None = None, threshold: float = 1e-5) -> tuple[Any, ...]:
    """Returns the singular vectors and values of normalised data, and `Spectral`.

    Args:
      x: float ``[D, n]``, a column per point; columns are scaled to length 1 here.
      triplets: numbers of columns.
      rank: at most so many singular vectors are kept.
      threshold: smaller singular values are dropped.

    Returns:
      (u ``[D, r]``, singular values ``[r]``, `Spectral`).
    """
    u, sigma, v = _decomposed(jnp.asarray(x, jnp.float32))
    r = min(int((np.asarray(sigma) > threshold).sum()), rank or len(sigma))
    return u[:, :r], sigma[:r], _with_triplets(v[:, :r], triplets)


@jax.jit
def _decomposed(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    norms = jnp.linalg.norm(x, axis=0)
    u, sigma, vt = jnp.linalg.svd(x / jnp.where(norms > 0, norms, 1), full_matrices=False)
    return u, sigma, vt.T


@jax.jit
def _with_triplets(v: jax.Array, triplets: Triplets) -> Spectral:
    count = jax.ops.segment_sum(jnp.ones(len(triplets.anchor)), triplets.anchor, num_segments=len(v))
    sums = jax.ops.segment_sum(v[triplets.positive] - v[triplets.negative], triplets.anchor, num_segments=len(v))
    return Spectral(v, sums / (1 + count)[:, None])


def scores(data: Spectral, P: jax.Array) -> jax.Array:
    """Returns ``[n, d]``: by how much each anchor is nearer to its positives, along each direction."""
    return (data.v @ P) * (data.pull @ P)


def scales(data: Spectral, P: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``(s, k)``, float32 ``[d]``: the best scales of directions and what they are the softplus of."""
    k = active.astype(jnp.float32) @ scores(data, P)
    return jax.nn.softplus(k), k


def objective(data: Spectral, P: jax.Array, active: jax.Array, margin: Any) -> jax.Array:
    """Returns ``margin * number of active anchors - s . k / 2``, which is minimised on the Stiefel manifold.

    Args:
      data: of `spectral`.
      P: ``[r, d]``, orthonormal columns.
      active: bool ``[n]``, anchors that violate the margin.
      margin: float.
    """
    s, k = scales(data, P, active)
    return margin * jnp.sum(active) - s @ k / 2


def objective_grad(data: Spectral, P: jax.Array, active: jax.Array) -> jax.Array:
    """Returns the gradient ``[r, d]`` of `objective` in P, its active anchors fixed."""
    s, k = scales(data, P, active)
    q = -(s + k * jax.nn.sigmoid(k)) / 2
    return _pulled(data, P, active) * q


def _pulled(data: Spectral, P: jax.Array, active: jax.Array) -> jax.Array:
    """Returns ``-(K + K^T) P`` for ``K = -pull^T diag(active) v``, without the r x r matrix."""
    masked = active.astype(jnp.float32)[:, None]
    return data.pull.T @ (masked * (data.v @ P)) + data.v.T @ (masked * (data.pull @ P))


def violated(data: Spectral, P: jax.Array, s: jax.Array, margin: Any) -> jax.Array:
    """Returns which anchors ``[n]`` violate the margin; anchors without triplets count as they are."""
    return margin - scores(data, P) @ s > 0


def tangent(P: jax.Array, grad: jax.Array) -> jax.Array:
    """Returns the part of a gradient ``[r, d]`` along the manifold: ``grad - P grad^T P``."""
    return grad - P @ (grad.T @ P)


def start(data: Spectral, dim: int, key: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``(P, margin, active)``: a random start, and the margin that suits it.

    The margin is ``ratio`` times the mean weighted square of 100 points' coordinates; it and the scales are found in
    turns, at most ten, until two objectives agree within 1 %.
    """
    n, r = data.v.shape
    turn, scale, sample = jax.random.split(key, 3)
    square = jnp.linalg.qr(jax.random.uniform(turn, (dim, dim)))[0]
    P = jnp.zeros((r, dim)).at[:dim].set(square)
    some = jax.random.randint(sample, (min(100, n),), 0, n)

    def again(carry: Any) -> Any:
        i, s, _, value, _ = carry
        margin = ratio * jnp.mean(((data.v[some] @ P) ** 2) @ s)
        active = violated(data, P, s, margin)
        s, _ = scales(data, P, active)
        return i + 1, s, margin, objective(data, P, active, margin), value

    def unsettled(carry: Any) -> jax.Array:
        i, _, _, value, before = carry
        return (i < 10) & ~(jnp.abs(value - before) < 0.01 * jnp.abs(before))

    s = jax.random.uniform(scale, (dim,)) ** 2
    first = (jnp.int32(0), s, jnp.float32(0), jnp.float32(jnp.inf), jnp.float32(-jnp.inf))
    _, s, margin, _, _ = lax.while_loop(unsettled, again, first)
    return P, margin, violated(data, P, s, margin)


def search_start(data: Spectral, P: jax.Array, active: jax.Array, margin: Any, *, tau: float = 1e-3) -> Search:
    """Returns the search at ``P``, with ``tau`` as first step to try."""
    value = objective(data, P, active, margin)
    grad = tangent(P, objective_grad(data, P, active))
    return Search(P, grad, value, value, jnp.float32(1), jnp.float32(tau), active)


def search_step(
    data: Spectral,
    search: Search,
    margin: Any,
    iteration: Any,
    *,
    rho: float = 1e-4,
    shrink: float = 0.1,
    memory: float = 0.85,
    trials: int = 25,
) -> Search:
    """Takes one step along a curve on the manifold, then finds the anchors that violate the margin anew.

    The line search is nonmonotone (Zhang and Hager): a trial has to beat the mean of past objectives by ``rho`` times
    the expected decrease; else the step shrinks. The next step is Barzilai and Borwein's, its two formulas in turns.

    Args:
      data: of `spectral`.
      search: where it is.
      margin: float.
      iteration: int, its number; says which formula.
      rho, shrink, memory, trials: of the line search.
    """
    P, active = search.P, search.active
    plain = objective_grad(data, P, active)
    # The slope of the objective along the curve at its start: half the squared norm of A.
    product = plain.T @ P
    slope = jnp.sum(plain * plain) - jnp.sum(product * product.T)

    def at(tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = cayley_step(P, plain, tau)
        return moved, objective(data, moved, active, margin)

    def too_far(carry: Any) -> jax.Array:
        i, tau, (_, value) = carry
        return (i < trials) & ~(value <= search.reference - rho * tau * slope)

    def shorter(carry: Any) -> Any:
        i, tau, _ = carry
        return i + 1, tau * shrink, at(tau * shrink)

    _, tau, (moved, value) = lax.while_loop(too_far, shorter, (jnp.int32(1), search.tau, at(search.tau)))
    s, _ = scales(data, moved, active)
    now = violated(data, moved, s, margin)
    # Differences with the same active anchors: others belong to another objective.
    change = tangent(moved, objective_grad(data, moved, active)) - search.grad
    way = moved - P
    along = jnp.abs(jnp.sum(way * change))
    ratio = jnp.where(iteration % 2 == 0, jnp.sum(way * way) / along, along / jnp.sum(change * change))
    next_tau = jnp.where(jnp.isfinite(ratio), jnp.clip(ratio, 1e-20, 1e20), tau)
    weight = memory * search.weight + 1
    new = objective(data, moved, now, margin)
    # The mean moves with the objective when its active anchors change.
    reference = (memory * search.weight * search.reference + value) / weight + (new - value)
    grad = tangent(moved, objective_grad(data, moved, now))
    return Search(moved, grad, new, reference, weight, next_tau, now)


def metric(u: jax.Array, sigma: jax.Array, P: jax.Array, s: jax.Array) -> jax.Array:
    """Returns ``L [d, D]``: ``diag(sqrt(s)) P^T diag(1 / sigma) u^T``."""
    return jnp.sqrt(s)[:, None] * ((P / sigma[:, None]).T @ u.T)


def flrml(
    x: Any,
    triplets: Triplets,
    dim: int,
    key: jax.Array,
    *,
    ratio: float = 1.0,
    iterations: int = 30,
    rank: int | None = 3000,
) -> Flrml:
    """Learns a metric of rank ``dim`` from triplets, with all data at once; memory O((n + D) r).

    Args:
      x: float ``[D, n]``, a column per point.
      triplets: numbers of columns; int arrays ``[T]``.
      dim: rank of the metric.
      key: random key of the start.
      ratio: size of the margin.
      iterations: steps of the search.
      rank: r, the largest number of singular vectors of the data that are used.

    Raises:
      ValueError: triplets of other shapes, or more directions than the data has.
    """
    triplets = _checked(triplets)
    u, sigma, data = spectral(x, triplets, rank=rank)
    if not 0 < dim <= len(sigma):
        raise ValueError(f"dim={dim} must be 1 to {len(sigma)}, the rank of the data")

    @jax.jit
    def run(data: Spectral, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        P, margin, active = start(data, dim, key, ratio)

        def one(search: Search, i: jax.Array) -> tuple[Search, jax.Array]:
            search = search_step(data, search, margin, i)
            return search, search.value

        search, values = lax.scan(one, search_start(data, P, active, margin), jnp.arange(iterations))
        return search.P, scales(data, search.P, search.active)[0], values

    P, s, values = run(data, key)
    return Flrml(metric(u, sigma, P, s), values)


def flrml_minibatch(
    x: Any,
    triplets: Triplets,
    dim: int,
    key: jax.Array,
    *,
    ratio: float = 1.0,
    iterations: int = 30,
    batch: int = 100,
) -> Flrml:
    """Learns a metric of rank ``dim`` from few triplets at a time; memory O(D batch) beside the data.

    Iteration J takes the singular vectors of the columns that its triplets touch, makes one projected gradient step
    from the metric in these coordinates, and blends the result into the metric with the share ``1 / sqrt(J)``.

    Args:
      x, triplets, dim, key: as in `flrml`; ``dim`` is at most the rank of a batch's columns.
      ratio: size of the margin, relative to the mean square of the first batch under the random start.
      iterations: how many batches.
      batch: triplets of each iteration.

    Raises:
      ValueError: as `flrml`.
    """
    triplets = _checked(triplets)
    x = np.asarray(x, np.float32)
    begin, key = jax.random.split(key)
    L, margin, values = jax.random.uniform(begin, (dim, x.shape[0])), jnp.float32(jnp.nan), []
    for i in range(iterations):
        count = len(triplets.anchor)
        chosen = np.asarray(jax.random.choice(jax.random.fold_in(key, i), count, (min(batch, count),), replace=False))
        flat = np.stack([np.asarray(part)[chosen] for part in triplets])
        touched, local = np.unique(flat, return_inverse=True)
        # Columns of zeros up to the largest number, so that one compiled step serves all batches.
        few = np.zeros((len(x), flat.size), np.float32)
        few[:, : len(touched)] = x[:, touched]
        new, value, margin, rank = _minibatch_step(
            L, few, Triplets(*jnp.asarray(local.reshape(flat.shape))), len(touched), ratio, margin
        )
        if not 0 < dim <= int(rank):
            raise ValueError(f"dim={dim} must be 1 to {rank}, the rank of a batch of {len(touched)} columns")
        L = L + (new - L) / (i + 1) ** 0.5
        values.append(value)
    return Flrml(L, jnp.stack(values))


@jax.jit
def _minibatch_step(
    L: jax.Array, x: jax.Array, triplets: Triplets, count: jax.Array, ratio: Any, margin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the metric that a projected gradient step gives, the sum of violations before it, margin and rank.

    Args:
      L: the metric so far.
      x: the columns that the batch touches, then zeros.
      triplets: of the batch, numbers of its columns.
      count: number of columns that are not padding.
      ratio: of the margin, where ``margin`` is NaN: it is to be found.
      margin: of the batches before.
    """
    u, sigma, v = _decomposed(x)
    kept = sigma > 1e-5
    u, sigma, data = u * kept, jnp.where(kept, sigma, 1), _with_triplets(v * kept, triplets)
    mapped = sigma[:, None] * (u.T @ L.T)
    margin = jnp.where(jnp.isnan(margin), ratio * jnp.sum((data.v @ mapped) ** 2) / count, margin)
    slack = margin - jnp.sum(scores(data, mapped), axis=1)
    active = (slack > 0) & (jnp.arange(len(slack)) < count)
    P, size, turn = jnp.linalg.svd(mapped, full_matrices=False)
    grad = -_pulled(data, P, active) * size**2
    s, _ = scales(data, P, active)
    new = turn.T @ metric(u, sigma, polar_retraction(P - tangent(P, grad)), s)
    return new, jnp.sum(jnp.where(active, slack, 0)), margin, jnp.sum(kept)


def _checked(triplets: Any) -> Triplets:
    parts = Triplets(*(jnp.asarray(part) for part in triplets))
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or parts.anchor.ndim != 1 or not all(jnp.issubdtype(p.dtype, jnp.integer) for p in parts):
        raise ValueError(f"expected three int arrays [T] of anchors, positives and negatives, got {sorted(shapes)}")
    return parts
