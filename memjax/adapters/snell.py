"""SNELL and SNELLA: a sparse, high-rank change of the weight, made from two small factors by a kernel.

D[i, j] = c sum_h (-1)^h kernel(P_h[i], Q_h[j]) has a rank far above that of the factors P [H, d_in, k] and Q
[H, d_out, k]; of its entries the largest magnitudes compete for a share ``keep``, the others are zero. D is computed
again wherever it is needed, one tile of output columns at a time: neither D nor which entries it keeps is ever stored.
SNELLA adds a softmax along the outputs before the competition, and a budget of kept entries that moves from layers
whose factors matter little to those whose factors matter much.
Sources: Expanding Sparse Tuning for Low Memory Usage, 2024; Kernelized Sparse Fine-Tuning with Bi-level Parameter
Competition for Vision Models, 2025.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import METHODS, Adapter, Constants, Theta, adapted, axes_table, float_dtype, path_seed
from memjax.core import jaxpr_compat
from memjax.core.paths import leaf_paths, map_with_path
from memjax.core.views import Axes, WeightView
from memjax.weights import Anchored, Delta
from memjax.weights.dense import convolution, in_order, product

Kernel = Callable[[jax.Array, jax.Array], jax.Array]


@jax.custom_jvp
def squared_distances(p: jax.Array, q: jax.Array) -> jax.Array:
    """Returns |p_i - q_j|^2, ``[n, m]``, of points ``[n, k]`` and ``[m, k]``; the derivative is made of products."""
    return jnp.sum(jnp.square(p[:, None, :] - q[None, :, :]), axis=-1)


@squared_distances.defjvp
def _squared_distances_jvp(primals: Any, tangents: Any) -> Any:
    (p, q), (dp, dq) = primals, tangents
    mixed = _inner(dp, q) + _inner(p, dq)
    change = 2 * (jnp.sum(p * dp, -1)[:, None] + jnp.sum(q * dq, -1)[None, :] - mixed)
    return squared_distances(p, q), change


def _inner(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.matmul(p, q.T, precision=lax.Precision.HIGHEST)


def _distances(p: jax.Array, q: jax.Array) -> jax.Array:
    square = squared_distances(p, q)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


KERNELS: dict[str, Kernel] = {
    "pl2": _distances,
    "rbf": lambda p, q: jnp.exp(-squared_distances(p, q)),
    "linear": _inner,
}


class Competition(NamedTuple):
    """The settings of a `Kernelized` delta; hashable, part of the tree structure."""

    kernel: str | Kernel
    scale: float
    dense: bool  # every entry is kept
    released: bool
    threshold: str
    tile: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["p", "q", "count", "gate", "mix"], meta_fields=["settings"]
)
@dataclass(frozen=True)
class Kernelized(Delta):
    """The sparse part of a kernel matrix.

    Attributes:
      p: ``[*batch, H, *inputs, k]``.
      q: ``[*batch, H, *outputs, k]``.
      count: int32 ``[*batch]``, how many entries are kept.
      gate: ``[*batch]`` factor of the delta, or None.
      mix: ``[*batch, 3]`` for SNELLA, the factor a, temperature g and offset b of its softmax; or None.
      settings: the rest.
    """

    p: jax.Array
    q: jax.Array
    count: jax.Array
    gate: jax.Array | None
    mix: jax.Array | None
    settings: Competition

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        n = self.count.ndim
        into = axes.outputs if transpose else axes.inputs
        outputs = (self.p if transpose else self.q).shape[n + 1 : -1]
        rows = x.shape[n : x.ndim - len(into)]

        def one(x: jax.Array, parts: _Parts) -> jax.Array:
            multiply = _times_transpose if transpose else _times
            y = multiply(x.reshape(math.prod(rows), -1), parts, self.settings, dtype, settings)
            return y.reshape(*rows, *outputs)

        for _ in range(n):
            one = jax.vmap(one)
        return one(x, self._parts(axes))

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        parts = self._parts(axes)
        flat = indices.reshape(-1)

        @jax.checkpoint
        def rows(parts: _Parts) -> jax.Array:
            limits = _limits(parts, self.settings)
            pick = functools.partial(jnp.take, indices=flat, axis=1, mode="clip")
            if (axis,) == axes.inputs:
                lse = None if limits.lse is None else limits.lse[flat]
                return _sparse(parts._replace(p=pick(parts.p)), limits._replace(lse=lse), self.settings)
            return _sparse(parts._replace(q=pick(parts.q)), limits, self.settings).T

        y = rows(parts).astype(dtype)
        rest = axes.outputs if (axis,) == axes.inputs else axes.inputs
        factor = self.q if (axis,) == axes.inputs else self.p
        y = y.reshape(*indices.shape, *factor.shape[1:-1])
        return in_order(y, rest, tuple(sorted(rest)))

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        """Convolves with the dense delta, which exists for as long as the convolution takes."""

        @jax.checkpoint
        def apply(x: jax.Array, delta: Kernelized) -> jax.Array:
            return convolution(permutation, params)(x, delta.materialize(axes).astype(dtype))

        return apply(x, self)

    def materialize(self, axes: Axes) -> jax.Array:
        def one(parts: _Parts) -> jax.Array:
            return _sparse(parts, _limits(parts, self.settings), self.settings)

        n = self.count.ndim
        for _ in range(n):
            one = jax.vmap(one)
        delta = one(self._parts(axes))
        delta = delta.reshape(*delta.shape[:n], *self.p.shape[n + 1 : -1], *self.q.shape[n + 1 : -1])
        stored = axes.inputs + axes.outputs
        return in_order(delta, stored, tuple(sorted(stored)))

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        batch = spec[: len(spec) - axes.ndim]
        specs: dict[str, Any] = {
            "p": PartitionSpec(*batch, None, *(spec[axis] for axis in axes.inputs), None),
            "q": PartitionSpec(*batch, None, *(spec[axis] for axis in axes.outputs), None),
            "count": PartitionSpec(*batch),
            "gate": None if self.gate is None else PartitionSpec(*batch),
            "mix": None if self.mix is None else PartitionSpec(*batch, None),
        }
        return replace(self, **specs)

    def _parts(self, axes: Axes) -> _Parts:
        n = self.count.ndim

        def points(factor: jax.Array) -> jax.Array:
            factor = factor.astype(jnp.promote_types(factor.dtype, jnp.float32))
            return factor.reshape(*factor.shape[: n + 1], -1, factor.shape[-1])

        return _Parts(points(self.p), points(self.q), self.count, self.gate, self.mix)


# ---- one matrix ---------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """What one matrix is made of."""

    p: jax.Array  # [H, d_in, k]
    q: jax.Array  # [H, d_out, k]
    kept: jax.Array  # int32 []
    gate: jax.Array | None
    mix: jax.Array | None  # [3]


class _Limits(NamedTuple):
    """What a tile of the matrix must know of the whole."""

    lse: jax.Array | None  # [d_in], log of the sum that the softmax divides by
    threshold: jax.Array | None  # float32 [], the smallest magnitude that is kept


def _merged(parts: _Parts, settings: Competition) -> jax.Array:
    """Returns the kernel matrix of all points of p and q, before softmax and competition."""
    kernel = KERNELS[settings.kernel] if isinstance(settings.kernel, str) else settings.kernel
    total = sum((-1) ** h * kernel(parts.p[h], parts.q[h]) for h in range(parts.p.shape[0]))
    return settings.scale * jnp.asarray(total)


def _mixed(parts: _Parts, lse: jax.Array | None, settings: Competition) -> jax.Array:
    """Returns the entries that compete."""
    delta = _merged(parts, settings)
    if parts.mix is None:
        return delta
    factor, temperature, offset = parts.mix
    return delta + factor * jnp.exp(delta / temperature - jnp.asarray(lse)[:, None]) + offset


def _sparse(parts: _Parts, limits: _Limits, settings: Competition) -> jax.Array:
    """Returns the entries of the delta for all points of p and q."""
    delta = _mixed(parts, limits.lse, settings)
    magnitude = lax.stop_gradient(jnp.abs(delta))
    if limits.threshold is not None:
        delta = jnp.where(magnitude.astype(jnp.float32) >= limits.threshold, delta, 0)
    if settings.released:
        delta = delta * magnitude
    return delta if parts.gate is None else delta * parts.gate


def _tiles(q: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """Cuts the outputs into tiles: points ``[tiles, H, tile, k]`` and which of them are real, ``[tiles, tile]``."""
    heads, m, k = q.shape
    tile = min(tile, m)
    count = -(-m // tile)
    padded = jnp.pad(q, ((0, 0), (0, count * tile - m), (0, 0)))
    real = (jnp.arange(count * tile) < m).reshape(count, tile)
    return jnp.moveaxis(padded.reshape(heads, count, tile, k), 1, 0), real


def _scan(body: Callable[..., Any], init: Any, xs: Any) -> Any:
    """Scans over tiles such that reverse mode keeps only the inputs of each step."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, y = jax.checkpoint(body)(init, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda y: y[None], y)
    return lax.scan(jax.checkpoint(body, prevent_cse=False), init, xs)


def _limits(parts: _Parts, settings: Competition) -> _Limits:
    tiles, real = _tiles(parts.q, settings.tile)
    lse = None
    if parts.mix is not None:
        temperature = parts.mix[1]

        def add(total: jax.Array, xs: Any) -> Any:
            q, real = xs
            logits = jnp.where(real, _merged(parts._replace(q=q), settings) / temperature, -jnp.inf)
            return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1)), None

        start = jnp.full(parts.p.shape[1], -jnp.inf, parts.p.dtype)
        lse, _ = _scan(add, jaxpr_compat.vary_like(start, jax.tree.leaves(parts)), (tiles, real))
    if settings.dense:
        return _Limits(lse, None)
    return _Limits(lse, _threshold(lax.stop_gradient(parts), lse, settings))


def _threshold(parts: _Parts, lse: jax.Array | None, settings: Competition) -> jax.Array:
    """Returns a bound just below the ``kept``-th largest magnitude; each pass over the tiles finds four of its bits.

    Magnitudes order as their bit patterns do. The exact bound is half-way down to the next smaller magnitude, so that
    another rounding where a tile is computed again does not change which entries are kept. For
    ``threshold="bfloat16"`` the last 16 bits are zero.
    """
    tiles, real = _tiles(parts.q, settings.tile)
    lse = None if lse is None else lax.stop_gradient(lse)
    passes = 8 if settings.threshold == "exact" else 4

    def patterns(q: jax.Array, real: jax.Array) -> jax.Array:
        magnitude = jnp.abs(_mixed(parts._replace(q=q), lse, settings)).astype(jnp.float32)
        bits = lax.bitcast_convert_type(magnitude, jnp.int32)
        return lax.optimization_barrier(jnp.where(real, bits, -1))

    single = patterns(tiles[0], real[0]) if tiles.shape[0] == 1 else None

    def over_tiles(step: Callable[[jax.Array, jax.Array], jax.Array], start: jax.Array) -> jax.Array:
        def body(total: jax.Array, xs: Any) -> Any:
            return step(total, patterns(*xs) if single is None else single), None

        return lax.scan(body, jaxpr_compat.vary_like(start, jax.tree.leaves(parts)), (tiles, real))[0]

    def refine(i: jax.Array, low: jax.Array) -> jax.Array:
        marks = low + (jnp.arange(1, 16) << (28 - 4 * i)).astype(jnp.int32)
        marks = jnp.where(marks < low, jnp.iinfo(jnp.int32).max, marks)  # the first pass reaches into the sign

        def count(total: jax.Array, bits: jax.Array) -> jax.Array:
            return total + jnp.sum(bits[None] >= marks[:, None, None], axis=(1, 2), dtype=jnp.int32)

        counts = over_tiles(count, jnp.zeros(15, jnp.int32))
        above = jnp.sum(counts >= parts.kept)  # marks rise, so counts fall
        return jnp.where(above > 0, marks[jnp.maximum(above, 1) - 1], low)

    start = jaxpr_compat.vary_like(jnp.zeros((), jnp.int32), jax.tree.leaves(parts))
    bound = lax.fori_loop(0, passes, refine, start)
    if settings.threshold == "exact":

        def largest_below(total: jax.Array, bits: jax.Array) -> jax.Array:
            return jnp.maximum(total, jnp.max(jnp.where(bits < bound, bits, -1)))

        below = over_tiles(largest_below, jnp.full((), -1, jnp.int32))
        bound = below + (bound - below + 1) // 2
    return lax.bitcast_convert_type(bound, jnp.float32)


def _times(x: jax.Array, parts: _Parts, settings: Competition, dtype: Any, how: dict[str, Any]) -> jax.Array:
    """Returns ``x @ delta``, ``[rows, d_out]``."""
    parts, x = _vary_alike(parts, x)
    limits = _limits(parts, settings)
    tiles, _ = _tiles(parts.q, settings.tile)

    def step(_: None, q: jax.Array) -> tuple[None, jax.Array]:
        delta = _sparse(parts._replace(q=q), limits, settings).astype(dtype)
        return None, product(x, delta, contract=(-2,), batch_ndim=0, **how)

    _, columns = _scan(step, None, tiles)
    return jnp.moveaxis(columns, 0, 1).reshape(x.shape[0], -1)[:, : parts.q.shape[1]]


def _times_transpose(x: jax.Array, parts: _Parts, settings: Competition, dtype: Any, how: dict[str, Any]) -> jax.Array:
    """Returns ``x @ delta^T``, ``[rows, d_in]``."""
    parts, x = _vary_alike(parts, x)
    limits = _limits(parts, settings)
    tiles, real = _tiles(parts.q, settings.tile)
    padded = jnp.pad(x, ((0, 0), (0, real.size - x.shape[1])))
    xs = jnp.moveaxis(padded.reshape(x.shape[0], *real.shape), 1, 0)

    def step(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        q, x = xs
        delta = _sparse(parts._replace(q=q), limits, settings).astype(dtype)
        return total + product(x, delta, contract=(-1,), batch_ndim=0, **how).astype(total.dtype), None

    out = how.get("preferred_element_type") or jnp.promote_types(x.dtype, dtype)
    start = jnp.zeros((x.shape[0], parts.p.shape[1]), jnp.promote_types(out, jnp.float32))
    total, _ = _scan(step, jaxpr_compat.vary_like(start, [x]), (tiles, xs))
    return total.astype(out)


def _vary_alike(parts: _Parts, x: jax.Array) -> tuple[_Parts, jax.Array]:
    """Marks all operands as varying over the same mesh axes: one sum of gradients at the end, not one per tile."""
    leaves = [x, *jax.tree.leaves(parts)]
    return jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, leaves), parts), jaxpr_compat.vary_like(x, leaves)


# ---- the adapter --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snell(Adapter):
    """A SNELL adapter: settings and the functions that use them. `snell` and `snella` make one.

    Trains ``rank (d_in + d_out)`` numbers per matrix, one more for ``zero_init`` and three more for ``softmax``. Keeps
    one int32 per matrix, the number of its kept entries.
    """

    rank: int
    kernel: str | Kernel
    keep: float
    heads: int
    scale: float
    mode: str
    softmax: bool
    zero_init: bool
    threshold: str
    tile: int
    targets: str | Sequence[str]
    axes: Mapping[str, Any]
    dtype: Any

    method = "snell"
    anchored = True

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns random factors; the delta is small but not zero, unless ``zero_init``.

        Returns:
          theta: path -> ``{"p": [*batch, heads, *inputs, rank / heads], "q": [*batch, heads, *outputs, rank / heads]}``
          uniform within 1 / sqrt(d rank / heads), ``"gate": [*batch]`` zero for ``zero_init``, and
          ``"mix": [*batch, 3]`` (1, 1, 0) for ``softmax``; constants: path -> ``{"count": int32 [*batch]}``, which is
          ceil(keep d_in d_out).

        Raises:
          ValueError: a pattern that matches nothing, a matrix of 2^31 entries or more.
        """
        theta: Theta = {}
        constants: Constants = {}
        k = self.rank // self.heads
        for weight in self.weights(params):
            size = weight.d_in * weight.d_out
            if size >= 2**31:
                raise ValueError(f"{weight.path}: expected fewer than 2^31 entries per matrix, got {size}")
            keys = jax.random.split(jax.random.fold_in(key, path_seed(weight.path)))
            factors = {}
            for name, factor_key, shape in zip("pq", keys, (weight.inputs, weight.outputs)):
                bound = (math.prod(shape) * k) ** -0.5
                full = (*weight.batch, self.heads, *shape, k)
                factors[name] = jax.random.uniform(factor_key, full, self.dtype, -bound, bound)
            if self.zero_init:
                factors["gate"] = jnp.zeros(weight.batch, self.dtype)
            if self.softmax:
                factors["mix"] = jnp.broadcast_to(jnp.array([1, 1, 0], self.dtype), (*weight.batch, 3))
            theta[weight.path] = factors
            constants[weight.path] = {"count": jnp.full(weight.batch, math.ceil(self.keep * size), jnp.int32)}
        return theta, constants

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        batch = base.shape[: base.batch_ndim]
        inputs, outputs = (tuple(base.shape[axis] for axis in group) for group in base.axes)
        k = self.rank // self.heads
        wanted = {"p": (*batch, self.heads, *inputs, k), "q": (*batch, self.heads, *outputs, k)}
        wanted |= {"gate": batch} if self.zero_init else {}
        wanted |= {"mix": (*batch, 3)} if self.softmax else {}
        found = {name: tuple(factor.shape) for name, factor in factors.items()}
        if found != wanted:
            raise ValueError(
                f"{path}: expected factors of shapes {wanted} for a weight of shape {base.shape}, got {found}"
            )
        settings = Competition(
            self.kernel, self.scale, self.keep == 1, self.mode == "released", self.threshold, self.tile
        )
        delta = Kernelized(
            factors["p"], factors["q"], constants["count"], factors.get("gate"), factors.get("mix"), settings
        )
        return adapted(base, delta)

    def with_counts(self, frozen: Any, counts: Mapping[str, Any]) -> Any:
        """Returns the frozen tree with other numbers of kept entries; nothing compiles again for it.

        Args:
          frozen: the tree of `prepare`.
          counts: path -> integers ``[*batch]``, such as `allocate_budget` returns.

        Raises:
          ValueError: a path without a count to replace, counts of another shape, or ``keep=1``, which counts nothing.
        """
        if self.keep == 1:
            raise ValueError("an adapter with keep=1 keeps every entry; make it with keep < 1 to give it a budget")
        leaves = dict(leaf_paths(frozen))
        for path, count in counts.items():
            leaf = leaves.get(path)
            if not isinstance(leaf, Anchored) or leaf.method != self.method:
                raise ValueError(f"{path}: expected the frozen tree of adapter.prepare")
            if np.shape(count) != leaf.constants["count"].shape:
                raise ValueError(
                    f"{path}: expected counts of shape {leaf.constants['count'].shape}, got {np.shape(count)}"
                )

        def carry(path: str, leaf: Any) -> Any:
            return replace(leaf, constants={"count": jnp.asarray(counts[path], jnp.int32)}) if path in counts else leaf

        return map_with_path(carry, frozen)

    def settings(self) -> dict[str, Any]:
        if callable(self.kernel):
            raise ValueError(f"a kernel given as a function cannot be saved; the named kernels are {sorted(KERNELS)}")
        return super().settings()


def snell(
    rank: int = 8,
    kernel: str | Kernel = "pl2",
    keep: float = 0.1,
    *,
    heads: int = 2,
    scale: float = 0.1,
    mode: str = "paper",
    softmax: bool = False,
    zero_init: bool = False,
    threshold: str = "exact",
    tile: int = 256,
    targets: str | Sequence[str] = "**/kernel",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Snell:
    """Returns a SNELL adapter.

    A product computes the kernel matrix once, plus once per pass of the threshold, tile by tile; ``d_in x tile``
    float32 numbers are alive at a time. Under shard_map with sharded factors each shard competes for itself.

    Args:
      rank: numbers per input and output, over all heads.
      kernel: ``"pl2"``: Euclidean distance (with derivative 0 at 0); ``"rbf"``: exp(-distance^2); ``"linear"``: inner
        product; or a function of points ``[n, k]`` and ``[m, k]`` that returns ``[n, m]``, entry by entry.
      keep: share of the entries that are kept, ceil(keep d_in d_out) of them, all of those that tie with the last; 1
        keeps all and computes no threshold.
      heads: H, how many kernel matrices are added with alternating signs; divides ``rank``.
      scale: c, factor of the delta.
      mode: ``"paper"``: entries below the threshold become zero; ``"released"``: as in the released code, kept entries
        are also multiplied by their magnitude, as a constant.
      softmax: add the softmax along the outputs, with three trained numbers (SNELLA).
      zero_init: train a factor of the delta that starts at zero, so that a fresh adapter changes nothing.
      threshold: ``"exact"``: nine passes; ``"bfloat16"``: four passes, the threshold is rounded down to a bfloat16, so
        that entries up to 1/128 below the exact one are kept as well.
      tile: output columns that are computed at a time.
      targets: pattern(s) of the weights to adapt.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.
      dtype: of the factors; the delta is computed in float32 or wider.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    for name, value in (("rank", rank), ("heads", heads), ("tile", tile)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if rank % heads:
        raise ValueError(f"heads must divide rank, got {heads} and {rank}")
    if not callable(kernel) and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {sorted(KERNELS)} or a function, got {kernel!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if mode not in ("paper", "released"):
        raise ValueError(f"mode must be 'paper' or 'released', got {mode!r}")
    if threshold not in ("exact", "bfloat16"):
        raise ValueError(f"threshold must be 'exact' or 'bfloat16', got {threshold!r}")
    table, kind = axes_table(axes), float_dtype(dtype)
    return Snell(rank, kernel, keep, heads, scale, mode, softmax, zero_init, threshold, tile, targets, table, kind)


def snella(rank: int = 8, kernel: str | Kernel = "pl2", keep: float = 0.99, **settings: Any) -> Snell:
    """Returns a SNELLA adapter: `snell` with the softmax, at the start of its budget.

    Between steps, `update_budget` and `allocate_budget` say how many entries each layer keeps next, and
    `Snell.with_counts` puts that into the frozen tree.

    Args:
      rank, kernel, **settings: see `snell`.
      keep: share of the entries that are kept at the start.
    """
    return snell(rank, kernel, keep, **{"softmax": True, **settings})


METHODS["snell"] = snell


# ---- the budget of SNELLA -----------------------------------------------------------------------------------------


class BudgetState(NamedTuple):
    """Moving averages behind `allocate_budget`, each of the form of theta's factors p and q."""

    importance: Theta
    uncertainty: Theta


def init_budget(theta: Theta) -> BudgetState:
    """Returns the averages at their start, zero."""
    zeros = {path: {name: jnp.zeros_like(factors[name]) for name in "pq"} for path, factors in theta.items()}
    return BudgetState(zeros, jax.tree.map(jnp.zeros_like, zeros))


def update_budget(
    state: BudgetState, theta: Theta, grads: Theta, beta1: float = 0.85, beta2: float = 0.85
) -> BudgetState:
    """Returns the averages after a step: of |theta * gradient|, and of how far it is from its average.

    Args:
      state: of `init_budget`.
      theta, grads: factors and their gradients; only p and q count.
      beta1, beta2: decay rates.
    """
    now = {path: {name: jnp.abs(f[name] * grads[path][name]) for name in "pq"} for path, f in theta.items()}
    importance = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, state.importance, now)
    uncertainty = jax.tree.map(
        lambda old, new, mean: beta2 * old + (1 - beta2) * jnp.abs(new - mean), state.uncertainty, now, importance
    )
    return BudgetState(importance, uncertainty)


def allocate_budget(
    state: BudgetState, frozen: Any, step: int, total_steps: int, start: float = 0.99, end: float = 0.2
) -> dict[str, np.ndarray]:
    """Returns how many entries every matrix keeps, on the host; pulls one number per matrix from the device.

    The total falls from ``start`` to ``end`` of all entries with the cube of the time that is left. A matrix gets its
    share by the mean of importance times uncertainty over p plus that over q, at most all of its entries and at least
    one; what is left over goes to the others by the same rule.

    Args:
      state: of `update_budget`.
      frozen: the tree of `prepare`.
      step, total_steps: where the training is.
      start, end: shares of the entries.

    Returns:
      Path -> int32 ``[*batch]``, for `Snell.with_counts`; the sum is floor of the total.

    Raises:
      ValueError: shares or steps out of range.
    """
    if not (0 < end <= 1 and 0 < start <= 1 and total_steps > 0):
        raise ValueError(f"expected start and end in (0, 1] and total_steps > 0, got {start}, {end}, {total_steps}")
    leaves = dict(leaf_paths(frozen))
    scores, sizes, shapes = [], [], []
    for path, importance in state.importance.items():
        shape = leaves[path].constants["count"].shape
        product = {name: importance[name] * state.uncertainty[path][name] for name in "pq"}
        means = [np.asarray(jnp.mean(x, axis=tuple(range(len(shape), x.ndim))), np.float64) for x in product.values()]
        scores.append(np.reshape(sum(means), -1))
        sizes.append(np.full(scores[-1].size, math.prod(leaves[path].shape[len(shape) :])))
        shapes.append(shape)
    size = np.concatenate(sizes)
    left = (1 - min(max(step / total_steps, 0), 1)) ** 3
    counts = _fill(np.concatenate(scores), size, math.floor((end + (start - end) * left) * size.sum()))
    split = np.split(counts, np.cumsum([part.size for part in sizes])[:-1])
    return {path: part.reshape(shape) for path, part, shape in zip(state.importance, split, shapes)}


def _fill(scores: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Returns integers between 1 and ``sizes`` in proportion to ``scores``, of sum ``total`` where that can be."""
    total = min(max(total, sizes.size), int(sizes.sum()))
    weights = np.where(scores > 0, scores, 0.0)
    weights = weights if weights.sum() > 0 else np.ones(sizes.size)
    volume, free = np.ones(sizes.size), np.ones(sizes.size, bool)
    while free.any():
        spare = total - volume[~free].sum() - free.sum()
        share = weights * free
        share = share / share.sum() if share.sum() > 0 else free / free.sum()
        volume = np.where(free, 1 + spare * share, volume)
        over = free & (volume >= sizes)
        if not over.any():
            break
        volume, free = np.where(over, sizes, volume), free & ~over
    whole = np.floor(volume).astype(np.int64)
    order = np.argsort(-np.where(whole < sizes, volume - whole, -1), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole.astype(np.int32)
