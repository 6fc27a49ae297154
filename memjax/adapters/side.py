"""The side module of S2A: a narrow ladder beside a frozen model, through which alone gradients flow.

z_0 = 0, z_{l+1} = z_l + up_l(act(down_l(pool(stop_gradient(h_l))))) with h_l what block l gives; the head reads
h_L + z_L. The backbone keeps nothing for a backward pass; the ladder keeps its inputs pool(h_l) and what is as wide as
it is itself.
Source: S2A: Unified Framework for Parameter and Memory Efficient Transfer Learning, 2025, in the manner of LST: Ladder
Side-Tuning, 2022; the form of the block is this module's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax.adapters.adapter import AdapterBytes, Theta, float_dtype
from memjax.core.bytes import nbytes


@dataclass(frozen=True)
class Side:
    """A side network; `side` makes one and describes the fields. Trains ``2 width features`` numbers per layer."""

    width: int
    features: int
    layers: int
    activation: Callable[[jax.Array], jax.Array]
    pool: Callable[[jax.Array], jax.Array] | None
    dtype: Any

    def init(self, key: jax.Array) -> Theta:
        """Returns ``{"side": {"down": [L, D, width], "up": [L, width, D]}}``; ``up`` is zero, so z is."""
        bound = 1 / math.sqrt(self.features)
        down = jax.random.uniform(key, (self.layers, self.features, self.width), self.dtype, -bound, bound)
        return {"side": {"down": down, "up": jnp.zeros((self.layers, self.width, self.features), self.dtype)}}

    def step(self, factors: dict[str, jax.Array], z: jax.Array, h: jax.Array) -> jax.Array:
        """Returns the next z.

        Args:
          factors: ``down`` and ``up`` of one layer.
          z: ``[..., D]``; 0 before the first layer.
          h: what the block gives, ``[..., D]``; gets no gradient.
        """
        h = lax.stop_gradient(h)
        h = h if self.pool is None else self.pool(h)
        y = self.activation(h @ factors["down"].astype(h.dtype)) @ factors["up"].astype(h.dtype)
        return z + y

    def over(self, theta: Theta, hiddens: jax.Array) -> jax.Array:
        """Returns z_L ``[..., D]`` from what every block gave, ``[L, ..., D]``, as `Model.hiddens` collects it."""
        if hiddens.shape[0] != self.layers or hiddens.shape[-1] != self.features:
            raise ValueError(f"expected hidden states [{self.layers}, ..., {self.features}], got {hiddens.shape}")
        return self.run(theta, lambda h, _: h, hiddens, hiddens[0])[1]

    def run(
        self, theta: Theta, block: Callable[[Any, jax.Array], jax.Array], layers: Any, x: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the frozen model and the ladder in one scan.

        Args:
          theta: factors of `init`.
          block: (slice of ``layers``, hidden state) -> hidden state, such as `memjax.models.Stages.block`; it and
            ``layers`` get no gradient.
          layers: pytree of arrays ``[L, ...]``; under `memjax.lift` its weights may be views.
          x: ``[B, S, D]``, what the first block takes.

        Returns:
          (h_L, z_L); the head reads their sum.
        """

        def body(carry: tuple[jax.Array, jax.Array], layer: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            h, z = carry
            h = lax.stop_gradient(block(layer[0], h))
            return (h, self.step(layer[1], z, h)), None

        x = lax.stop_gradient(x)
        pooled = jax.eval_shape(lambda x: x if self.pool is None else self.pool(x), x)
        start = jnp.zeros((*pooled.shape[:-1], self.features), x.dtype)
        return lax.scan(body, (x, start), (layers, theta["side"]))[0]

    def nbytes(self) -> AdapterBytes:
        """Returns the exact bytes of the trained factors."""
        return AdapterBytes(nbytes(jax.eval_shape(self.init, jax.random.key(0))), 0)


def side(
    width: int,
    features: int,
    layers: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
    pool: Callable[[jax.Array], jax.Array] | None = None,
    dtype: Any = jnp.float32,
) -> Side:
    """Returns a side network.

    Args:
      width: of the ladder; d / 8 or d / 16 is usual.
      features: D, width of the model.
      layers: L, its blocks.
      activation: between ``down`` and ``up``.
      pool: of what a block gives ``[..., D]``, over positions for instance (with kept axes, so that z can be added to
        the hidden state); None for nothing. Pooled inputs are what the ladder keeps for its gradients.
      dtype: of the factors; they are cast to the hidden state's in products.

    Raises:
      ValueError: numbers below 1, or a dtype that is not floating point.
    """
    if min(width, features, layers) < 1:
        raise ValueError(f"expected numbers above 0, got {width=}, {features=}, {layers=}")
    return Side(width, features, layers, activation, pool, float_dtype(dtype))
