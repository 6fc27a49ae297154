"""CE-SSL: low-rank adapters that rest at random, ranks from one look at the data, and a lean semi-supervised step.

Random deactivation: in each forward pass of training, each layer adds its delta s A B with probability 1 - p, without
rescaling; evaluation and merging add (1 - p) s A B, the expectation.
Rank allocation: one pass over the labelled data at the start (B = 0) ranks the layers by the change A dB that their
adapters ask for; the least important ones get a lower rank.
Semi-supervised step: unlabelled samples go through the encoder together with the labelled ones, so that batch
normalisation sees both, and no further.
Source: Computation-Efficient Semi-Supervised Learning for ECG-Based Cardiovascular Diseases Detection, 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    float_dtype,
    path_seed,
)
from memjax.adapters.lora import check_factors
from memjax.adapters.matrices import matrix_of, per_matrix
from memjax.adapters.ranks import Ranks, check_patterns, check_ranks, masked, ranks_of
from memjax.core import jaxpr_compat
from memjax.core.views import Axes, WeightView
from memjax.weights import Delta, LowRank, lift


@functools.partial(jax.tree_util.register_dataclass, data_fields=["delta", "on"], meta_fields=[])
@dataclass(frozen=True)
class Switched(Delta):
    """A delta that is there or not.

    With a single coin (a weight alone, or one layer of a stack inside a scan) the product sits in a conditional, which
    skips its work where the coin says so. Under vmap over coins, and in products over a whole stack, all products are
    computed and those that are off are multiplied by zero.

    Attributes:
      delta: the delta.
      on: booleans ``[*batch]``.
    """

    delta: Delta
    on: jax.Array

    def _if_on(self, compute: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """Returns ``compute(x, delta)`` where on; one coin only."""
        shape = jax.eval_shape(compute, x, self.delta)
        leaves = [x, *jax.tree.leaves(self.delta)]

        def skip(x: jax.Array, delta: Delta) -> jax.Array:
            return jaxpr_compat.vary_like(jnp.zeros(shape.shape, shape.dtype), leaves)

        return lax.cond(self.on, compute, skip, x, self.delta)

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        def compute(x: jax.Array, delta: Delta) -> jax.Array:
            return delta.dot(x, axes, transpose=transpose, dtype=dtype, **settings)

        if self.on.ndim:
            y = compute(x, self.delta)
            return y * self.on.reshape(*self.on.shape, *[1] * (y.ndim - self.on.ndim)).astype(y.dtype)
        return self._if_on(compute, x)

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        return self._if_on(lambda i, delta: delta.take(i, axes, axis=axis, dtype=dtype), indices)

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        return self._if_on(lambda x, delta: delta.conv(x, axes, permutation=permutation, dtype=dtype, params=params), x)

    def materialize(self, axes: Axes) -> jax.Array:
        delta = self.delta.materialize(axes)
        return delta * self.on.reshape(*self.on.shape, *[1] * axes.ndim).astype(delta.dtype)

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        specs: dict[str, Any] = {
            "delta": self.delta.specs(spec, axes),
            "on": PartitionSpec(*spec[: len(spec) - axes.ndim]),
        }
        return replace(self, **specs)


@dataclass(frozen=True)
class CeSsl(Adapter):
    """A CE-SSL adapter: settings and the functions that use them. `ce_ssl` makes one and describes the fields.

    Trains ``r (d_in + d_out)`` numbers per matrix.
    """

    rank: Ranks
    alpha: float | None
    deactivation: float
    targets: str | Sequence[str]
    axes: Mapping[str, Any]
    dtype: Any

    method = "ce_ssl"

    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns factors such that the adapted weights equal the frozen ones.

        Returns:
          path -> ``{"a": [*batch, *inputs, r], "b": [*batch, r, *outputs]}``: A normal with deviation 0.02, B zero. No
          constants.

        Raises:
          ValueError: a pattern that matches nothing, ranks that do not fit a leaf.
        """
        theta: Theta = {}
        check_patterns(params, self.rank)
        for weight in self.weights(params):
            ranks = ranks_of(weight, self.rank)
            r = int(ranks.max())
            a_shape = (*weight.batch, *weight.inputs, r)
            a = 0.02 * jax.random.normal(jax.random.fold_in(key, path_seed(weight.path)), a_shape, self.dtype)
            a = masked(a, ranks, len(a_shape) - 1)
            theta[weight.path] = {"a": a, "b": jnp.zeros((*weight.batch, r, *weight.outputs), self.dtype)}
        return theta, {}

    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        if set(factors) != {"a", "b"}:
            raise ValueError(f"{path}: expected the factors a and b, found {sorted(factors)}")
        a, b = factors["a"], factors["b"]
        check_factors(path, base, a, b)
        scale = 1.0 if self.alpha is None else self.alpha / a.shape[-1]
        if key is None or not self.deactivation:
            return adapted(base, LowRank(a, b, scale * (1 - self.deactivation)))

        def coin(words: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.wrap_key_data(words, impl="threefry2x32"), 1 - self.deactivation)

        for _ in range(key.ndim - 1):
            coin = jax.vmap(coin)
        return adapted(base, Switched(LowRank(a, b, scale), coin(key)))

    def padding(self, params: Any) -> AdapterBytes:
        """Returns the bytes of `nbytes` that only fill smaller ranks of a stack up to its largest."""
        spare = 0
        for weight in self.weights(params):
            ranks = ranks_of(weight, self.rank)
            spare += int(ranks.max() * ranks.size - ranks.sum()) * (weight.d_in + weight.d_out)
        return AdapterBytes(spare * self.dtype.itemsize, 0)


def ce_ssl(
    rank: Ranks = 16,
    alpha: float | None = None,
    *,
    deactivation: float = 0.2,
    targets: str | Sequence[str] = "**/kernel",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> CeSsl:
    """Returns a CE-SSL adapter; it rests at random where `Adapter.attach` gets a key.

    Give all data-parallel replicas the same key: a layer then rests on all of them at once.

    Args:
      rank: r, or pattern -> r, or for a stack a list of one r per layer, such as `plan_ranks_one_shot` returns. Smaller
        ranks of a stack are padded with zeros, which training leaves at zero.
      alpha: numerator of the scale alpha / r; None means a scale of 1.
      deactivation: p, the probability with which a layer goes without its delta.
      targets: pattern(s) of the weights to adapt.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.
      dtype: of the factors.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    check_ranks(rank)
    if not 0 <= deactivation < 1:
        raise ValueError(f"deactivation must be in [0, 1), got {deactivation}")
    return CeSsl(rank, alpha, deactivation, targets, axes_table(axes), float_dtype(dtype))


METHODS["ce_ssl"] = ce_ssl


def plan_ranks_one_shot(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    rank: int,
    low_rank: int | None = None,
    fraction: float = 0.6,
    score: str = "taylor",
    *,
    key: jax.Array | None = None,
    targets: str | Sequence[str] = "**/kernel",
    axes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns a rank for every matrix, from the gradients of fresh adapters over one pass of the data.

    With dB the gradient at B = 0, a matrix scores mean((W * A dB)^2) for ``"taylor"`` and mean((A dB)^2) for
    ``"fisher"``, averaged over the batches. One matrix-sized product is formed per layer at a time.

    Args:
      loss_fn: scalar loss of (params, batch), a plain function or a lifted one.
      params: the frozen tree.
      batches: labelled batches.
      rank: of the important matrices, and of the adapters that are probed.
      low_rank: of the floor(fraction * matrices) least important ones; None for 2 floor(rank / 4).
      fraction: share of the matrices that get ``low_rank``.
      score: ``"taylor"`` or ``"fisher"``.
      key: of the probes' A; None for ``jax.random.key(0)``.
      targets: pattern(s) of the weights.
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``.

    Returns:
      Path -> rank, or lists of one rank per layer for a stack; for ``ce_ssl(rank=plan, targets=list(plan))``.

    Raises:
      ValueError: settings out of range, no batches, a score that is not finite.
    """
    low_rank = max(1, 2 * (rank // 4)) if low_rank is None else low_rank
    if not 0 <= fraction <= 1 or not 1 <= low_rank <= rank:
        raise ValueError(f"expected fraction in [0, 1] and 1 <= low_rank <= rank, got {fraction}, {low_rank}, {rank}")
    if score not in ("taylor", "fisher"):
        raise ValueError(f"score must be 'taylor' or 'fisher', got {score!r}")
    adapter = ce_ssl(rank, deactivation=0.0, targets=targets, axes=axes)
    weights = adapter.weights(params)
    theta = adapter.init(jax.random.key(0) if key is None else key, params)

    def importance(view: WeightView, a: jax.Array, db: jax.Array) -> jax.Array:
        change = a @ db
        return jnp.mean(jnp.square(matrix_of(view) * change if score == "taylor" else change))

    @jax.jit
    def probe(params: Any, theta: Theta, batch: Any) -> list[jax.Array]:
        def loss(b: dict[str, jax.Array]) -> jax.Array:
            factors = {path: {"a": theta[path]["a"], "b": b[path]} for path in b}
            return lift(loss_fn)(adapter.attach(params, factors), batch)

        grads = jax.grad(loss)({path: factors["b"] for path, factors in theta.items()})
        scores = []
        for weight in adapter.weights(params):
            a = theta[weight.path]["a"].reshape(*weight.batch, weight.d_in, rank)
            db = grads[weight.path].reshape(*weight.batch, rank, weight.d_out)
            scores.append(per_matrix(importance, adapter._as_view(weight.path, weight.leaf), a, db))
        return scores

    total: list[np.ndarray] | None = None
    for batch in batches:
        found = [np.asarray(x, np.float64) for x in probe(params, theta, batch)]
        total = found if total is None else [x + y for x, y in zip(total, found)]
    if total is None:
        raise ValueError("batches is empty: the plan needs labelled data")
    for weight, sums in zip(weights, total):
        if not np.isfinite(sums).all():
            raise ValueError(f"{weight.path}: the score is not finite")
    flat = np.concatenate([x.reshape(-1) for x in total])
    ranks = np.full(flat.size, rank)
    ranks[np.argsort(flat, kind="stable")[: int(flat.size * fraction)]] = low_rank
    plan: dict[str, Any] = {}
    for weight, sums in zip(weights, total):
        mine, ranks = ranks[: sums.size], ranks[sums.size :]
        plan[weight.path] = mine.reshape(sums.shape).tolist()
    return plan


# ---- the semi-supervised step -------------------------------------------------------------------------------------


def concat_batches(
    encoder: Callable[[Any], tuple[Any, Any]], head: Callable[[Any], Any], labelled: Any, unlabelled: Any
) -> tuple[Any, Any]:
    """Runs the encoder on both batches at once and the head on the labelled one.

    What the encoder shares among samples, such as the statistics of batch normalisation in training, sees all of them;
    only labelled samples reach the head and the loss.

    Args:
      encoder: function of inputs ``[n, ...]`` that returns (features ``[n, ...]``, anything else such as new batch
        statistics).
      head: function of the features.
      labelled: inputs, an array or a tree of arrays ``[n, ...]``.
      unlabelled: the same with any number of samples, also none.

    Returns:
      (what the head returns for the labelled samples, what else the encoder returns).
    """
    n = jax.tree.leaves(labelled)[0].shape[0]
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), labelled, unlabelled)
    features, rest = encoder(both)
    return head(jax.tree.map(lambda x: x[:n], features)), rest


def cutmix(key: jax.Array, x: jax.Array, y: jax.Array, alpha: float = 0.75) -> tuple[jax.Array, jax.Array]:
    """Replaces one stretch of every signal by that of another sample, and mixes the labels by length.

    Args:
      key: random key; one stretch and one permutation per call.
      x: signals ``[n, time, ...]``.
      y: floating-point labels ``[n, ...]``.
      alpha: of the beta distribution of the share that stays.

    Returns:
      (signals, labels), as they came in shape and dtype.

    Raises:
      TypeError: labels that are not floating point.

    Source: CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, 2019.
    """
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"expected floating-point labels to mix, got {y.dtype}")
    share_key, start_key, order_key = jax.random.split(key, 3)
    n, time = x.shape[:2]
    length = jnp.round((1 - jax.random.beta(share_key, alpha, alpha)) * time).astype(jnp.int32)
    start = jax.random.randint(start_key, (), 0, time - length + 1)
    order = jax.random.permutation(order_key, n)
    at = jnp.arange(time)
    inside = ((at >= start) & (at < start + length)).reshape(1, time, *[1] * (x.ndim - 2))
    share = (length / time).astype(y.dtype)
    return jnp.where(inside, x[order], x), (1 - share) * y + share * y[order]
