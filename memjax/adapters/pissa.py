"""PiSSA: the principal singular components of the weight are trained, the rest is frozen.

W = U S V^T; A = U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r^T, and the frozen residual is W - s A B.
Source: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from memjax.adapters.adapter import METHODS, axes_table, float_dtype
from memjax.adapters.decomposed import Decomposed
from memjax.adapters.lora import lora

OVERSAMPLING = 8
"""Columns that the randomized decomposition draws beyond the rank."""


@dataclass(frozen=True)
class Pissa(Decomposed):
    """A PiSSA adapter: settings and the functions that use them. `pissa` makes one and describes the fields."""

    niter: int | None

    method = "pissa"

    def decompose(self, w: jax.Array, rank: int, scale: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.default_matmul_precision("highest"):
            if self.niter is None:
                u, s, v = jnp.linalg.svd(w, full_matrices=False)
            else:
                u, s, v = _randomized_svd(w, rank, self.niter, key)
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root, root[:, None] * v[:rank]


def pissa(
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    niter: int | None = None,
    dropout: float = 0.0,
    scaling: str = "alpha_over_r",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Pissa:
    """Returns a PiSSA adapter; attach it to the frozen tree that `Pissa.prepare` returns.

    Args:
      rank, alpha, targets, dropout, scaling, axes, dtype: as in `memjax.adapters.lora`.
      niter: None for the exact decomposition, O(d_in d_out min(d_in, d_out)); a number for the randomized one with so
        many subspace iterations, O(d_in d_out r) each (4 is usual).

    Raises:
      ValueError: settings out of range; names the setting.
    """
    if niter is not None and (not isinstance(niter, int) or niter < 0):
        raise ValueError(f"niter must be None or a number of iterations, got {niter!r}")
    lora(rank, alpha, dropout=dropout, scaling=scaling)
    return Pissa(rank, alpha, targets, dropout, scaling, axes_table(axes), float_dtype(dtype), niter)


METHODS["pissa"] = pissa


def _randomized_svd(w: jax.Array, rank: int, niter: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the leading singular triplets from a random subspace, sharpened ``niter`` times (Halko et al., 2011)."""
    columns = min(rank + OVERSAMPLING, *w.shape)
    basis = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], columns), w.dtype))[0]
    for _ in range(niter):
        basis = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ basis)[0])[0]
    u, s, v = jnp.linalg.svd(basis.T @ w, full_matrices=False)
    return basis @ u, s, v
