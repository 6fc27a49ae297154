"""The parts of a cross-entropy over a large vocabulary: which implementation runs, and how it cuts the work.

Three ways to compose them (T tokens, V columns, products of ``2 T D V`` operations each):

- value only: `lse_and_target`, one product, nothing of size T x V;
- value and gradient at once: `exponentials`, `gradients_of_exponentials` (in place), then ``dx = dz w^T`` and, for a
  trained head, ``dw = x^T dz``: two products or three, and one 16-bit array ``[T, V]``, or ``[chunk, V]`` over chunks
  of tokens with a frozen head;
- gradient later, in slabs of the vocabulary: `lse_and_target`, then `logit_gradients` for each slab and the same two
  products: three or four, and one 16-bit array ``[T, slab]``; the slabs of ``dw`` are each written once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import kernel, reference, tiles
from pallas_kernels.packed_matmul import on_hopper

Implementation = Literal["mosaic_gpu", "reference"]
_DTYPES = (jnp.bfloat16, jnp.float16)


class Statistics(NamedTuple):
    """What the loss of each row needs of its logits; float32 ``[T]`` each.

    Attributes:
      lse: natural logarithm of the sum of their exponentials.
      target: the label's logit, 0 where the label is no column.
      total: their sum, or None.
    """

    lse: jax.Array
    target: jax.Array
    total: jax.Array | None


class Slopes(NamedTuple):
    """The derivatives of a loss by what it is made of: of row t by its logit z is ``softmax[t] p(z) - everywhere[t]``,
    less ``label[t]`` at the label; float32 ``[T]`` each.

    Attributes:
      softmax: derivatives by the lse.
      label: by the label's logit, negated.
      everywhere: by the sum of the logits, negated; None is 0.
    """

    softmax: jax.Array
    label: jax.Array
    everywhere: jax.Array | None = None


def slopes_of_loss(
    scale: jax.Array, lse: jax.Array, vocabulary: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Slopes:
    """Returns the slopes of ``sum(scale * loss)``, where the loss of a row is ``lse - (1 - label_smoothing) target -
    label_smoothing total / V + z_loss lse^2``.

    Args:
      scale: float32 ``[T]``, 0 for rows that do not count.
      lse: float32 ``[T]``.
      vocabulary: V.
      label_smoothing: weight of the uniform distribution.
      z_loss: weight of the squared lse.
    """
    everywhere = scale * (label_smoothing / vocabulary) if label_smoothing else None
    return Slopes(scale * (1 + 2 * z_loss * lse), scale * (1 - label_smoothing), everywhere)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "peaks", "statistics"), meta_fields=("width",)
)
@dataclasses.dataclass(frozen=True)
class Exponentials:
    """Exponentials of logits, relative to the largest one of their row among ``width`` columns.

    Attributes:
      values: 16-bit float ``[T, V]``.
      peaks: float32 ``[ceil(V / width), T]``, those largest logits.
      statistics: of the rows.
      width: columns that share a peak.
    """

    values: jax.Array
    peaks: jax.Array
    statistics: Statistics
    width: int


def unsupported(x: Any, w: Any, *, w_axis: int = 0) -> list[str]:
    """Returns why the Mosaic GPU kernels cannot take the operands; empty if they can.

    Args:
      x: ``[T, D]``, anything with a shape and a dtype.
      w: ``[D, V]`` (``w_axis=0``) or ``[V, D]`` (``w_axis=1``).
      w_axis: see ``w``.
    """
    reasons = []
    if x.dtype not in _DTYPES or w.dtype != x.dtype:
        reasons.append(f"x is {x.dtype} and w is {w.dtype}; the kernels read two bfloat16 or two float16 arrays")
    if x.shape[1] % kernel.DEPTH:
        reasons.append(f"D is {x.shape[1]}, which is no multiple of {kernel.DEPTH}")
    multiple = 8 if w_axis else 64
    if w.shape[1 - w_axis] % multiple:
        layout = "[V, D]" if w_axis else "[D, V]"
        reasons.append(f"w is {layout} with V = {w.shape[1 - w_axis]}, which is no multiple of {multiple}")
    return reasons


def heuristic(tokens: int, depth: int) -> kernel.Config:
    """Returns how to cut the product of ``[tokens, depth]`` with a head."""
    if depth < 2048:
        return kernel.Config(rows=128, columns=128, schedule="turns", stages=6, cluster=1, band=16)
    return kernel.Config(rows=64, columns=256, schedule="rows", stages=4, cluster=1, band=min(16, -(-tokens // 128)))


def multiprocessors() -> int:
    """Returns how many multiprocessors the default device has, 132 if it is no GPU."""
    device = jax.devices()[0]
    return int(getattr(device, "core_count", 132)) if device.platform == "gpu" else 132


def _takes_kernel(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None,
    w_axis: int,
    implementation: Implementation | None,
) -> bool:
    """Returns whether the kernel runs; raises if operands do not fit each other, or if it was asked for and cannot."""
    if w_axis not in (0, 1) or x.ndim != 2 or w.ndim != 2 or w.shape[w_axis] != x.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.shape} do not fit [T, D] and a head with D on axis {w_axis}")
    if labels.shape != x.shape[:1] or (bias is not None and bias.shape != (w.shape[1 - w_axis],)):
        got = None if bias is None else bias.shape
        raise ValueError(
            f"expected labels {x.shape[:1]} and a bias {(w.shape[1 - w_axis],)}, got {labels.shape}, {got}"
        )
    reasons = unsupported(x, w, w_axis=w_axis)
    if implementation == "mosaic_gpu" and reasons:
        raise ValueError(f"the linear_cross_entropy kernels cannot run: {'; '.join(reasons)}")
    return implementation == "mosaic_gpu" or (implementation is None and not reasons and on_hopper())


def _joined(numbers: jax.Array, tokens: int) -> tuple[jax.Array, Statistics]:
    """Returns the peaks ``[tiles, T]`` and the statistics of whole rows from those of tiles."""
    peaks, sums, targets, *totals = (numbers[:, i, :tokens] for i in range(numbers.shape[1]))
    peak = jnp.max(peaks, axis=0)
    lse = peak + jnp.log(jnp.sum(sums * jnp.exp(peaks - peak), axis=0))
    return peaks, Statistics(lse, jnp.sum(targets, axis=0), jnp.sum(totals[0], axis=0) if totals else None)


def _reduced(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None,
    softcap: float | None,
    w_axis: int,
    total: bool,
    dense: bool,
    config: kernel.Config | None,
    interpret: bool,
) -> tuple[list[jax.Array], jax.Array, Statistics, int]:
    """Returns the exponentials (if ``dense``), the peaks of tiles, the statistics, and the columns of a tile."""
    vocabulary = w.shape[1 - w_axis]
    config = config or heuristic(*x.shape)
    numbers, *values = kernel.product(
        x,
        w,
        [jnp.where(labels < vocabulary, labels, -1).astype(jnp.int32)],
        None if bias is None else bias.astype(jnp.float32),
        functools.partial(
            tiles.statistics,
            softcap=softcap,
            vocabulary=vocabulary if vocabulary % config.block_columns else None,
            total=total,
            dense=dense,
        ),
        w_axis=w_axis,
        start=0,
        columns=vocabulary,
        numbers=4 if total else 3,
        dense=dense,
        config=config,
        blocks=multiprocessors(),
        interpret=interpret,
    )
    peaks, statistics = _joined(numbers, x.shape[0])
    return values, peaks, statistics, config.columns


def lse_and_target(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    w_axis: int = 0,
    total: bool = False,
    implementation: Implementation | None = None,
    config: kernel.Config | None = None,
    interpret: bool = False,
) -> Statistics:
    """Returns what the loss needs of the logits ``softcap * tanh((x @ w + bias) / softcap)``.

    Args:
      x: bfloat16 or float16 ``[T, D]``, D a multiple of 64; the reference takes any float.
      w: the same dtype, ``[D, V]`` (``w_axis=0``, V a multiple of 64) or ``[V, D]`` (``w_axis=1``, of 8).
      labels: int32 ``[T]``; one that is no column, such as -100, has target 0.
      bias: float ``[V]`` or None.
      softcap: cap of the logits or None.
      w_axis: the axis of ``w`` of size D.
      total: whether to return the sum of the logits too, for label smoothing.
      implementation: ``"mosaic_gpu"`` (Hopper) or ``"reference"`` (all logits in memory); None takes the kernel on a
        Hopper GPU where it can run, else the reference.
      config: how the kernel cuts the work; None decides by the sizes.
      interpret: run the kernel in the interpreter on a CPU.

    Returns:
      The statistics; products are summed in float32.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    if not _takes_kernel(x, w, labels, bias, w_axis, implementation):
        z = reference.logits(x, w, bias=bias, softcap=softcap, w_axis=w_axis)
        return _statistics(z, labels, total)
    return _reduced(
        x,
        w,
        labels,
        bias=bias,
        softcap=softcap,
        w_axis=w_axis,
        total=total,
        dense=False,
        config=config,
        interpret=interpret,
    )[2]


def _statistics(z: jax.Array, labels: jax.Array, total: bool) -> Statistics:
    target = jnp.sum(jnp.where(reference.is_label(labels, z.shape[1]), z, 0.0), axis=1)
    return Statistics(jax.nn.logsumexp(z, axis=1), target, jnp.sum(z, axis=1) if total else None)


def exponentials(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    w_axis: int = 0,
    total: bool = False,
    implementation: Implementation | None = None,
    config: kernel.Config | None = None,
    interpret: bool = False,
) -> Exponentials:
    """Returns exponentials of the logits, for `gradients_of_exponentials`, and the statistics; see `lse_and_target`."""
    if not _takes_kernel(x, w, labels, bias, w_axis, implementation):
        z = reference.logits(x, w, bias=bias, softcap=softcap, w_axis=w_axis)
        peak = jnp.max(z, axis=1)
        values = jnp.exp(z - peak[:, None]).astype(x.dtype)
        return Exponentials(values, peak[None], _statistics(z, labels, total), z.shape[1])
    (values,), peaks, statistics, width = _reduced(
        x,
        w,
        labels,
        bias=bias,
        softcap=softcap,
        w_axis=w_axis,
        total=total,
        dense=True,
        config=config,
        interpret=interpret,
    )
    return Exponentials(values, peaks, statistics, width)


def gradients_of_exponentials(
    made: Exponentials, labels: jax.Array, slopes: Slopes, *, softcap: float | None = None
) -> jax.Array:
    """Returns the gradient of a loss for the logits before their cap; see `logit_gradients`.

    One pass over the exponentials, in their memory if nothing else reads them and T is even. Their rounding does no
    harm to a label that is almost sure: a probability above one half is that of the row's largest logit, whose
    exponential is exactly 1.

    Args:
      made: by `exponentials`.
      labels: int32 ``[T]``.
      slopes: of the loss.
      softcap: as given to `exponentials`.

    Returns:
      ``[T, V]`` in the dtype of the exponentials.

    Raises:
      ValueError: ``softcap`` with a slope everywhere where exponentials of capped logits can underflow.
    """
    values = made.values
    tokens, vocabulary = values.shape
    if softcap is not None and slopes.everywhere is not None and 2 * softcap > -math.log(jnp.finfo(values.dtype).tiny):
        raise ValueError(
            f"logits capped at {softcap} have exponentials that underflow in {values.dtype}; with a slope everywhere "
            "take logit_gradients"
        )

    def of_rows(values: jax.Array, peaks: jax.Array, lse: jax.Array, labels: jax.Array, slopes: Slopes) -> jax.Array:
        e = values.astype(jnp.float32)
        p = e * jnp.repeat(jnp.exp(peaks - lse[:, None]), made.width, axis=1)[:, :vocabulary]
        is_label = reference.is_label(labels, vocabulary)
        dz = p * slopes.softmax[:, None] - jnp.where(is_label, slopes.label[:, None], 0.0)
        if slopes.everywhere is not None:
            dz = dz - slopes.everywhere[:, None]
        if softcap is not None:
            z = jnp.log(e) + jnp.repeat(peaks, made.width, axis=1)[:, :vocabulary]
            dz = dz * (1 - (jnp.maximum(z, -softcap) / softcap) ** 2)
        return dz.astype(values.dtype)

    rest = (made.peaks.T, made.statistics.lse, labels, slopes)
    if tokens % 2:
        return of_rows(values, *rest)
    size = tokens // 2

    def of_half(i: jax.Array, values: jax.Array) -> jax.Array:
        rows = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, i * size, size), (values, *rest))
        return jax.lax.dynamic_update_slice_in_dim(values, of_rows(*rows), i * size, 0)

    # A loop works in place, whereas XLA gives no result the memory of one of several results of a kernel.
    return jax.lax.fori_loop(0, 2, of_half, values)


def logit_gradients(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    lse: jax.Array,
    slopes: Slopes,
    *,
    start: int | jax.Array = 0,
    columns: int | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    w_axis: int = 0,
    implementation: Implementation | None = None,
    config: kernel.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient of a loss for a slab of ``x @ w + bias``, the logits before their cap.

    Differences are taken in float32.

    Args:
      x: see `lse_and_target`.
      w: see `lse_and_target`; the whole head.
      labels: int32 ``[T]``.
      lse: float32 ``[T]``, of all columns.
      slopes: of the loss, for example of `slopes_of_loss`.
      start: first column of the slab, a multiple of 256; may be traced.
      columns: of the slab; None takes all that follow a ``start`` that is an int.
      bias: float ``[V]`` or None.
      softcap: cap of the logits or None.
      w_axis: the axis of ``w`` of size D.
      implementation: see `lse_and_target`.
      config: see `lse_and_target`.
      interpret: run the kernel in the interpreter on a CPU.

    Returns:
      ``[T, columns]`` in the dtype of ``x``.

    Raises:
      ValueError: as `lse_and_target`, or a slab that does not lie in the vocabulary.
    """
    vocabulary = w.shape[1 - w_axis]
    if isinstance(start, int):
        columns = vocabulary - start if columns is None else columns
        if start % 256 or start < 0 or columns < 1 or start + columns > vocabulary:
            raise ValueError(f"columns {start} to {start + columns} of {vocabulary} are no slab that starts at n * 256")
    elif columns is None:
        raise ValueError("a traced start needs a number of columns")
    if not _takes_kernel(x, w, labels, bias, w_axis, implementation):
        z = reference.logits(x, w, bias=bias, softcap=softcap, w_axis=w_axis)
        dz = reference.logit_gradients(z, labels, lse, *slopes, softcap=softcap)
        return jax.lax.dynamic_slice_in_dim(dz, start, columns, axis=1).astype(x.dtype)
    per_row = [labels.astype(jnp.int32), lse * kernel.LOG2E, slopes.softmax, slopes.label]
    if slopes.everywhere is not None:
        per_row.append(slopes.everywhere)
    (dz,) = kernel.product(
        x,
        w,
        per_row,
        None if bias is None else bias.astype(jnp.float32),
        functools.partial(tiles.gradients, softcap=softcap, smoothed=slopes.everywhere is not None),
        w_axis=w_axis,
        start=start,
        columns=columns,
        numbers=0,
        dense=True,
        config=config or heuristic(*x.shape),
        blocks=multiprocessors(),
        interpret=interpret,
    )
    return dz
