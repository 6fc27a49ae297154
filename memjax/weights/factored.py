"""A weight as the product of two small factors: low-rank transformers of "Greenformers" (2021).

`factorize` finds the factors by singular values, by (semi-)nonnegative factorization (Lee and Seung 2001; Ding, Li and
Jordan 2010), or draws them at random to be trained from scratch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from memjax.core.paths import Patterns, map_with_path, select
from memjax.core.views import Axes, WeightView
from memjax.weights.adapted import LowRank
from memjax.weights.decoded import to_matrix
from memjax.weights.quantize import AxesTable, axes_of, check_dense, check_table

Solver = Literal["svd", "random", "nmf", "snmf"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["u", "v"], meta_fields=["axes", "dense_dtype"])
@dataclass(frozen=True)
class Factored(WeightView):
    """``u @ v``, never formed; both factors may be trained.

    Bytes: ``batch * r * (K + N)`` elements, with K and N the products of the input and output sizes.

    Attributes:
      u: ``[*batch, *inputs, r]``.
      v: ``[*batch, r, *outputs]``.
      axes: input and output axes.
      dense_dtype: dtype of the weight that the factors stand for.
    """

    u: jax.Array
    v: jax.Array
    axes: Axes
    dense_dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        inputs, outputs = len(self.axes.inputs), len(self.axes.outputs)
        batch = self.u.ndim - inputs - 1
        sizes = (*self.u.shape[batch:-1], *self.v.shape[self.v.ndim - outputs :])
        stored = (*self.axes.inputs, *self.axes.outputs)
        return (*self.u.shape[:batch], *(sizes[stored.index(axis)] for axis in range(-len(stored), 0)))

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dense_dtype)

    @property
    def _product(self) -> LowRank:
        return LowRank(self.u, self.v, 1.0)

    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        settings = {"precision": precision, "preferred_element_type": preferred_element_type}
        return self._product.dot(x, self.axes, transpose=transpose, dtype=self._dtype(casts), **settings)

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        return self._product.take(indices, self.axes, axis=axis, dtype=self._dtype(casts))

    def conv(
        self, x: jax.Array, *, permutation: tuple[int, ...], casts: tuple[Any, ...], params: dict[str, Any]
    ) -> jax.Array:
        dtype = self._dtype(casts)
        return self._product.conv(x, self.axes, permutation=permutation, dtype=dtype, params=params)

    def _dtype(self, casts: tuple[Any, ...]) -> Any:
        return jnp.dtype(casts[-1]) if casts else self.dtype

    def materialize(self) -> jax.Array:
        return self._product.materialize(self.axes).astype(self.dtype)

    def astype(self, dtype: Any) -> Factored:
        return replace(self, dense_dtype=jnp.dtype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        factors = self._product.specs(spec, self.axes)
        return replace(self, u=factors.a, v=factors.b)

    def check(self) -> None:
        """Raises a ValueError for factors that do not fit each other."""
        batch = self.u.ndim - len(self.axes.inputs) - 1
        if self.v.ndim != batch + 1 + len(self.axes.outputs) or self.u.shape[:batch] != self.v.shape[:batch]:
            raise ValueError(f"factors of shapes {self.u.shape} and {self.v.shape} do not fit {self.axes}")
        if self.u.shape[-1] != self.v.shape[batch]:
            raise ValueError(f"factors of ranks {self.u.shape[-1]} and {self.v.shape[batch]}")


def rank_limit(k: int, n: int) -> int:
    """Returns floor(K N / (K + N)): factors of this rank or more save nothing."""
    return k * n // (k + n)


def factorize(
    params: Any,
    rank: int | float | None = None,
    *,
    energy: float | None = None,
    where: Patterns = "**/kernel",
    solver: Solver = "svd",
    axes: AxesTable | None = None,
    key: jax.Array | None = None,
    iterations: int = 100,
) -> Any:
    """Returns ``params`` with the selected weights as products of two factors.

    A weight whose rank would be 0, or `rank_limit` or more, saves nothing and stays dense.

    Args:
      params: any pytree of arrays; a stack of weights gets factors of one rank.
      rank: a number of columns, or below 1 a fraction of `rank_limit`.
      energy: in place of ``rank``: the least rank whose squared singular values sum to this fraction of all; over a
        stack the largest such rank.
      where: pattern(s) over logical paths, or a predicate of (path, leaf).
      solver: ``"svd"`` for the best approximation (u takes the singular values), ``"random"`` for factors to be trained
        from scratch whose product has the variance 1 / K, ``"nmf"`` for nonnegative u and v of a nonnegative weight,
        ``"snmf"`` for nonnegative v.
      axes: pattern -> input and output axes, for weights that are not ``[*batch, in, out]``.
      key: random key; needed by every solver but ``"svd"``.
      iterations: of ``"nmf"`` and ``"snmf"``.

    Raises:
      ValueError: not one of ``rank`` and ``energy``, values out of range, a missing key, a weight that is not finite
        or, for ``"nmf"``, negative somewhere, or no weight that the rank makes smaller.
      TypeError: a selected leaf that is a view already or not floating point.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"expected either a rank or an energy, got rank={rank} and energy={energy}")
    if rank is not None and not rank > 0:
        raise ValueError(f"rank must be a positive number of columns or a fraction below 1, got {rank}")
    if rank is not None and rank >= 1 and rank != int(rank):
        raise ValueError(f"a rank of 1 or more must be whole, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if solver not in _SOLVERS:
        raise ValueError(f"expected a solver among {', '.join(_SOLVERS)}, got {solver!r}")
    if solver != "svd" and key is None:
        raise ValueError(f"solver {solver!r} starts from random factors: give key=")
    chosen = select(params, where)
    check_table(params, axes)
    done = []

    def factor(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        check_dense(path, leaf)
        leaf_axes = axes_of(path, leaf.shape, axes)
        w = to_matrix(leaf, leaf_axes).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        if solver == "nmf" and bool((w < 0).any()):
            raise ValueError(f"{path}: nmf needs a weight without negative elements; use snmf or svd")
        *batch, k, n = w.shape
        limit = rank_limit(k, n)
        if energy is not None:
            r = _rank_of(w, energy)
        else:
            assert rank is not None
            r = int(rank * limit) if rank < 1 else int(rank)
        if not 0 < r < limit:
            return leaf
        leaf_key = None if key is None else jax.random.fold_in(key, chosen.index(path))
        u, v = solve(w, r, solver, leaf_key, iterations)
        inputs, outputs = (tuple(leaf.shape[axis] for axis in group) for group in leaf_axes)
        done.append(path)
        u, v = u.reshape(*batch, *inputs, r).astype(leaf.dtype), v.reshape(*batch, r, *outputs).astype(leaf.dtype)
        return Factored(u, v, leaf_axes, jnp.dtype(leaf.dtype))

    result = map_with_path(factor, params)
    if not done:
        asked = f"rank {rank}" if energy is None else f"energy {energy}"
        raise ValueError(f"{asked} makes none of the selected weights smaller: {', '.join(chosen[:12])}")
    return result


def _rank_of(w: jax.Array, energy: float) -> int:
    squares = jnp.cumsum(jnp.linalg.svd(w, compute_uv=False) ** 2, -1)
    return int(jnp.max(jnp.sum(squares < energy * squares[..., -1:], -1))) + 1


def solve(
    w: jax.Array, rank: int, solver: Solver, key: jax.Array | None = None, iterations: int = 100
) -> tuple[jax.Array, jax.Array]:
    """Returns factors ``[*batch, K, r]``, ``[*batch, r, N]`` of ``w [*batch, K, N]``; arguments as in `factorize`."""
    with jax.default_matmul_precision("highest"):
        return _SOLVERS[solver](w, rank, key, iterations)


@functools.partial(jax.jit, static_argnums=1)
def _svd(w: jax.Array, rank: int, key: None, iterations: int) -> tuple[jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return u[..., :rank] * s[..., None, :rank], v[..., :rank, :]


def _random(w: jax.Array, rank: int, key: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    *batch, k, n = w.shape
    first, second = jax.random.split(key)
    u = jax.random.normal(first, (*batch, k, rank), w.dtype) / math.sqrt(k)
    return u, jax.random.normal(second, (*batch, rank, n), w.dtype) / math.sqrt(rank)


def _start(w: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns positive factors whose product has the size of ``w``."""
    *batch, k, n = w.shape
    size = jnp.sqrt(jnp.mean(jnp.abs(w), (-2, -1), keepdims=True) / rank)
    first, second = jax.random.split(key)
    draw = functools.partial(jax.random.uniform, dtype=w.dtype, minval=0.2, maxval=1.0)
    return draw(first, (*batch, k, rank)) * size, draw(second, (*batch, rank, n)) * size


_TINY = 1e-12


@functools.partial(jax.jit, static_argnums=1)
def _nmf(w: jax.Array, rank: int, key: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    def step(_: int, factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, v = factors
        vt = v.mT
        u = u * (w @ vt) / (u @ (v @ vt) + _TINY)
        ut = u.mT
        return u, v * (ut @ w) / ((ut @ u) @ v + _TINY)

    return lax.fori_loop(0, iterations, step, _start(w, rank, key))


@functools.partial(jax.jit, static_argnums=1)
def _snmf(w: jax.Array, rank: int, key: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    def free(v: jax.Array) -> jax.Array:
        """Returns the best u for a given v."""
        gram = v @ v.mT
        ridge = 1e-6 * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] * jnp.eye(rank, dtype=w.dtype)
        return jnp.linalg.solve(gram + ridge, v @ w.mT).mT

    def step(_: int, v: jax.Array) -> jax.Array:
        u = free(v)
        along, gram = u.mT @ w, u.mT @ u
        up = jnp.maximum(along, 0) + jnp.maximum(-gram, 0) @ v
        down = jnp.maximum(-along, 0) + jnp.maximum(gram, 0) @ v
        return v * jnp.sqrt(up / (down + _TINY))

    v = lax.fori_loop(0, iterations, step, _start(w, rank, key)[1])
    return free(v), v


_SOLVERS: dict[str, Any] = {"svd": _svd, "random": _random, "nmf": _nmf, "snmf": _snmf}
