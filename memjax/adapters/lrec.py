"""INT2.1: a low-bit base whose error a low-rank correction takes back, trained to imitate the float model.

Stage 0, in closed form: A B is the best rank-r approximation of E = W - decode(Q), or of diag(rms) E where the inputs'
root mean squares are known, for then the error of the outputs counts and not that of the weights. Stage 1: the factors
are trained on unlabelled text with T^2 KL(float || quantized), plus `squarehead` where asked; the correction then stays
as it is. The correction is a LoRA adapter of scale 1: attach, merge and save as any other.
Source: INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation,
2023, which leaves the loss open; the closed form and the loss are this module's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import Theta
from memjax.adapters.lora import Lora, check_rank, lora
from memjax.adapters.squarehead import check_temperature, distillation_kl, weighted_mean
from memjax.core.paths import Patterns, leaf_paths, map_with_path, select
from memjax.core.views import Axes, WeightView, is_view
from memjax.weights import Dense, axes_of, lift
from memjax.weights.quantize import check_table


def lrec_init(
    params: Any,
    quantized: Any,
    rank: int | Mapping[str, int],
    act_rms: Mapping[str, jax.Array] | None = None,
    targets: str | Sequence[str] = "**/kernel",
    *,
    dtype: Any = jnp.float32,
) -> tuple[Lora, Theta]:
    """Returns the correction of stage 0 as a LoRA adapter on the quantized tree, and its factors.

    It decomposes one matrix at a time: its singular vectors on the shorter side are the eigenvectors of a Gram matrix,
    and what these project out of the error is at its least to second order in their rounding.

    Args:
      params: the float tree.
      quantized: what `memjax.weights.quantize` made of it.
      rank: r, or pattern -> r.
      act_rms: path -> root mean square of every input ``[*batch, *inputs]``, as `act_rms` returns; None weighs all
        inputs alike.
      targets: pattern(s) of the weights to correct; all of them quantized.
      dtype: of the factors; 16 bits cost ``16 r (d_in + d_out)`` bits per matrix.

    Raises:
      ValueError: a rank of 0 or above the matrix's, trees that do not fit, a target that is not quantized.
    """
    adapter = lora(rank=rank, targets=targets, dtype=dtype)
    floats = dict(leaf_paths(params))
    theta: Theta = {}
    for weight in adapter.weights(quantized):
        path, r = weight.path, adapter._rank(weight.path)
        if not is_view(weight.leaf):
            raise ValueError(f"{path}: expected a quantized weight, found a dense array; it has no error to correct")
        if path not in floats or is_view(floats[path]) or floats[path].shape != weight.leaf.shape:
            raise ValueError(f"{path}: expected the float weight {weight.leaf.shape} at this path of params")
        check_rank(path, r, weight.d_in, weight.d_out)
        scale = jnp.ones((*weight.batch, *weight.inputs))
        if act_rms is not None:
            if path not in act_rms or act_rms[path].shape != scale.shape:
                raise ValueError(f"{path}: act_rms needs an entry of shape {scale.shape}")
            scale = act_rms[path].astype(jnp.float32)
        a, b = _best_factors(floats[path], weight.leaf, scale, r)
        theta[path] = {
            "a": a.reshape(*weight.batch, *weight.inputs, r).astype(adapter.dtype),
            "b": b.reshape(*weight.batch, r, *weight.outputs).astype(adapter.dtype),
        }
    return adapter, theta


@functools.partial(jax.jit, static_argnums=3)
def _best_factors(w: jax.Array, packed: WeightView, scale: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns ``a [n, d_in, r]`` and ``b [n, r, d_out]`` that leave the least of ``diag(scale) (w - packed)``."""
    axes = packed.axes
    error = w.astype(jnp.float32) - packed.astype(jnp.float32).materialize()
    lead = error.ndim - axes.ndim
    error = error.transpose(*range(lead), *(error.ndim + axis for axis in axes.inputs + axes.outputs))
    d_in = math.prod(error.shape[lead : lead + len(axes.inputs)])
    error = error.reshape(math.prod(error.shape[:lead]), d_in, -1)
    scale = scale.reshape(-1, d_in, 1)
    scale = jnp.maximum(scale, 1e-5 * jnp.max(scale, axis=1, keepdims=True))  # inputs that are always zero
    scale = jnp.where(scale == 0, 1, scale)

    def factor(matrix: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, scale = matrix
        weighted = scale * error
        wide = d_in <= error.shape[1]
        short = weighted if wide else weighted.T
        gram = jnp.matmul(short, short.T, precision=lax.Precision.HIGHEST)
        basis = jnp.linalg.eigh(gram)[1][:, : -rank - 1 : -1]
        rest = jnp.matmul(basis.T, short, precision=lax.Precision.HIGHEST)
        root = jnp.sqrt(jnp.linalg.norm(rest, axis=1, keepdims=True))  # of the singular values
        rest = rest / jnp.where(root == 0, 1, root)
        a, b = (basis * root.T, rest) if wide else (rest.T, root * basis.T)
        return a / scale, b

    return lax.map(factor, (error, scale))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["indices", "log_probs", "log_rest"], meta_fields=["temperature"]
)
@dataclass(frozen=True)
class TeacherTopK:
    """A teacher's most probable tokens and how probable all others are together: ``8 k + 4`` bytes per position.

    Attributes:
      indices: int32 ``[..., k]``.
      log_probs: float32 ``[..., k]``, of softmax(logits / temperature).
      log_rest: float32 ``[...]``, log of the probability of all other tokens; -inf where there are none.
      temperature: that the logits were divided by.
    """

    indices: jax.Array
    log_probs: jax.Array
    log_rest: jax.Array
    temperature: float


def teacher_topk(logits: jax.Array, k: int, temperature: float = 1.0) -> TeacherTopK:
    """Returns what is kept of a teacher's logits, so that it need not be there when the student trains.

    Args:
      logits: ``[..., V]``.
      k: tokens kept per position.
      temperature: of the distillation to come.

    Raises:
      ValueError: k outside 1 to V, or a temperature that is not positive.
    """
    check_temperature(temperature)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"expected k in 1 to {logits.shape[-1]}, got {k}")
    scaled = logits.astype(jnp.float32) / temperature
    top, indices = lax.top_k(scaled, k)
    log_probs, log_rest = _split(scaled, indices, top)
    return TeacherTopK(indices.astype(jnp.int32), log_probs, log_rest, float(temperature))


def distill_loss(
    student_logits: jax.Array,
    teacher: jax.Array | TeacherTopK,
    weights: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """Returns T^2 KL(teacher || student), averaged over tokens; add ``squarehead(...) / L`` to imitate the blocks too.

    With a teacher's top k, the tokens that it lacks count as one: the divergence is that of the k + 1 probabilities,
    exact for them, and never above that of all tokens; equal to it for k >= V - 1. The loss sees how much the student
    gives to the rest, not how it spreads it.

    Args:
      student_logits: ``[..., V]``.
      teacher: logits ``[..., V]``, or what `teacher_topk` kept of them.
      weights: ``[...]``, 0 where a token does not count.
      temperature: T; with a top k that of `teacher_topk`.

    Returns:
      float32 scalar in nats.

    Raises:
      ValueError: shapes or temperatures that do not fit.
    """
    if not isinstance(teacher, TeacherTopK):
        return distillation_kl(student_logits, teacher, weights, temperature)
    if teacher.temperature != temperature:
        raise ValueError(f"the teacher's top k are of temperature {teacher.temperature}, not {temperature}")
    if teacher.indices.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(f"student logits {student_logits.shape} and top k {teacher.indices.shape} do not fit")
    scaled = student_logits.astype(jnp.float32) / temperature
    log_q, log_q_rest = _split(scaled, teacher.indices, jnp.take_along_axis(scaled, teacher.indices, axis=-1))
    divergence = jnp.sum(jnp.exp(teacher.log_probs) * (teacher.log_probs - log_q), axis=-1)
    if teacher.indices.shape[-1] < scaled.shape[-1]:
        divergence += jnp.exp(teacher.log_rest) * (teacher.log_rest - log_q_rest)
    return temperature**2 * weighted_mean(divergence, weights)


def _split(logits: jax.Array, indices: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log probabilities of the ``chosen`` logits, and of all others together."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    log_chosen = chosen - normalizer[..., None]
    if indices.shape[-1] == logits.shape[-1]:
        return log_chosen, jnp.full(normalizer.shape, -jnp.inf)
    others = jnp.put_along_axis(logits, indices, -jnp.inf, axis=-1, inplace=False)
    return log_chosen, jax.nn.logsumexp(others, axis=-1) - normalizer


def act_rms(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    where: Patterns = "**/kernel",
    axes: Mapping[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Measures the root mean square of every input feature of weights while ``fn(params, *args)`` runs.

    Any pure function, its scans, checkpoints and vmaps included: what is measured comes out as the gradient of probes
    that stand beside the weights, so ``fn`` has to be differentiable; the compiled program has no backward pass.

    Args:
      fn: of params and arrays; returns a pytree with floats that depend on the selected weights.
      params: arrays or weight views.
      *args: a batch.
      where: pattern(s) of the weights, which ``fn`` multiplies with.
      axes: pattern -> input and output axes, for dense weights that are not ``[*batch, in, out]``.

    Returns:
      Path -> float32 ``[*batch, *inputs]``.

    Raises:
      ValueError: a pattern that matches nothing, a weight that the outputs do not depend on.
      TypeError: a weight that is convolved with, or multiplied along its outputs.
    """
    leaves = dict(leaf_paths(params))
    check_table(params, axes)
    views: dict[str, WeightView] = {}
    for path in select(params, where):
        leaf = leaves[path]
        views[path] = leaf if is_view(leaf) else Dense(leaf, axes_of(path, leaf.shape, axes))

    def total(probes: dict[str, Any], params: Any, args: Any) -> jax.Array:
        def probe(path: str, leaf: Any) -> Any:
            if path not in probes:
                return leaf
            base = leaf if is_view(leaf) else Dense(leaf, views[path].axes)
            return _Probe(base, *probes[path])

        outputs = jax.tree.leaves(lift(fn)(map_with_path(probe, params), *args))
        floats = [jnp.sum(out.astype(jnp.float32)) for out in outputs if jnp.issubdtype(out.dtype, jnp.floating)]
        return jnp.sum(jnp.stack(floats)) if floats else jnp.float32(0)

    probes = {}
    for path, view in views.items():
        batch = view.shape[: view.batch_ndim]
        inputs = tuple(view.shape[axis] for axis in view.axes.inputs)
        probes[path] = (jnp.zeros((*batch, *inputs)), jnp.zeros(batch))
    measured = jax.jit(jax.grad(total))(probes, params, args)
    result = {}
    for path, (squares, count) in measured.items():
        if not bool((count > 0).all()):
            raise ValueError(f"{path}: the outputs of the function do not depend on a product with this weight")
        result[path] = jnp.sqrt(squares / count.reshape(count.shape + (1,) * (squares.ndim - count.ndim)))
    return result


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "squares", "count"], meta_fields=[])
@dataclass(frozen=True)
class _Probe(WeightView):
    """A weight whose products give ``squares`` and ``count`` the sums over rows of x^2 and of 1 as gradients."""

    base: WeightView
    squares: jax.Array  # float32 [*batch, *inputs]
    count: jax.Array  # float32 [*batch]

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.base.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dot(self, x: jax.Array, *, transpose: bool = False, **settings: Any) -> jax.Array:
        if transpose:
            raise TypeError(f"the weight of shape {self.shape} is multiplied along its outputs; give axes=")
        return self.base.dot(_observe(x, self.squares, self.count), **settings)

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        return self.base.take(indices, axis=axis, casts=casts)

    def conv(self, x: jax.Array, **settings: Any) -> jax.Array:
        raise TypeError(f"the weight of shape {self.shape} is convolved with; only products are measured")

    def materialize(self) -> jax.Array:
        return self.base.materialize()

    def astype(self, dtype: Any) -> _Probe:
        return replace(self, base=self.base.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        batch = spec[: len(spec) - self.axes.ndim]
        specs: dict[str, Any] = {
            "squares": PartitionSpec(*batch, *(spec[axis] for axis in self.axes.inputs)),
            "count": PartitionSpec(*batch),
        }
        return replace(self, base=self.base.specs(spec), **specs)


@jax.custom_vjp
def _observe(x: jax.Array, squares: jax.Array, count: jax.Array) -> jax.Array:
    return x


def _observe_forward(x: jax.Array, squares: jax.Array, count: jax.Array) -> tuple[jax.Array, Any]:
    batch, inputs = count.ndim, squares.ndim - count.ndim
    rows = tuple(range(batch, x.ndim - inputs))
    number = math.prod(x.shape[axis] for axis in rows)
    sums = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=rows)
    return x, (sums, jnp.full(count.shape, number, jnp.float32))


def _observe_backward(sums: Any, g: jax.Array) -> Any:
    return g, *sums


_observe.defvjp(_observe_forward, _observe_backward)
