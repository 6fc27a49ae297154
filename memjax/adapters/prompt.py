"""The prompt module of S2A: trained positions before a sequence, as a product of two small factors.

P = P1 P2 stands before the embedded tokens, or before what every layer takes. It needs no activation of the frozen
weights for its own gradient beyond what attention keeps, and lengthens the sequence by its positions. A prompt changes
the outputs from the start: attention gives a part of its weight to it.
Source: S2A: Unified Framework for Parameter and Memory Efficient Transfer Learning, 2025; the factors and their start
are this module's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from memjax.adapters.adapter import AdapterBytes, Theta, float_dtype
from memjax.core.bytes import nbytes


@dataclass(frozen=True)
class Prompt:
    """A soft prompt; `prompt` makes one and describes the fields. Trains ``r (count + features)`` numbers per layer."""

    count: int
    rank: int
    features: int
    layers: int | None
    dtype: Any

    def init(self, key: jax.Array) -> Theta:
        """Returns ``{"prompt": {"a": [(L,) count, r], "b": [(L,) r, features]}}``: small normal, and uniform."""
        keys = jax.random.split(key)
        batch = () if self.layers is None else (self.layers,)
        bound = 1 / math.sqrt(self.rank)
        a = 0.02 * jax.random.normal(keys[0], (*batch, self.count, self.rank), self.dtype)
        b = jax.random.uniform(keys[1], (*batch, self.rank, self.features), self.dtype, -bound, bound)
        return {"prompt": {"a": a, "b": b}}

    def prefix(self, theta: Theta) -> jax.Array:
        """Returns the prompt ``[(L,) count, features]``, the ``prefix=`` of `memjax.models.Model.hidden`."""
        return jnp.matmul(theta["prompt"]["a"], theta["prompt"]["b"])

    def nbytes(self) -> AdapterBytes:
        """Returns the exact bytes of the trained factors."""
        return AdapterBytes(nbytes(jax.eval_shape(self.init, jax.random.key(0))), 0)


def prompt(count: int, rank: int, features: int, *, layers: int | None = None, dtype: Any = jnp.float32) -> Prompt:
    """Returns a prompt module.

    Args:
      count: positions of the prompt.
      rank: r of its two factors.
      features: width of the model.
      layers: None for one prompt before the first layer; L for a new one before each of the L layers.
      dtype: of the factors.

    Raises:
      ValueError: a rank above both sizes' smaller one, or numbers below 1.
    """
    if min(count, rank, features, 1 if layers is None else layers) < 1 or rank > min(count, features):
        raise ValueError(f"expected 1 <= rank <= min(count, features), got {count=}, {rank=}, {features=}, {layers=}")
    return Prompt(count, rank, features, layers, float_dtype(dtype))


def prepend(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """Puts ``prefix [P, D]`` before every embedded sequence of ``x [*batch, S, D]``, in its dtype."""
    front = jnp.broadcast_to(prefix.astype(x.dtype), (*x.shape[:-2], *prefix.shape))
    return jnp.concatenate([front, x], axis=-2)
