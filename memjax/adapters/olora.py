"""OLoRA: an orthonormal basis of the weight's first rows is trained with its coordinates, the rest is frozen.

W^T = Q R; A = R_r^T, B = Q_r^T, and the frozen residual is W - s A B.
Source: OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024.
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


@dataclass(frozen=True)
class Olora(Decomposed):
    """An OLoRA adapter: settings and the functions that use them. `olora` makes one and describes the fields."""

    method = "olora"

    def decompose(self, w: jax.Array, rank: int, scale: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.default_matmul_precision("highest"):
            q = jnp.linalg.qr(w[:rank].T)[0]  # the first r columns of Q depend on the first r columns of W^T alone
            return w @ q, q.T


def olora(
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    dropout: float = 0.0,
    scaling: str = "alpha_over_r",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Olora:
    """Returns an OLoRA adapter; attach it to the frozen tree that `Olora.prepare` returns.

    Args:
      rank, alpha, targets, dropout, scaling, axes, dtype: as in `memjax.adapters.lora`.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    lora(rank, alpha, dropout=dropout, scaling=scaling)
    return Olora(rank, alpha, targets, dropout, scaling, axes_table(axes), float_dtype(dtype))


METHODS["olora"] = olora
