"""LaMDA: a trained r x r core between a frozen spectral projection and one that freezes while training goes on.

y = x W + s (x A) S B - x (A C), where the columns of A are singular vectors of W, S [r, r] is trained, and the rows of
B are frozen one by one, those of the largest singular values first. C = s S0 B0 takes the start away again, so that a
fresh adapter changes nothing although S starts at the singular values: W - A C is the residual weight that the method
trains over, without a second copy of W. Reverse mode keeps x A, never x.
LaMDA++ gives more rank to weights with a flatter spectrum.
Source: LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation, 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import (
    METHODS,
    Adapter,
    AdapterBytes,
    Constants,
    Theta,
    adapted,
    axes_table,
    check_known,
    float_dtype,
    path_seed,
)
from memjax.adapters.lora import Lora, lora
from memjax.adapters.matrices import matrix_of, per_matrix
from memjax.adapters.ranks import Ranks, check_patterns, check_ranks, masked, ranks_of
from memjax.core.paths import leaf_paths, map_with_path
from memjax.core.views import Axes, WeightView
from memjax.weights import Anchored, Delta, LowRank
from memjax.weights.dense import casting, product

INITS = ("svd_residual", "svd_zero", "reference")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "s", "b", "fixed", "start"], meta_fields=["scale"]
)
@dataclass(frozen=True)
class Core(Delta):
    """``a @ (scale * s @ [fixed; b] - start)``.

    Attributes:
      a: ``[*batch, *inputs, r]``.
      s: ``[*batch, r, r]``.
      b: ``[*batch, r - k, *outputs]``, or None if k = r.
      fixed: ``[*batch, k, *outputs]``, the rows that are frozen, or None if k = 0.
      start: ``[*batch, r, *outputs]`` or None.
      scale: factor of the product.
    """

    a: jax.Array
    s: jax.Array
    b: jax.Array | None
    fixed: jax.Array | None
    start: jax.Array | None
    scale: float

    def right(self) -> jax.Array:
        """Returns what follows ``a`` but for the scale, ``[*batch, r, *outputs]`` in the dtype of ``s``."""
        return _right(self.s, self.b, self.fixed, self.start)

    def low_rank(self) -> LowRank:
        """Returns the delta as a product of two factors."""
        return LowRank(self.a, self.right(), self.scale)

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        if transpose:
            return self.low_rank().dot(x, axes, transpose=True, dtype=dtype, **settings)
        n = self.s.ndim - 2
        into = functools.partial(
            product,
            contract=tuple(range(-1 - len(axes.inputs), -1)),
            batch_ndim=n,
            precision=settings.get("precision"),
        )
        h = casting(into, x, self.a, (dtype,), barrier=False)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def expand(h: jax.Array, *factors: jax.Array | None) -> jax.Array:
            right = _right(*factors).astype(dtype)
            return product(h, right, contract=(-1 - len(axes.outputs),), batch_ndim=n, **settings)

        y = expand(h, self.s, self.b, self.fixed, self.start)
        return y * jnp.asarray(self.scale, y.dtype)

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        return self.low_rank().take(indices, axes, axis=axis, dtype=dtype)

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        return self.low_rank().conv(x, axes, permutation=permutation, dtype=dtype, params=params)

    def materialize(self, axes: Axes) -> jax.Array:
        return self.low_rank().materialize(axes)

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        batch = spec[: len(spec) - axes.ndim]
        rows = PartitionSpec(*batch, None, *(spec[axis] for axis in axes.outputs))
        specs: dict[str, Any] = {
            name: None if getattr(self, name) is None else rows for name in ("b", "fixed", "start")
        }
        specs["a"] = PartitionSpec(*batch, *(spec[axis] for axis in axes.inputs), None)
        specs["s"] = PartitionSpec(*batch, None, None)
        return replace(self, **specs)


def _right(s: Any, b: Any, fixed: Any, start: Any) -> jax.Array:
    """Returns ``s @ [fixed; b] - start``; exactly zero where s and b are what ``start`` was made of."""
    n, k = s.ndim - 2, 0 if fixed is None else fixed.shape[s.ndim - 2]
    total: Any = None
    for columns, rows in ((s[..., :k], fixed), (s[..., k:], b)):
        if rows is not None:
            part = product(columns, rows, contract=(n - rows.ndim,), batch_ndim=n, precision=lax.Precision.HIGHEST)
            total = part if total is None else total + part
    return total if start is None else total - start


@dataclass(frozen=True)
class Lamda(Adapter):
    """A LaMDA adapter: settings and the functions that use them. `lamda` makes one and describes the fields.

    Trains ``r^2 + r d_out`` numbers per matrix, and ``r^2`` after `freeze`. Keeps ``r d_in`` numbers frozen, and
    ``r d_out`` more for the start of init="svd_residual".
    """

    rank: Ranks
    alpha: float | None
    targets: str | Sequence[str]
    initializer: str
    axes: Mapping[str, Any]
    dtype: Any

    method = "lamda"
    anchored = True

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns factors such that the adapted weights equal the frozen ones.

        Returns:
          theta: path -> ``{"s": [*batch, r, r], "b": [*batch, r, *outputs]}``; constants: path ->
          ``{"a": [*batch, *inputs, r]}``, with ``"start": [*batch, r, *outputs]`` for init="svd_residual".

        Raises:
          ValueError: a pattern that matches nothing, ranks that do not fit a leaf.
        """
        theta: Theta = {}
        constants: Constants = {}
        check_patterns(params, self.rank)
        for weight in self.weights(params):
            ranks = ranks_of(weight, self.rank)
            n, r = len(weight.batch), int(ranks.max())
            if self.initializer == "reference":
                keys = jax.random.split(jax.random.fold_in(key, path_seed(weight.path)))
                bound = weight.d_in**-0.5
                a = jax.random.uniform(keys[0], (*weight.batch, weight.d_in, r), self.dtype, -bound, bound)
                s = jax.random.uniform(keys[1], (*weight.batch, r, r), self.dtype, -(r**-0.5), r**-0.5)
                b = jnp.zeros((*weight.batch, r, weight.d_out), self.dtype)
            else:
                view = self._as_view(weight.path, weight.leaf)
                a, sigma, b = per_matrix(functools.partial(_truncated_svd, rank=r, dtype=self.dtype), view)
                sigma = sigma / self.scale(r) if self.initializer == "svd_residual" else jnp.zeros_like(sigma)
                s = sigma[..., None] * jnp.eye(r, dtype=self.dtype)
            s, a, b = masked(masked(s, ranks, n), ranks, n + 1), masked(a, ranks, n + 1), masked(b, ranks, n)
            a = a.reshape(*weight.batch, *weight.inputs, r)
            b = b.reshape(*weight.batch, r, *weight.outputs)
            theta[weight.path] = {"s": s, "b": b}
            constants[weight.path] = {"a": a}
            if self.initializer == "svd_residual":
                constants[weight.path]["start"] = _right(s, b, None, None)
        return theta, constants

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        return adapted(base, self._core(path, base, factors, constants))

    def scale(self, rank: int) -> float:
        """Returns the factor of the product for factors of this rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def freeze(
        self, frozen: Any, theta: Theta, opt_state: Any = None, rows: int | None = None
    ) -> tuple[Any, Theta, Any]:
        """Moves the first rows of every B from what is trained to what is frozen, with their optimizer state.

        Gradients, optimizer state and updates of these rows exist no more; the function stays the same. A jitted step
        compiles once more for the new shapes.

        Args:
          frozen: the tree of `prepare`, or of an earlier `freeze`.
          theta: trained factors.
          opt_state: of optax transforms over theta, or None: every subtree with the paths of theta is cut alike.
          rows: how many rows of each B are frozen from now on, counted from the first; None for all.

        Returns:
          (frozen, theta, opt_state).

        Raises:
          ValueError: a tree that was not prepared, or optimizer state of B in another shape than B.
        """
        check_known(theta, frozen)
        leaves = dict(leaf_paths(frozen))
        cuts: dict[str, tuple[int, int]] = {}
        moved: Constants = {}
        kept: Theta = {}
        for path, factors in theta.items():
            leaf = leaves[path]
            if not isinstance(leaf, Anchored) or leaf.method != self.method:
                raise ValueError(f"{path}: expected the frozen tree of adapter.prepare")
            rank, axis = factors["s"].shape[-1], factors["s"].ndim - 2
            already = leaf.constants["fixed"].shape[axis] if "fixed" in leaf.constants else 0
            cut = (rank if rows is None else min(rows, rank)) - already
            kept[path] = factors
            if cut > 0:
                cuts[path] = (axis, cut)
                first = lax.slice_in_dim(factors["b"], 0, cut, axis=axis)
                before = [leaf.constants["fixed"]] if already else []
                moved[path] = {**leaf.constants, "fixed": jnp.concatenate([*before, first], axis)}
                kept[path] = _without_rows(path, factors, *cuts[path], factors["b"].shape)

        def carry(path: str, leaf: Any) -> Any:
            return replace(leaf, constants=moved[path]) if path in moved else leaf

        def is_theta(node: Any) -> bool:
            return isinstance(node, dict) and node.keys() == theta.keys()

        def shrink(node: Any) -> Any:
            if not is_theta(node):
                return node
            return {
                path: _without_rows(path, factors, *cuts[path], theta[path]["b"].shape) if path in cuts else factors
                for path, factors in node.items()
            }

        return map_with_path(carry, frozen), kept, jax.tree.map(shrink, opt_state, is_leaf=is_theta)

    def as_lora(self, frozen: Any, theta: Theta) -> tuple[Lora, Theta]:
        """Returns the same delta as a LoRA adapter of rank r and its factors, for the params before `prepare`.

        Args:
          frozen: the tree of `prepare`.
          theta: trained factors.
        """
        factors: Theta = {}
        alphas = {}
        for path, leaf in leaf_paths(self.attach(frozen, theta)):
            if path in theta:
                core = next(delta for delta in reversed(leaf.deltas) if isinstance(delta, Core))
                factors[path] = {"a": core.a, "b": core.right()}
                alphas[path] = core.scale * core.a.shape[-1]
        ranks = {path: factor["a"].shape[-1] for path, factor in factors.items()}
        return lora(ranks, alphas, targets=list(factors), axes=self.axes, dtype=self.dtype), factors

    def padding(self, params: Any) -> AdapterBytes:
        """Returns the bytes of `nbytes` that only fill smaller ranks of a stack up to its largest."""
        trained = constants = 0
        for weight in self.weights(params):
            ranks = ranks_of(weight, self.rank)
            r, spare = int(ranks.max()), int(ranks.max() * ranks.size - ranks.sum())
            trained += ranks.size * r * r - int((ranks**2).sum()) + spare * weight.d_out
            constants += spare * (weight.d_in + weight.d_out * (self.initializer == "svd_residual"))
        return AdapterBytes(trained * self.dtype.itemsize, constants * self.dtype.itemsize)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | {"init": settings.pop("initializer")}

    def _core(self, path: str, base: WeightView, factors: Any, constants: Any) -> Core:
        batch, n = base.shape[: base.batch_ndim], base.batch_ndim
        inputs, outputs = (tuple(base.shape[axis] for axis in group) for group in base.axes)
        rank = constants["a"].shape[-1]
        rows = rank - (constants["fixed"].shape[n] if "fixed" in constants else 0)
        wanted = {"s": (*batch, rank, rank)} | ({"b": (*batch, rows, *outputs)} if rows else {})
        found = {name: tuple(factor.shape) for name, factor in factors.items()}
        if found != wanted or tuple(constants["a"].shape) != (*batch, *inputs, rank):
            raise ValueError(
                f"{path}: expected factors of shapes {wanted} for a weight of shape {base.shape} and A of shape "
                f"{tuple(constants['a'].shape)}, got {found}"
            )
        fixed, start = constants.get("fixed"), constants.get("start")
        return Core(constants["a"], factors["s"], factors.get("b"), fixed, start, self.scale(rank))


def lamda(
    rank: Ranks = 32,
    alpha: float | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    init: str = "svd_residual",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Lamda:
    """Returns a LaMDA adapter.

    Args:
      rank: r, or pattern -> r, or for a stack a list of one r per layer, such as `lamda_plan` returns. Smaller ranks of
        a stack are padded with zeros, which training leaves at zero.
      alpha: numerator of the scale alpha / r (r: the largest of a stack); None means a scale of 1.
      targets: pattern(s) of the weights to adapt.
      init: ``"svd_residual"``: A, S, B are the truncated SVD of the weight, and training goes on over the residual;
        ``"svd_zero"``: S = 0 (B has no gradient until S moves); ``"reference"``: as in the released code, A and S
        uniform within 1 / sqrt(fan in), B = 0.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.
      dtype: of the factors.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    check_ranks(rank)
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    return Lamda(rank, alpha, targets, init, axes_table(axes), float_dtype(dtype))


METHODS["lamda"] = lamda


def _truncated_svd(view: WeightView, *, rank: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, sigma, vt = jnp.linalg.svd(matrix_of(view), full_matrices=False)
    return u[:, :rank].astype(dtype), sigma[:rank].astype(dtype), vt[:rank].astype(dtype)


def _without_rows(path: str, factors: Any, axis: int, cut: int, shape: tuple[int, ...]) -> Any:
    """Returns factors, or what an optimizer keeps for them, less the first ``cut`` rows of b."""
    b = factors.get("b")
    if not hasattr(b, "shape"):
        return factors
    if b.shape != shape:
        raise ValueError(
            f"{path}: expected optimizer state of b of shape {shape}, got {b.shape}; initialise the optimizer anew"
        )
    rest = {name: factor for name, factor in factors.items() if name != "b"}
    return rest if cut == shape[axis] else rest | {"b": lax.slice_in_dim(b, cut, shape[axis], axis=axis)}


# ---- the schedule -------------------------------------------------------------------------------------------------


class ProgressiveFreezeState(NamedTuple):
    """State of `progressive_freeze`."""

    step: jax.Array  # int32 []


def frozen_rows(step: Any, rank: int, total_steps: int, fraction: float = 0.3, schedule: str = "paper") -> Any:
    """Returns how many rows of B no longer train at ``step`` (a number or an integer array), counted from 0.

    Args:
      step: updates made so far.
      rank: rows of B.
      total_steps: of the training.
      fraction: share of the steps after which all rows are frozen.
      schedule: ``"paper"``: floor(rank step / (fraction total_steps)); ``"released"``: without the factor rank, as the
        released code has it, so that one row freezes per ``fraction`` of the training.
    """
    steps = max(1, round(fraction * total_steps))
    rows = (rank * step if schedule == "paper" else step) // steps
    return min(rows, rank) if isinstance(step, int) else jnp.minimum(rows, rank)


def progressive_freeze(
    total_steps: int, fraction: float = 0.3, schedule: str = "paper"
) -> optax.GradientTransformation:
    """Returns an optax transform that stops the rows of LaMDA's B one by one, shapes unchanged.

    Put it last in the chain: what it lets through is added to theta, so momentum and weight decay stop as well. It
    saves no bytes; `Lamda.freeze` does, at the end or on the way (both count rows alike). Of a stack with ranks padded
    to the largest, a layer of smaller rank is frozen earlier.

    Args:
      total_steps, fraction, schedule: see `frozen_rows`.

    Raises:
      ValueError: settings out of range.
      TypeError: (when updated) updates that are not factors by path.
    """
    if total_steps < 1 or not 0 < fraction <= 1:
        raise ValueError(f"expected total_steps >= 1 and fraction in (0, 1], got {total_steps} and {fraction}")
    if schedule not in ("paper", "released"):
        raise ValueError(f"schedule must be 'paper' or 'released', got {schedule!r}")

    def init(params: Any) -> ProgressiveFreezeState:
        return ProgressiveFreezeState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: ProgressiveFreezeState, params: Any = None) -> Any:
        if not isinstance(updates, dict) or not all(isinstance(factors, dict) for factors in updates.values()):
            raise TypeError("progressive_freeze expects the updates of an adapter: path -> factor name -> array")
        live = {path: _masked_rows(factors, state.step) for path, factors in updates.items()}
        return live, ProgressiveFreezeState(state.step + 1)

    def _masked_rows(factors: dict[str, Any], count: jax.Array) -> dict[str, Any]:
        if "s" not in factors or not hasattr(factors.get("b"), "shape"):
            return factors
        b, rank, axis = factors["b"], factors["s"].shape[-1], factors["s"].ndim - 2
        rows = jnp.arange(rank - b.shape[axis], rank).reshape(-1, *[1] * (b.ndim - axis - 1))
        live = rows >= frozen_rows(count, rank, total_steps, fraction, schedule)
        return {**factors, "b": jnp.where(live, b, 0)}

    return optax.GradientTransformation(init, update)


# ---- LaMDA++ ------------------------------------------------------------------------------------------------------


def lamda_plan(
    params: Any,
    mean_rank: int,
    candidates: Sequence[int] | None = None,
    targets: str | Sequence[str] = "**/kernel",
    axes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns a rank for every matrix: more for flatter spectra, ``mean_rank`` on average (LaMDA++).

    With E the share of a matrix's squared singular values that the first ``mean_rank`` of them hold, its ideal rank is
    in proportion to 1 - E. The plan is the choice among the candidates that is nearest to the ideal ranks in least
    squares and whose sum is exact (for candidates without gaps that is rounding by largest remainder).

    Args:
      params: dense arrays or views.
      mean_rank: r of the plan's budget: the sum of all ranks is ``mean_rank`` times the number of matrices.
      candidates: ranks to choose from; None for half, once and twice ``mean_rank``.
      targets: pattern(s) of the weights.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.

    Returns:
      Path -> rank, or lists of one rank per layer for a stack; for ``lamda(rank=plan, targets=list(plan))``.

    Raises:
      ValueError: a pattern that matches nothing, or candidates of which no choice has the sum.
    """
    sizes = sorted({mean_rank // 2, mean_rank, 2 * mean_rank} - {0} if candidates is None else set(candidates))
    check_ranks({"candidates": sizes})
    adapter = lamda(1, targets=targets, axes=axes)
    weights = adapter.weights(params)

    def flatness(view: WeightView) -> jax.Array:
        energy = jnp.square(jnp.linalg.svd(matrix_of(view), compute_uv=False))
        return jnp.sum(energy[mean_rank:]) / jnp.maximum(jnp.sum(energy), jnp.finfo(energy.dtype).tiny)

    scores = [np.asarray(per_matrix(flatness, adapter._as_view(w.path, w.leaf)), np.float64) for w in weights]
    for weight, score in zip(weights, scores):
        if not np.isfinite(score).all():
            raise ValueError(f"{weight.path}: the spectrum is not finite")
    limits = np.concatenate([np.full(max(s.size, 1), min(w.d_in, w.d_out)) for s, w in zip(scores, weights)])
    flat = np.concatenate([score.reshape(-1) for score in scores])
    share = flat / flat.sum() if flat.sum() > 0 else np.full(flat.size, 1 / flat.size)
    ranks = _nearest_ranks(mean_rank * flat.size * share, mean_rank * flat.size, sizes, limits)
    plan: dict[str, Any] = {}
    for weight, score in zip(weights, scores):
        mine, ranks = ranks[: score.size], ranks[score.size :]
        plan[weight.path] = mine.reshape(score.shape).tolist()
    return plan


def _nearest_ranks(ideal: np.ndarray, total: int, candidates: Sequence[int], limits: np.ndarray) -> np.ndarray:
    """Returns the candidates nearest to ``ideal`` in least squares whose sum is ``total``, by dynamic programming."""
    cost = np.full(total + 1, np.inf)
    cost[0] = 0
    choices = []
    for wish, limit in zip(ideal, limits):
        best, choice = np.full(total + 1, np.inf), np.zeros(total + 1, np.int64)
        for rank in candidates:
            if rank <= min(limit, total):
                offer = cost[: total + 1 - rank] + (rank - wish) ** 2
                better = offer < best[rank:]
                best[rank:][better], choice[rank:][better] = offer[better], rank
        cost = best
        choices.append(choice)
    if not np.isfinite(cost[total]):
        raise ValueError(
            f"no choice of ranks among {list(candidates)} for {len(ideal)} matrices, each at most {int(limits.min())} "
            f"or more, sums to {total}"
        )
    ranks, left = [], total
    for choice in reversed(choices):
        ranks.append(int(choice[left]))
        left -= ranks[-1]
    return np.array(ranks[::-1])
