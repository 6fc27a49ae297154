"""EScAIP: The Importance of Being Scalable: Improving the Speed and Accuracy of Neural Network Interatomic Potentials
Across Chemical Domains (2024).

Attention among the neighbours of each atom, made of plain operations: training on forces needs gradients of gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def neighbour_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    *,
    directions: jax.Array | None = None,
    angle: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Returns N attentions, each among the neighbours of an atom, differentiable any number of times.

    Reverse mode keeps the arguments and computes the ``4 N heads M ** 2`` bytes of weights again. The bias of angles is
    three more channels of queries and keys: no table of it is built.

    Args:
      q, k: ``[N, M, heads, Dqk]``.
      v: ``[N, M, heads, Dv]``, finite where padded too.
      valid: bool ``[N, M]``, false for padding, whose result is 0 and which has no gradient.
      directions: ``[N, M, 3]``, unit vectors to the neighbours.
      angle: ``[heads]``, by which cosines of the angles between neighbours are multiplied and added to scores; the
        authors begin with ones.
      scale: of the products; None takes ``Dqk ** -0.5``.

    Returns:
      ``[N, M, heads, Dv]`` in the dtype of ``q``.

    Raises:
      ValueError: one of ``directions`` and ``angle`` without the other, or shapes that do not fit.
    """
    if (directions is None) != (angle is None):
        raise ValueError("neighbour_attention: directions and angle come together")
    if q.shape != k.shape or v.shape[:3] != q.shape[:3] or valid.shape != q.shape[:2]:
        shapes = [x.shape for x in (q, k, v, valid)]
        raise ValueError(f"neighbour_attention: expected q, k, v [N, M, heads, D] and valid [N, M], got {shapes}")
    q_wide = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if directions is not None and angle is not None:
        towards = jnp.broadcast_to(directions[:, :, None], (*q.shape[:3], 3)).astype(q.dtype)
        q_wide = jnp.concatenate([q_wide, angle[:, None].astype(q.dtype) * towards], axis=-1)
        k = jnp.concatenate([k, towards], axis=-1)
    return _among(q_wide, k, v, valid)


@jax.checkpoint
def _among(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=wide)
    pair = valid[:, None, :, None] & valid[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(pair, scores, jnp.finfo(wide).min), axis=-1)
    weights = jnp.where(pair, weights, 0).astype(v.dtype)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v, preferred_element_type=wide).astype(q.dtype)


def frequency_embedding(x: jax.Array, directions: jax.Array, degrees: Sequence[int] = (20, 10, 4, 10, 20)) -> jax.Array:
    """Returns channels of degree l times the 2 l + 1 spherical harmonics of a direction.

    Products of two such embeddings are those of their channels times Legendre polynomials of the cosine of the angle,
    so that they do not change where all directions are rotated.

    Args:
      x: ``[N, M, heads, sum(degrees)]``, queries or keys.
      directions: ``[N, M, 3]``, unit vectors.
      degrees: how many channels there are of each degree, from 0 on.

    Returns:
      ``[N, M, heads, sum of degrees[l] * (2 l + 1)]`` in the dtype of ``x``.

    Raises:
      ValueError: another number of channels.
    """
    if x.shape[-1] != sum(degrees):
        raise ValueError(f"frequency_embedding: expected {sum(degrees)} channels for degrees {degrees}, got {x.shape}")
    harmonics = spherical_harmonics(directions, len(degrees) - 1)
    parts, start = [], 0
    for n, y in zip(degrees, harmonics):
        part = x[..., start : start + n, None] * y[:, :, None, None, :].astype(x.dtype)
        parts.append(part.reshape(*x.shape[:3], -1))
        start += n
    return jnp.concatenate(parts, axis=-1)


def spherical_harmonics(directions: jax.Array, degree: int) -> list[jax.Array]:
    """Returns the real spherical harmonics of degrees 0 to ``degree``, each degree of norm 1.

    They are polynomials of the three components, which have derivatives of any order.

    Args:
      directions: ``[..., 3]``, unit vectors.
      degree: the highest.

    Returns:
      ``[..., 2 l + 1]`` for each l.
    """
    x, y, z = (directions[..., i] for i in range(3))
    cosines, sines = [jnp.ones_like(x)], [jnp.zeros_like(x)]  # of m times the longitude, times sin(latitude angle) ** m
    for _ in range(degree):
        cosines, sines = [*cosines, x * cosines[-1] - y * sines[-1]], [*sines, x * sines[-1] + y * cosines[-1]]

    @functools.cache
    def legendre(n: int, m: int) -> jax.Array:
        if n == m:
            return jnp.full_like(z, math.prod(range(1, 2 * m, 2)))
        below = (n + m - 1) * legendre(n - 2, m) if n > m + 1 else 0
        return ((2 * n - 1) * z * legendre(n - 1, m) - below) / (n - m)

    found = []
    for n in range(degree + 1):
        norm = [math.sqrt((1 if m == 0 else 2) * math.factorial(n - m) / math.factorial(n + m)) for m in range(n + 1)]
        of_sines = [norm[m] * legendre(n, m) * sines[m] for m in range(n, 0, -1)]
        found.append(jnp.stack([*of_sines, *(norm[m] * legendre(n, m) * cosines[m] for m in range(n + 1))], axis=-1))
    return found
