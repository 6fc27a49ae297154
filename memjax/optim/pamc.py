"""The PamC loss: contrastive graph clustering whose negatives are clusters, not nodes.

Source: Kulatilleke, Portmann and Chandra, "Efficient Block Contrastive Learning via Parameter-Free Meta-Node
Approximation", 2022. The all-pairs loss takes O(N^2); this one takes O(E + K^2) for E edges and K clusters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def soft_assignment(z: jax.Array, centers: jax.Array) -> jax.Array:
    """Returns how much each node belongs to each cluster, by Student's t with one degree of freedom.

    Args:
      z: float ``[N, D]``.
      centers: float ``[K, D]``.

    Returns:
      ``[N, K]``, rows sum to 1.
    """
    # By the differences: squares and a product would lose the distance of a node that is near its center.
    distances = jax.lax.map(lambda center: jnp.sum((z - center) ** 2, axis=1), centers).T
    q = 1 / (1 + distances)
    return q / jnp.sum(q, axis=1, keepdims=True)


def sharpened(q: jax.Array) -> jax.Array:
    """Returns the target of the assignment ``q [N, K]``: squared, evened out over clusters; without gradient."""
    q = jax.lax.stop_gradient(q)
    weight = q**2 / jnp.sum(q, axis=0)
    return weight / jnp.sum(weight, axis=1, keepdims=True)


def meta_nodes(z: jax.Array, q: jax.Array) -> jax.Array:
    """Returns the sum of the nodes of each cluster ``[K, D]``, each node in the cluster of its largest ``q [N, K]``."""
    clusters = jnp.argmax(jax.lax.stop_gradient(q), axis=1)
    return jax.ops.segment_sum(z, clusters, num_segments=q.shape[1])


def pamc_contrast(
    z: jax.Array, q: jax.Array, edges: jax.Array, edge_weights: jax.Array, tau: float, *, eps: float = 1e-10
) -> jax.Array:
    """Returns the contrastive part of the PamC loss.

    With positives ``pos_i = sum over edges (i, j) of weight * exp(tau * cos(z_i, z_j))`` and negatives
    ``neg_k = sum over clusters l of exp(tau * cos(M_k, M_l))`` of the meta-nodes M, where cosines of a node or a
    meta-node with itself count as 0, it is ``mean_k log(neg_k + eps) - mean_i log(pos_i + eps)``.

    Args:
      z: float ``[N, D]``.
      q: float ``[N, K]``, cluster assignment; it only chooses clusters and gets no gradient.
      edges: int ``[2, E]``, from and to; of powers of a normalised adjacency, say.
      edge_weights: float ``[E]``.
      tau: multiplies cosines.
      eps: inside logarithms.

    Raises:
      ValueError: shapes that do not fit.
    """
    if z.ndim != 2 or q.ndim != 2 or len(q) != len(z):
        raise ValueError(f"expected z [N, D] and q [N, K], got {z.shape} and {q.shape}")
    if edges.ndim != 2 or len(edges) != 2 or edge_weights.shape != edges.shape[1:]:
        raise ValueError(f"expected edges [2, E] and edge_weights [E], got {edges.shape} and {edge_weights.shape}")
    unit = _unit(z)
    source, target = edges
    cosine = jnp.where(source == target, 0, jnp.sum(unit[source] * unit[target], axis=1))
    positive = jax.ops.segment_sum(edge_weights * jnp.exp(tau * cosine), source, num_segments=len(z))
    meta = _unit(meta_nodes(z, q))
    cosines = (meta @ meta.T) * (1 - jnp.eye(len(meta), dtype=meta.dtype))
    negative = jnp.sum(jnp.exp(tau * cosines), axis=1)
    return jnp.mean(jnp.log(negative + eps)) - jnp.mean(jnp.log(positive + eps))


def pamc_loss(
    z: jax.Array,
    q: jax.Array,
    edges: jax.Array,
    edge_weights: jax.Array,
    *,
    tau: float,
    alpha: float = 1.0,
    beta: float = 1.0,
    target: jax.Array | None = None,
) -> jax.Array:
    """Returns ``beta * KL(target || q) + alpha * contrast``, a scalar, the divergence a mean over nodes.

    Args:
      z, edges, edge_weights, tau: as in `pamc_contrast`.
      q: float ``[N, K]`` of `soft_assignment`; gets the gradient of the divergence.
      alpha, beta: weights of the two parts.
      target: ``[N, K]``, made by `sharpened` at the start of an epoch; None makes it of ``q``.

    Raises:
      ValueError: shapes that do not fit.
    """
    target = sharpened(q) if target is None else jax.lax.stop_gradient(target)
    divergence = jnp.sum(jax.scipy.special.xlogy(target, target) - target * jnp.log(q)) / len(q)
    return beta * divergence + alpha * pamc_contrast(z, q, edges, edge_weights, tau)


def _unit(x: jax.Array) -> jax.Array:
    """Returns rows of length one; a row of zeros, such as an empty cluster's, stays so, with gradient 0."""
    squares = jnp.sum(x * x, axis=1, keepdims=True)
    return x * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
