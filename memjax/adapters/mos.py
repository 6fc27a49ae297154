"""MoS: low-rank factors of all layers, put together from shards of shared pools.

Weights of one matrix shape share two pools, one of shards of length d_in / l for A and one of shards of length
d_out / l for B. Each of the r columns of a layer's A is l shards end to end, chosen once at random (subset selection,
vector sharding), and so is each row of B, chosen independently (pair dissociation). The last p columns and rows use
shards that no other layer uses (privatisation). The pools hold as many numbers as LoRA of the equivalent rank e.
Source: MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax.adapters.adapter import (
    METHODS,
    Adapter,
    Constants,
    Theta,
    Weight,
    adapted,
    axes_table,
    float_dtype,
    path_seed,
)
from memjax.adapters.lora import check_factors, check_rank
from memjax.core.paths import leaf_paths
from memjax.core.views import WeightView
from memjax.weights import Anchored, LowRank


@dataclass(frozen=True)
class Mos(Adapter):
    """A MoS adapter: settings and the functions that use them. `mos` makes one and describes the fields.

    Trains ``e (d_in + d_out)`` numbers per matrix, all in pools: theta maps ``"<d_in>x<d_out>"`` to
    ``{"a": [n, d_in / l], "b": [n, d_out / l]}`` with n = e l times the number of matrices of that shape. Keeps
    ``2 r l`` indices per matrix, in the smallest unsigned type that counts to n.
    """

    rank: int
    equivalent_rank: int
    private_rank: int
    shards: int
    alpha: float | None
    sampling: str
    targets: str | Sequence[str]
    axes: Mapping[str, Any]
    dtype: Any

    method = "mos"
    anchored = True

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns pools such that the adapted weights equal the frozen ones (B's pools are zero), and the indices.

        Returns:
          theta: see the class; constants: path -> ``{"a_index", "b_index": [*batch, r, l]}``.

        Raises:
          ValueError: a pattern that matches nothing, ranks or shards that do not fit a leaf.
        """
        classes: dict[str, list[Weight]] = {}
        for weight in self.weights(params):
            check_rank(weight.path, self.rank, weight.d_in, weight.d_out)
            for name, size in (("inputs", weight.d_in), ("outputs", weight.d_out)):
                if size % self.shards:
                    raise ValueError(f"{weight.path}: {size} {name} cannot be cut into {self.shards} equal shards")
            classes.setdefault(_pool_name(weight.d_in, weight.d_out), []).append(weight)
        theta: Theta = {}
        constants: Constants = {}
        for name, weights in classes.items():
            keys = jax.random.split(jax.random.fold_in(key, path_seed(name)), 3)
            counts = [math.prod(weight.batch) for weight in weights]
            n = self.equivalent_rank * self.shards * sum(counts)
            d_in, d_out, bound = weights[0].d_in, weights[0].d_out, weights[0].d_in ** -0.5
            theta[name] = {
                "a": jax.random.uniform(keys[0], (n, d_in // self.shards), self.dtype, -bound, bound),
                "b": jnp.zeros((n, d_out // self.shards), self.dtype),
            }
            a_index, b_index = (self._draw(index_key, sum(counts), n) for index_key in keys[1:])
            at = 0
            for weight, count in zip(weights, counts):
                shape = (*weight.batch, self.rank, self.shards)
                constants[weight.path] = {
                    "a_index": a_index[at : at + count].reshape(shape),
                    "b_index": b_index[at : at + count].reshape(shape),
                }
                at += count
        return theta, constants

    def attach(self, frozen: Any, theta: Theta, key: jax.Array | None = None) -> Any:
        """Returns ``frozen`` with an adapted view at every weight that `prepare` gave indices.

        The factors of every layer are gathered from the pools here, ``r (d_in + d_out)`` numbers per matrix; they
        live as long as the views do. Their gradients are added into the pools.

        Args:
          frozen: the tree of `prepare`.
          theta: the pools.
          key: unused; MoS draws nothing in training.

        Raises:
          ValueError: a tree that was not prepared, pools that do not fit it.
        """
        factors: Theta = {}
        for path, leaf in leaf_paths(frozen):
            if isinstance(leaf, Anchored) and leaf.method == self.method:
                inputs, outputs = (tuple(leaf.shape[axis] for axis in group) for group in leaf.axes)
                name = _pool_name(math.prod(inputs), math.prod(outputs))
                if name not in theta:
                    raise ValueError(f"{path}: theta has no pools {name!r}, it has {sorted(theta)}")
                a = assemble(theta[name]["a"], leaf.constants["a_index"])
                b = assemble(theta[name]["b"], leaf.constants["b_index"])
                if (a.shape[-1], b.shape[-1]) != (math.prod(inputs), math.prod(outputs)):
                    raise ValueError(f"{path}: the shards of pools {name!r} do not add up to {name}")
                batch = leaf.shape[: leaf.base.batch_ndim]
                a = jnp.swapaxes(a, -1, -2).reshape(*batch, *inputs, self.rank)
                factors[path] = {"a": a, "b": b.reshape(*batch, self.rank, *outputs)}
        if not factors:
            raise ValueError(
                "no weight has indices: attach to the tree of frozen, theta = adapter.prepare(key, params)"
            )
        return super().attach(frozen, factors, key)

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        check_factors(path, base, factors["a"], factors["b"])
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return adapted(base, LowRank(factors["a"], factors["b"], scale))

    def _draw(self, key: jax.Array, layers: int, n: int) -> jax.Array:
        """Returns the indices of all layers of a class, ``[layers, r, l]``."""
        l, p = self.shards, self.private_rank
        public = (self.equivalent_rank - p) * l * layers
        vectors = layers * (self.rank - p)
        if not vectors:
            chosen = jnp.zeros((layers, 0, l), jnp.int32)
        elif self.sampling == "balanced":
            keys = jax.random.split(key, -(-vectors * l // public))
            rounds = jax.vmap(lambda k: jax.random.permutation(k, public))(keys)
            chosen = rounds.reshape(-1)[: vectors * l].reshape(layers, self.rank - p, l)
        else:
            keys = jax.random.split(key, vectors)
            chosen = lax.map(lambda k: jax.random.choice(k, public, (l,), replace=False), keys)
            chosen = chosen.reshape(layers, self.rank - p, l)
        private = public + jnp.arange(layers * p * l).reshape(layers, p, l)
        dtype = jnp.uint8 if n <= 2**8 else jnp.uint16 if n <= 2**16 else jnp.uint32
        return jnp.concatenate([chosen, private], axis=1).astype(dtype)


def mos(
    rank: int = 16,
    equivalent_rank: int = 4,
    private_rank: int = 1,
    shards: int = 4,
    alpha: float | None = None,
    *,
    sampling: str = "balanced",
    targets: str | Sequence[str] = "**/kernel",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Mos:
    """Returns a MoS adapter.

    Args:
      rank: r, of the factors that are put together.
      equivalent_rank: e, of the LoRA that trains as many numbers; at most r.
      private_rank: p, how many of the r columns no other layer shares; at most e, and below e where r > p.
      shards: l, shards per column.
      alpha: numerator of the scale alpha / r; None means a scale of 1.
      sampling: ``"balanced"``: every public shard is used equally often, give or take one; ``"uniform"``: the l shards
        of a vector are drawn without replacement, vectors independently.
      targets: pattern(s) of the weights to adapt.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.
      dtype: of the pools.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    for name, value, low in (
        ("rank", rank, 1),
        ("equivalent_rank", equivalent_rank, 1),
        ("private_rank", private_rank, 0),
        ("shards", shards, 1),
    ):
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    if not private_rank <= equivalent_rank <= rank:
        raise ValueError(
            f"expected private_rank <= equivalent_rank <= rank, got {private_rank}, {equivalent_rank}, {rank}"
        )
    if private_rank == equivalent_rank < rank:
        raise ValueError(
            f"private_rank {private_rank} leaves no public shards for the other {rank - private_rank} ranks"
        )
    if sampling not in ("balanced", "uniform"):
        raise ValueError(f"sampling must be 'balanced' or 'uniform', got {sampling!r}")
    return Mos(
        rank,
        equivalent_rank,
        private_rank,
        shards,
        alpha,
        sampling,
        targets,
        axes_table(axes),
        float_dtype(dtype),
    )


METHODS["mos"] = mos


def assemble(pool: jax.Array, index: jax.Array) -> jax.Array:
    """Returns vectors made of shards end to end.

    Args:
      pool: ``[n, length]``.
      index: integers ``[..., r, l]``, in range.

    Returns:
      ``[..., r, l * length]``.
    """
    vectors = jnp.take(pool, index.astype(jnp.int32), axis=0, mode="clip")
    return vectors.reshape(*index.shape[:-1], -1)


def _pool_name(d_in: int, d_out: int) -> str:
    return f"{d_in}x{d_out}"
