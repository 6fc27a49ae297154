"""Q-GaLore: GaLore with its bases in 4 bits, found anew ever less often where they have stopped changing.

Source: Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients, 2024.

After each search the leading singular vector is compared with the one before. Where the mean similarity of the last
few comparisons reaches a threshold the matrix's gap doubles: singular vectors cost most of GaLore's time. The
reference's third part, 8-bit Adam in the subspace, is ``inner=scale_by_adam8bit()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.codecs import Codec, Packed, int4
from memjax.core import Axes, leaf_paths
from memjax.optim import low_rank, tables
from memjax.optim.galore import scale_by_adam_before_correction
from memjax.optim.low_rank import Method, Projection, Side
from memjax.optim.matrices import as_matrices, from_matrices
from memjax.optim.routing import Label

MAX_GAP = 2**30


class LazyBasis(NamedTuple):
    """Basis of the matrices of one leaf, and when to find it anew.

    Attributes:
      codes: `Packed` ``[B, s, r]``.
      vector: float32 ``[B, s]``, the leading singular vector.
      similarity: float32 ``[B, window]``, absolute cosines of successive leading vectors, the newest last.
      searches: int32 ``[B]``, how often the basis was found.
      gap: int32 ``[B]``, steps between two searches.
    """

    codes: Packed
    vector: jax.Array
    similarity: jax.Array
    searches: jax.Array
    gap: jax.Array


class QGaLoreState(NamedTuple):
    """State of `scale_by_q_galore`.

    Attributes:
      count: int32 scalar, steps done.
      basis: tree of `LazyBasis`; `optax.MaskedNode` for leaves in full.
      inner: state of the inner transformation over coordinates ``[B, r, n]`` or ``[B, m, r]``.
    """

    count: jax.Array  # type: ignore[assignment]
    basis: Any
    inner: Any


def scale_by_q_galore(
    rank: int | float = 128,
    update_gap: int = 200,
    scale: Any = 0.25,
    *,
    codec: Codec | None = None,
    threshold: Any = 0.4,
    window: int = 5,
    gap_growth: int = 2,
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
    """Returns Q-GaLore as a transformation of gradients; leaves that `routing.label` calls full get ``inner`` alone.

    Args:
      codec: of the bases, in groups of a basis' numbers row by row; default ``int4(256, symmetric=False)``.
      threshold: mean similarity of leading vectors from which on the gap grows.
      window: comparisons in that mean.
      gap_growth: factor by which the gap grows.
      rank, update_gap, scale, b1, b2, eps, inner, side, method, stagger, seed, rules, axes: as in `scale_by_galore`;
        ``update_gap`` is the first gap.

    Raises:
      TypeError: (by ``init``) a weight view among the parameters.
      ValueError: as `scale_by_galore`, a window or growth below 1; by ``init``, groups that do not divide a basis.
    """
    low_rank.check(rank, update_gap, side, method, seed)
    if window < 1 or gap_growth < 1:
        raise ValueError(f"window and gap_growth must be at least 1, got {window} and {gap_growth}")
    coder = int4(256, symmetric=False) if codec is None else codec
    if inner is None:
        inner = scale_by_adam_before_correction(b1, b2, eps)

    def plan(tree: Any) -> list[Projection | None]:
        return low_rank.projections(tree, rank, side, rules, axes)

    def init(params: Any) -> QGaLoreState:
        paths = [path for path, _ in leaf_paths(params)]

        def start(projection: Projection | None, leaf: Any) -> tuple[Any, Any]:
            if projection is None:
                return optax.MaskedNode(), leaf
            count = projection.matrices
            basis = LazyBasis(
                packed_zeros(coder, projection, paths[projection.index]),
                jnp.zeros((count, projection.projected), jnp.float32),
                jnp.zeros((count, window), jnp.float32),
                jnp.zeros((count,), jnp.int32),
                jnp.full((count,), update_gap, jnp.int32),
            )
            return basis, jnp.zeros(projection.coordinates_shape, jnp.float32)

        basis, coordinates = low_rank.map_leaves(start, 2, plan(params), params)
        return QGaLoreState(jnp.zeros((), jnp.int32), basis, inner.init(coordinates))

    def search(projection: Projection, matrices: jax.Array, basis: LazyBasis, count: jax.Array) -> LazyBasis:
        def compute(matrix: jax.Array, previous: LazyBasis, words: jax.Array) -> LazyBasis:
            start = previous.codes.decode(jnp.float32)
            found = low_rank.find_subspace(
                matrix, start, projection.axis, projection.rank, method, words, previous.searches == 0
            )
            vector = found[:, 0]
            lengths = jnp.sqrt(low_rank.square_sum(vector, 0) * low_rank.square_sum(previous.vector, 0))
            cosine = jnp.abs(jnp.sum(vector * previous.vector)) / jnp.maximum(lengths, 1e-8)
            shifted = jnp.concatenate([previous.similarity[1:], cosine])
            similarity = jnp.where(previous.searches > 0, shifted, previous.similarity)
            grows = (previous.searches >= window) & (jnp.mean(similarity) >= threshold)
            gap = jnp.minimum(previous.gap * jnp.where(grows, gap_growth, 1), MAX_GAP)
            return LazyBasis(coder.encode(found, axes=(-2, -1)), vector, similarity, previous.searches + 1, gap)

        shift = low_rank.offsets(projection, update_gap, stagger)
        words = low_rank.matrix_words(projection, seed, basis.searches)
        return low_rank.refresh(tables.is_due(count, basis.gap, shift), compute, matrices, basis, words)

    def update(updates: Any, state: QGaLoreState, params: Any = None) -> tuple[Any, QGaLoreState]:
        projected = plan(updates)

        def down(projection: Projection | None, leaf: jax.Array, basis: Any) -> tuple[Any, Any]:
            if projection is None:
                return leaf, basis
            matrices = as_matrices(leaf, projection.spec)
            basis = search(projection, matrices, basis, state.count)
            return low_rank.project(matrices, basis.codes.decode(leaf.dtype), projection.axis), basis

        def up(projection: Projection | None, leaf: jax.Array, basis: Any, scaled: jax.Array) -> tuple[jax.Array]:
            if projection is None:
                return (scaled.astype(leaf.dtype),)
            decoded = basis.codes.decode(leaf.dtype)
            back = low_rank.project_back(scale * scaled, decoded, projection.axis, leaf.dtype)
            return (from_matrices(back, projection.spec, leaf.shape),)

        coordinates, basis = low_rank.map_leaves(down, 2, projected, updates, state.basis)
        scaled, inner_state = inner.update(coordinates, state.inner)
        (updates,) = low_rank.map_leaves(up, 1, projected, updates, basis, scaled)
        return updates, QGaLoreState(optax.safe_increment(state.count), basis, inner_state)

    return optax.GradientTransformation(init, update)


def packed_zeros(codec: Codec, projection: Projection, path: str) -> Packed:
    """Returns bases of zeros ``[B, s, r]`` in the codec.

    Raises:
      ValueError: groups that do not divide a basis, naming ``path``.
    """
    batch, *one = projection.basis_shape
    # XLA would fold the encoding of a known matrix for seconds.
    matrix = jax.lax.optimization_barrier(jnp.zeros((1, *one), jnp.float32))
    try:
        packed = codec.encode(matrix, axes=(-2, -1))
    except ValueError as error:
        raise ValueError(
            f"{path}: the codec does not fit its bases of shape {projection.basis_shape}: {error}"
        ) from None
    return jax.tree.map(lambda part: jnp.broadcast_to(part, (batch, *part.shape[1:])), packed)


def q_galore(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    rank: int | float = 128,
    update_gap: int = 200,
    scale: Any = 0.25,
    *,
    codec: Codec | None = None,
    threshold: Any = 0.4,
    window: int = 5,
    gap_growth: int = 2,
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
    """Returns Q-GaLore with decoupled weight decay.

    Args:
      learning_rate: a number or schedule.
      weight_decay, mask: as in `optax.adamw`.
      rank, update_gap, scale, codec, threshold, window, gap_growth, b1, b2, eps, inner, side, method, stagger, seed,
        rules, axes: as in `scale_by_q_galore`.
    """
    return optax.chain(
        scale_by_q_galore(
            rank, update_gap, scale, codec=codec, threshold=threshold, window=window, gap_growth=gap_growth, b1=b1,
            b2=b2, eps=eps, inner=inner, side=side, method=method, stagger=stagger, seed=seed, rules=rules, axes=axes,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def q_galore_state_bytes(
    params: Any,
    rank: int | float = 128,
    *,
    codec: Codec | None = None,
    window: int = 5,
    side: Side = "short",
    rules: Mapping[str, Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> int:
    """Returns the bytes of Q-GaLore's state with Adam inside.

    Per matrix ``r (s c / 8 + 8 l) + 4 s + 4 window + 8`` with c the codec's bits per number, 8 per number of other
    leaves, 8 for two step counters.

    Args:
      params: pytree of arrays or abstract arrays.
      rank, codec, window, side, rules, axes: as in `scale_by_q_galore`.
    """
    coder = int4(256, symmetric=False) if codec is None else codec

    def leaf_bytes(projection: Projection | None, leaf: Any) -> tuple[int]:
        if projection is None:
            return (8 * math.prod(leaf.shape),)
        short, long, size = projection.projected, projection.kept, projection.rank
        group = short * size if isinstance(coder.group, str) else coder.group
        codes = round(size * short * coder.bits_per_element(group) / 8)
        return (projection.matrices * (codes + 8 * size * long + 4 * short + 4 * window + 8),)

    (sizes,) = low_rank.map_leaves(leaf_bytes, 1, low_rank.projections(params, rank, side, rules, axes), params)
    return 8 + sum(jax.tree.leaves(sizes))
