"""VeRA: two random matrices shared by all weights, and trained vectors that scale their rows and columns.

y = x W + b * ((d * (dropout(x) A)) B) with A [d_in, r] and B [r, d_out] frozen; d and b are trained.
Source: VeRA: Vector-based Random Matrix Adaptation, 2023.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import (
    METHODS,
    Adapter,
    AdapterBytes,
    Constants,
    Theta,
    adapted,
    axes_table,
    check_vector,
    float_dtype,
)
from memjax.core.files import replacing
from memjax.core.random_bits import random_bits, uniform
from memjax.core.views import Axes, WeightView
from memjax.weights import Delta, LowRank
from memjax.weights.adapted import drop
from memjax.weights.dense import product

SHARED_FILE = "shared.safetensors"


@dataclass(frozen=True, eq=False)
class Given:
    """Shared matrices that are stored; compared by identity, so that it can be static metadata of a view.

    Attributes:
      a: ``[d_in or more, r]``.
      b: ``[r, d_out or more]``.
    """

    a: np.ndarray
    b: np.ndarray

    def draw_a(self, d_in: int) -> jax.Array:
        return jnp.asarray(self.a)[:d_in]

    def draw_b(self, d_out: int) -> jax.Array:
        return jnp.asarray(self.b)[:, :d_out]


@dataclass(frozen=True)
class Drawn:
    """Shared matrices that are drawn from a seed wherever they are used, and stored nowhere.

    The first rows of A, and the first columns of B, are the same for every size. Entries are uniform within
    sqrt(6 / widest) in A, and sqrt(6 / r) in B.

    Attributes:
      seed: integer.
      rank: r.
      widest: the largest d_in of the adapted weights.
    """

    seed: int
    rank: int
    widest: int

    def draw_a(self, d_in: int) -> jax.Array:
        return _uniform(2 * self.seed, (d_in, self.rank), math.sqrt(6 / self.widest))

    def draw_b(self, d_out: int) -> jax.Array:
        return _uniform(2 * self.seed + 1, (d_out, self.rank), math.sqrt(6 / self.rank)).T


def _uniform(seed: int, shape: tuple[int, int], bound: float) -> jax.Array:
    return (2 * uniform(random_bits(seed, shape)) - 1) * np.float32(bound)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["d", "b", "key"],
    meta_fields=["shared", "inputs", "d_out", "dropout"],
)
@dataclass(frozen=True)
class SharedLowRank(Delta):
    """``A diag(d) B diag(b)`` with A and B shared by all weights and layers, and so no leaves that a stack slices.

    Forward products keep x A ``[T, r]`` for reverse mode, and neither x, nor A, B or their product.

    Attributes:
      d: ``[*batch, r]``.
      b: ``[*batch, *outputs]``.
      shared: where A and B come from.
      inputs, d_out: sizes of the whole weight, for which A and B are drawn.
      dropout: probability with which an input element is dropped in forward products, if there is a key.
      key: uint32 ``[*batch, 2]`` key words, or None for no dropout.
    """

    d: jax.Array
    b: jax.Array
    shared: Given | Drawn
    inputs: tuple[int, ...]
    d_out: int
    dropout: float
    key: jax.Array | None

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        if transpose:
            return self._low_rank(axes).dot(x, axes, transpose=True, dtype=dtype, **settings)
        batch_ndim = self.d.ndim - 1
        if self.key is not None and self.dropout:
            x = drop(x, self.key, self.dropout, batch_ndim)
        lead, outputs = x.shape[: x.ndim - len(axes.inputs)], self.b.shape[batch_ndim:]
        self._check(x.shape[len(lead) :], outputs)

        def down(x: jax.Array) -> jax.Array:
            a = self.shared.draw_a(math.prod(self.inputs)).astype(dtype)
            return product(x, a, contract=(-2,), batch_ndim=0, precision=settings.get("precision"))

        def up(h: jax.Array, d: jax.Array, b: jax.Array) -> jax.Array:
            b_shared = self.shared.draw_b(self.d_out).astype(dtype)
            y = product((h * d).astype(dtype), b_shared, contract=(-2,), batch_ndim=0, **settings)
            return (y * b).astype(y.dtype)

        rows = tuple(range(batch_ndim, len(lead)))
        h = jax.checkpoint(down)(x.reshape(*lead, -1))
        flat_b = self.b.reshape(*self.b.shape[:batch_ndim], -1)
        y = jax.checkpoint(up)(h, jnp.expand_dims(self.d, rows), jnp.expand_dims(flat_b, rows))
        return y.reshape(*lead, *outputs)

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        return self._low_rank(axes).take(indices, axes, axis=axis, dtype=dtype)

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        return self._low_rank(axes).conv(x, axes, permutation=permutation, dtype=dtype, params=params)

    def materialize(self, axes: Axes) -> jax.Array:
        return self._low_rank(axes).materialize(axes)

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        batch = spec[: len(spec) - axes.ndim]
        specs: dict[str, Any] = {
            "d": PartitionSpec(*batch, None),
            "b": PartitionSpec(*batch, *(spec[axis] for axis in axes.outputs)),
            "key": None if self.key is None else PartitionSpec(*batch, None),
        }
        return replace(self, **specs)

    def _low_rank(self, axes: Axes) -> LowRank:
        """Returns the delta with factors of its own, for the uses that are rare."""
        batch, rank = self.d.shape[:-1], self.d.shape[-1]
        outputs = self.b.shape[len(batch) :]
        self._check(self.inputs, outputs)
        a = self.shared.draw_a(math.prod(self.inputs)) * self.d[..., None, :]
        b = self.shared.draw_b(self.d_out) * self.b.reshape(*batch, 1, -1)
        return LowRank(a.reshape(*batch, *self.inputs, rank), b.reshape(*batch, rank, *outputs), 1.0)

    def _check(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        if inputs != self.inputs or math.prod(outputs) != self.d_out:
            raise ValueError(
                f"the shared matrices of VeRA belong to the whole weight of {math.prod(self.inputs)} x {self.d_out}; a "
                f"shard of {math.prod(inputs)} x {math.prod(outputs)} inside shard_map cannot use them"
            )


@dataclass(frozen=True)
class Vera(Adapter):
    """A VeRA adapter: settings and the functions that use them. `vera` makes one and describes the fields.

    Trains ``r + d_out`` numbers per matrix. Matrices drawn from a seed are drawn again in every product, by a hash that
    costs less than reading them would, and take no bytes; given ones are stored once, in the adapter, and become
    constants of a compiled program.
    """

    rank: int
    targets: str | Sequence[str]
    seed: int | None
    shared: Given | Drawn | None
    d_initial: float
    dropout: float
    axes: Mapping[str, Any]
    dtype: Any

    method = "vera"

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns vectors such that the adapted weights equal the frozen ones.

        Returns:
          Logical path -> ``{"d": [*batch, r], "b": [*batch, *outputs]}``; b is zero. No constants.
        """
        theta: Theta = {}
        for weight in self.weights(params):
            self._check_fits(weight.path, weight.d_in, weight.d_out)
            theta[weight.path] = {
                "d": jnp.full((*weight.batch, self.rank), self.d_initial, self.dtype),
                "b": jnp.zeros((*weight.batch, *weight.outputs), self.dtype),
            }
        return theta, {}

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) != {"d", "b"}:
            raise ValueError(f"{path}: expected the factors d and b, found {sorted(factors)}")
        d, b = factors["d"], factors["b"]
        check_vector(path, base, "b", b, base.axes.outputs)
        wanted = (*base.shape[: base.batch_ndim], self.rank)
        if tuple(d.shape) != wanted:
            raise ValueError(f"{path}: expected d of shape {wanted}, got {tuple(d.shape)}")
        inputs = tuple(base.shape[axis] for axis in base.axes.inputs)
        d_out = math.prod(base.shape[axis] for axis in base.axes.outputs)
        self._check_fits(path, math.prod(inputs), d_out)
        assert self.shared is not None  # `attach` fills it in
        words = key if self.dropout else None
        return adapted(base, SharedLowRank(d, b, self.shared, inputs, d_out, self.dropout, words))

    def attach(self, frozen: Any, theta: Theta, key: jax.Array | None = None) -> Any:
        """As `Adapter.attach`."""
        if self.seed is None:
            return super().attach(frozen, theta, key)
        widest = max(weight.d_in for weight in self.weights(frozen))
        drawing = replace(self, seed=None, shared=Drawn(self.seed, self.rank, widest))
        return drawing.attach(frozen, theta, key)

    def nbytes(self, params: Any) -> AdapterBytes:
        """As `Adapter.nbytes`; given matrices count once as constants."""
        given = 0 if not isinstance(self.shared, Given) else self.shared.a.nbytes + self.shared.b.nbytes
        return super().nbytes(params)._replace(constants=given)

    def settings(self) -> dict[str, Any]:
        settings = super(Vera, replace(self, shared=None)).settings()
        del settings["shared"]
        return settings

    def save(self, folder: str | os.PathLike[str], theta: Theta, frozen: Any = None) -> None:
        """As `Adapter.save`; given matrices are written to ``shared.safetensors``."""
        from safetensors.numpy import save_file

        super().save(folder, theta, frozen)
        if isinstance(self.shared, Given):
            with replacing(Path(folder) / SHARED_FILE) as file:
                save_file({"a": np.ascontiguousarray(self.shared.a), "b": np.ascontiguousarray(self.shared.b)}, file)

    def restored(self, folder: Path) -> Vera:
        if self.seed is not None:
            return self
        from safetensors.numpy import load_file

        stored = load_file(folder / SHARED_FILE)
        return replace(self, shared=Given(stored["a"], stored["b"]))

    def _check_fits(self, path: str, d_in: int, d_out: int) -> None:
        if isinstance(self.shared, Given):
            rows, columns = self.shared.a.shape[0], self.shared.b.shape[1]
            if d_in > rows or d_out > columns:
                raise ValueError(
                    f"{path}: the shared matrices are for weights of at most {rows} x {columns}, this one is "
                    f"{d_in} x {d_out}"
                )


def vera(
    rank: int = 256,
    *,
    targets: str | Sequence[str] = "**/kernel",
    seed: int = 0,
    shared: tuple[Any, Any] | None = None,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Vera:
    """Returns a VeRA adapter.

    Args:
      rank: r.
      targets: pattern(s) of the weights to adapt.
      seed: of the shared matrices, at most 2**62.
      shared: concrete arrays A ``[d_in or more, r]`` and B ``[r, d_out or more]`` in place of those of the seed;
        weights use the leading rows of A and the leading columns of B.
      d_initial: start of d.
      dropout: probability with which an input element of the delta is dropped, where attach gets a key.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.
      dtype: of the vectors.

    Raises:
      ValueError: settings out of range, shared matrices that do not fit the rank; names the setting.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not isinstance(seed, int) or not 0 <= seed <= 2**62:
        raise ValueError(f"seed must be an integer in [0, 2**62], got {seed!r}")
    table, dtype = axes_table(axes), float_dtype(dtype)
    if shared is None:
        return Vera(rank, targets, seed, None, d_initial, dropout, table, dtype)
    a, b = map(np.asarray, shared)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != rank or b.shape[0] != rank:
        raise ValueError(f"shared must be arrays [d_in, {rank}] and [{rank}, d_out], got {a.shape} and {b.shape}")
    return Vera(rank, targets, None, Given(a, b), d_initial, dropout, table, dtype)


def _restore(*, seed: int | None, **settings: Any) -> Vera:
    adapter = vera(**settings) if seed is None else vera(seed=seed, **settings)
    return replace(adapter, seed=seed)


METHODS["vera"] = _restore
