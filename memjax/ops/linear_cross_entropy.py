"""The cross-entropy of a linear output layer, for which the logits of all tokens never exist.

Logits are made in tiles of some tokens and some of the vocabulary, and the log-sum-exp of a row is kept up to date from
tile to tile. What is differentiated decides how:

- A frozen head costs two products, as it does with all logits at hand. Forward sums the rows of the head by softmax
  while it goes over the tiles, as attention sums values, and keeps that sum, one array like the inputs; backward scales
  it and adds the label's row. No gradient of the head exists.
- A trained head costs four: backward makes the tiles again, each all tokens by a part of the vocabulary, so that a
  tile's part of the head's gradient is complete and is written once. Or three, where the tile may be as large as all
  logits (``chunk``): then they are kept in float32 from forward to backward, and there are no others.
- A head that is a weight view is never cut: tiles are some tokens by the whole vocabulary.

On a Hopper GPU kernels do as much for dense heads in 16 bits without writing logits in float32: what is written are
exponentials or gradients, in 16 bits, with a frozen head of a block of tokens by the whole vocabulary.

A gradient by logits is made in float32, softmax minus one-hot included, and rounded once. At the label it is taken from
the sum of the other probabilities, so that it is exact where the label's own is near 1.

The online sum is that of FlashAttention (2022) and the tiles are those of "Cut Your Losses in Large-Vocabulary Language
Models" (2024), without its filter of small gradients.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.codecs.fused import whole_arrays
from memjax.core import is_view, jaxpr_compat, operation, register_rule
from pallas_kernels import linear_cross_entropy as kernels
from pallas_kernels.packed_matmul import on_hopper

Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["mosaic_gpu", "xla", "reference"]

TILE = 2**24
"""Logits of a tile by default."""
FROZEN_TOKENS, TRAINED_ENTRIES, VIEW_TOKENS = 2048, 4096, 512
"""Shapes of tiles by default: most tokens at a frozen head, fewest of the vocabulary at a trained one, tokens at a
view. Cutting the head costs a copy per block of tokens, and adding to the sums a pass over them per part of the
vocabulary."""
KERNEL_TILE, KERNEL_ENTRIES = 2**26, 8192
"""Likewise for the kernels: numbers of a tile at a frozen head, which have 16 bits, and entries at a trained one."""
LOW = float(jnp.finfo(jnp.float32).min)


def linear_cross_entropy(
    x: jax.Array,
    w: Any,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    w_axis: int = 0,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: jax.Array | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    axis_name: str | None = None,
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Cross-entropy of ``labels`` under ``softmax(x @ w + bias)``, without the logits of all tokens.

    Products run in the dtype of ``x`` and sum in float32; all else is float32. A frozen head or input costs no
    gradient. Under `memjax.lift` the head may be a weight view, packed or adapted. Reverse mode only.

    Args:
      x: ``[..., D]``, float.
      w: ``[D, V]`` or ``[V, D]``, float; give a tied embedding as it is stored, for a transposed one is a copy.
      labels: int32 ``[...]``.
      bias: ``[V]``, float; None adds none.
      w_axis: the axis of ``w`` of size D, 0 or 1.
      ignore_index: label of tokens that do not count.
      softcap: logits ``z`` become ``softcap * tanh(z / softcap)``; None leaves them.
      label_smoothing: part of the target that is spread evenly over the vocabulary, 0 to 1.
      z_loss: factor of the squared log-sum-exp that is added to every token's loss.
      weights: float ``[...]``, factors of the tokens' losses; None is 1 for all.
      reduction: "mean" divides the sum by the sum of the weights of tokens that count, and is 0 where that is 0;
        "none" gives the loss of every token, 0 where it does not count.
      return_lse: return the log-sum-exp of every token's logits too.
      axis_name: in a shard_map, the mesh axis over which the vocabulary is cut: ``w`` and ``bias`` are this shard's
        part, ``x`` and ``labels`` are the same on all shards of the axis, and so is what is returned.
      chunk: how many tokens' logits may exist at a time, as numbers: a tile has up to ``chunk * V`` logits of any
        tokens. None takes tiles of 2**24 logits or a little more. With a trained head that is no view, ``chunk`` of at
        least the number of tokens saves a product.
      implementation: "mosaic_gpu": kernels for dense heads in bfloat16 or float16 on a Hopper GPU; "xla"; "reference"
        makes all logits and leaves the gradient to autodiff. None takes the kernels where they run, else "xla".

    Returns:
      float32 scalar, or ``[...]`` with reduction "none"; with ``return_lse`` a pair with a float32 ``[...]``.

    Raises:
      ValueError: shapes that do not fit, a setting out of its range, or "mosaic_gpu" where it cannot run.
      TypeError: a weight view outside `memjax.lift`.
    """
    _check(x, w, labels, bias, weights, w_axis, softcap, label_smoothing, reduction, chunk, implementation)
    shape, entries = labels.shape, w.shape[1 - w_axis]
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    counted = labels != ignore_index
    if axis_name is not None:
        first = entries * lax.axis_index(axis_name)
        entries *= lax.axis_size(axis_name)
        wanted = jnp.where(counted, labels - first, -1)
    else:
        wanted = jnp.where(counted, labels, -1)
    options = _Options(w_axis, softcap, label_smoothing > 0, chunk, implementation)
    terms = functools.partial(_reference, options=options) if implementation == "reference" else _operation(options)
    lse, target, total = terms(x, w, wanted, *([] if bias is None else [bias]))
    if axis_name is not None:
        largest = lax.pmax(lax.stop_gradient(lse), axis_name)
        lse = largest + jnp.log(lax.psum(jnp.exp(lse - largest), axis_name))
        target, total = lax.psum((target, total), axis_name)
    loss = lse - (1 - label_smoothing) * target
    if label_smoothing:
        loss -= label_smoothing / entries * total
    if z_loss:
        loss += z_loss * lse**2
    share = counted.astype(jnp.float32)
    if weights is not None:
        share *= weights.reshape(-1).astype(jnp.float32)
    loss = share * jnp.where(counted, loss, 0.0)
    if reduction == "none":
        loss = loss.reshape(shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            count = share.sum()
            loss = loss / jnp.where(count == 0, 1.0, count)
    return (loss, lse.reshape(shape)) if return_lse else loss


def _check(
    x: Any,
    w: Any,
    labels: Any,
    bias: Any,
    weights: Any,
    w_axis: int,
    softcap: float | None,
    label_smoothing: float,
    reduction: str,
    chunk: int | None,
    implementation: str | None,
) -> None:
    if is_view(w):
        raise TypeError(
            f"w is a weight view ({type(w).__name__}), not an array: call the function that uses it as "
            "memjax.lift(fn)(params, ...)"
        )
    if w_axis not in (0, 1) or w.ndim != 2:
        raise ValueError(f"expected w of two axes and w_axis 0 or 1, got w {w.shape} and w_axis={w_axis}")
    if x.shape[:-1] != labels.shape or w.shape[w_axis] != x.shape[-1]:
        expected = "[..., D], [D, V]" if w_axis == 0 else "[..., D], [V, D]"
        raise ValueError(f"x {x.shape}, w {w.shape} and labels {labels.shape} do not fit {expected} and [...]")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if bias is not None and bias.shape != (w.shape[1 - w_axis],):
        raise ValueError(f"bias {bias.shape} must have the shape {(w.shape[1 - w_axis],)}")
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of the labels, {labels.shape}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be 0 to 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if implementation not in (None, "mosaic_gpu", "xla", "reference"):
        raise ValueError(f"implementation={implementation!r} must be 'mosaic_gpu', 'xla', 'reference' or None")


class _Options(NamedTuple):
    """What a program is made for: settings of `linear_cross_entropy`, and whether the sum of the logits is asked."""

    w_axis: int
    softcap: float | None
    total: bool
    chunk: int | None
    implementation: Implementation | None


_registering = threading.Lock()


def _operation(options: _Options) -> Callable[..., Any]:
    with _registering:  # functions are traced in threads too, and a name has one rule
        return _new_operation(options)


@functools.cache
def _new_operation(options: _Options) -> Callable[..., Any]:
    rule = functools.partial(_terms, options=options)
    name = f"linear_cross_entropy{tuple(options)}"
    register_rule(name, rule)
    return operation(name)(lambda *arrays: rule(lambda fn: fn, *arrays))


def _reference(x: jax.Array, w: jax.Array, labels: jax.Array, *bias: jax.Array, options: _Options) -> Any:
    z = _Head(lambda fn: fn, options).logits(x, w, bias[0] if bias else None)
    target = jnp.where(_is_label(z, labels), z, 0.0).sum(axis=-1)
    return jax.nn.logsumexp(z, axis=-1), target, z.sum(axis=-1) if options.total else None


def _is_label(z: jax.Array, labels: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, z.shape, 1) == labels[:, None]


@dataclass(frozen=True)
class _Head:
    """Products with the head, or with a tile of it."""

    lift: Callable[..., Any]
    options: _Options

    def _dot(self, x: jax.Array, w: Any, axis: int, dtype: Any) -> jax.Array:
        def dot(x: jax.Array, w: jax.Array) -> jax.Array:
            return lax.dot_general(x, w.astype(x.dtype), (((1,), (axis,)), ((), ())), preferred_element_type=dtype)

        return self.lift(dot)(x, w)

    def product(self, x: jax.Array, w: Any, dtype: Any) -> jax.Array:
        """Returns ``[T, D] -> [T, V]``."""
        return self._dot(x, w, self.options.w_axis, dtype)

    def pull(self, dz: jax.Array, w: Any) -> jax.Array:
        """Returns ``[T, V] -> [T, D]``, float32; at a view by its own gradient, which decodes no wide head at once."""
        if isinstance(w, jax.Array):
            return self._dot(dz, w, 1 - self.options.w_axis, jnp.float32)
        x = jaxpr_compat.vary_like(jnp.zeros((dz.shape[0], w.shape[self.options.w_axis]), dz.dtype), [dz])
        return jax.vjp(lambda x: self.product(x, w, x.dtype), x)[1](dz)[0].astype(jnp.float32)

    def push(self, x: jax.Array, dz: jax.Array, dtype: Any) -> jax.Array:
        """Returns the gradient of a dense head."""
        operands = (x, dz) if self.options.w_axis == 0 else (dz, x)
        narrow = dtype if dtype == x.dtype else jnp.float32
        return lax.dot_general(*operands, (((0,), (0,)), ((), ())), preferred_element_type=narrow).astype(dtype)

    def rows(self, w: Any, labels: jax.Array) -> jax.Array:
        """Returns the labels' rows ``[T, D]``, of any entry where a label is out of range."""
        axis = 1 - self.options.w_axis
        rows = self.lift(lambda w: jnp.take(w, labels, axis=axis, mode="clip"))(w)
        return rows if axis == 0 else rows.T

    def logits(self, x: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
        z = self.product(x, w, jnp.float32)
        if bias is not None:
            z += bias.astype(jnp.float32)
        cap = self.options.softcap
        return z if cap is None else cap * jnp.tanh(z / cap)

    def settings(self, bias: jax.Array | None) -> dict[str, Any]:
        """Returns what the kernels are told of the logits."""
        return {"bias": bias, "softcap": self.options.softcap, "w_axis": self.options.w_axis}

    def slope(self, z: jax.Array) -> jax.Array | float:
        """Returns the derivative of the cap, by capped logits."""
        cap = self.options.softcap
        return 1.0 if cap is None else 1 - (z / cap) ** 2

    def cut(self, w: Any, bias: jax.Array | None, start: Any, size: int) -> tuple[Any, jax.Array | None]:
        """Returns the part of a dense head, or all of a view, and of the bias."""
        axis = 1 - self.options.w_axis
        if size == w.shape[axis]:
            return w, bias
        part = lax.dynamic_slice_in_dim(w, start, size, axis)
        return part, bias if bias is None else lax.dynamic_slice_in_dim(bias, start, size)


class _Terms(NamedTuple):
    """What forward finds out about every token.

    Attributes:
      lse: float32 ``[T]``, the log-sum-exp of its logits.
      target: float32 ``[T]``, its label's logit, 0 without a label.
      total: float32 ``[T]``, the sum of its logits, if asked.
      rest: float32 ``[T]``, the probability of all but the label.
      pulled: ``[T, D]`` in the dtype of ``x``, the head's rows but the label's, summed by probability (and by the slope
        of the cap), if asked.
      evenly: ``[T, D]`` likewise, all rows summed by the slope of the cap, if asked and there is a cap.
    """

    lse: jax.Array
    target: jax.Array
    total: jax.Array | None
    rest: jax.Array
    pulled: jax.Array | None
    evenly: jax.Array | None


class _Slopes(NamedTuple):
    """The loss's derivatives by `_Terms`, float32 ``[T]`` each, None where there is none."""

    lse: jax.Array
    target: jax.Array
    total: jax.Array | None

    def at_label(self, rest: jax.Array) -> jax.Array:
        """Returns the derivative by the label's logit; of a plain loss, exactly ``-rest`` times that by the loss."""
        return (self.lse + self.target) - self.lse * rest

    def for_kernels(self) -> kernels.Slopes:
        return kernels.Slopes(self.lse, -self.target, None if self.total is None else -self.total)


def _over(body: Callable[[Any, Any, int], Any], carry: Any, size: int, part: int) -> Any:
    """Returns ``carry`` after ``body(carry, start, length)`` of every part of ``range(size)``; the last is shorter."""
    count, left = divmod(size, part)
    if count == 1:
        carry = body(carry, 0, part)
    else:
        carry = lax.fori_loop(0, count, lambda i, carry: body(carry, i * part, part), carry)
    return body(carry, size - left, left) if left else carry


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """Returns ``[T, ...]`` as ``[n, block, ...]``, filled up with zeros."""
    count = -(-x.shape[0] // block)
    padding = [(0, count * block - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, block, *x.shape[1:])


def _joined(tree: Any, tokens: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], tree)


def _forward(
    head: _Head, x: jax.Array, w: Any, bias: jax.Array | None, labels: jax.Array, pull: bool, block: int, part: int
) -> _Terms:
    """Returns the terms of all tokens, by tiles of ``block`` tokens and ``part`` entries of the vocabulary."""
    tokens, entries = x.shape[0], w.shape[1 - head.options.w_axis]
    total, capped = head.options.total, head.options.softcap is not None

    def of_block(rows: tuple[jax.Array, jax.Array]) -> _Terms:
        x, labels = rows

        def step(carry: Any, start: Any, size: int) -> Any:
            largest, rest, target, total, pulled, evenly = carry
            w_part, bias_part = head.cut(w, bias, start, size)
            z = head.logits(x, w_part, bias_part)
            is_label = _is_label(z, labels - start)
            new = jnp.maximum(largest, z.max(axis=-1))
            shrink = jnp.exp(largest - new)
            p = jnp.where(is_label, 0.0, jnp.exp(z - new[:, None]))
            rest = rest * shrink + p.sum(axis=-1)
            target += jnp.where(is_label, z, 0.0).sum(axis=-1)
            if total is not None:
                total += z.sum(axis=-1)
            if pulled is not None:
                pulled = pulled * shrink[:, None] + head.pull((p * head.slope(z)).astype(x.dtype), w_part)
            if evenly is not None:
                evenly += head.pull(jnp.asarray(head.slope(z), x.dtype), w_part)
            return new, rest, target, total, pulled, evenly

        row, matrix = jnp.zeros(x.shape[0]), jnp.zeros(x.shape)
        start: tuple[Any, ...] = (row + LOW, row, row, row if total else None)
        start += (matrix if pull else None, matrix if pull and total and capped else None)
        start = jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, [x]), start)
        largest, rest, target, summed, pulled, evenly = _over(step, start, entries, part)
        own = jnp.where((labels >= 0) & (labels < entries), jnp.exp(target - largest), 0.0)
        mass = rest + own
        if pulled is not None:
            pulled = (pulled / mass[:, None]).astype(x.dtype)
        if evenly is not None:
            evenly = evenly.astype(x.dtype)
        return _Terms(largest + jnp.log(mass), target, summed, rest / mass, pulled, evenly)

    if block == tokens:
        return of_block((x, labels))
    return _joined(lax.map(of_block, (_blocks(x, block), _blocks(labels, block))), tokens)


def _by_logits(head: _Head, z: jax.Array, labels: jax.Array, lse: jax.Array, rest: jax.Array, by: _Slopes) -> jax.Array:
    """Returns the loss's derivatives by a tile of logits (before the cap); labels count from the tile's first entry."""
    dz = by.lse[:, None] * jnp.exp(z - lse[:, None])
    dz = jnp.where(_is_label(z, labels), by.at_label(rest)[:, None], dz)
    if by.total is not None:
        dz += by.total[:, None]
    return dz if head.options.softcap is None else dz * head.slope(z)


class _Kept(NamedTuple):
    """What backward gets: the inputs, the terms, all capped logits or None, and what is differentiated.

    What is differentiated is a flag for ``x``, for each leaf of the head, and for the bias.
    """

    x: jax.Array
    w: Any
    labels: jax.Array
    bias: jax.Array | None
    found: _Terms
    z: jax.Array | None
    moves_x: int
    moves_w: tuple[int, ...]
    moves_bias: int


def _forward_at_once(head: _Head, x: jax.Array, w: Any, bias: jax.Array | None, labels: jax.Array) -> Any:
    """Returns the terms of all tokens and all logits."""
    z = head.logits(x, w, bias)
    is_label = _is_label(z, labels)
    largest = z.max(axis=-1)
    p = jnp.exp(z - largest[:, None])
    rest, own = jnp.where(is_label, 0.0, p).sum(axis=-1), jnp.where(is_label, p, 0.0).sum(axis=-1)
    target = jnp.where(is_label, z, 0.0).sum(axis=-1)
    total = z.sum(axis=-1) if head.options.total else None
    return _Terms(largest + jnp.log(rest + own), target, total, rest / (rest + own), None, None), z


def _kernels_run(x: jax.Array, w: Any, options: _Options) -> bool:
    """Returns whether the kernels take this head; raises if they were asked for and do not."""
    if options.implementation == "xla":
        return False
    reasons = [] if on_hopper() else ["the default device is no Hopper GPU"]
    if not isinstance(w, jax.Array):
        reasons.append("the head is a weight view")
    else:
        reasons += kernels.unsupported(x, w, w_axis=options.w_axis)
    if not whole_arrays():
        reasons.append("XLA would have to cut them along a mesh")
    if jax.typeof(x).manual_axis_type.varying:
        reasons.append("it is inside a shard_map that checks what varies")
    if options.implementation == "mosaic_gpu" and reasons:
        raise ValueError(f"the linear_cross_entropy kernels cannot run: {'; '.join(reasons)}")
    return not reasons


def _of_statistics(made: kernels.Statistics, labels: jax.Array, entries: int, pulled: jax.Array | None) -> _Terms:
    rest = jnp.where((labels >= 0) & (labels < entries), -jnp.expm1(made.target - made.lse), 1.0)
    return _Terms(made.lse, made.target, made.total, rest, pulled, None)


def _forward_by_kernels(
    head: _Head, x: jax.Array, w: jax.Array, bias: jax.Array | None, labels: jax.Array, pull: bool
) -> _Terms:
    """Returns the terms of all tokens; with ``pull``, by blocks of tokens whose probabilities exist in 16 bits."""
    tokens, entries = x.shape[0], w.shape[1 - head.options.w_axis]
    settings = head.settings(bias) | {"total": head.options.total}
    if not pull:
        return _of_statistics(kernels.lse_and_target(x, w, labels, **settings), labels, entries, None)

    def of_block(x: jax.Array, labels: jax.Array) -> _Terms:
        made = kernels.exponentials(x, w, labels, **settings)
        of_label = jnp.exp(made.statistics.target - made.statistics.lse)
        slopes = kernels.Slopes(jnp.ones_like(of_label), of_label)
        p = kernels.gradients_of_exponentials(made, labels, slopes, softcap=head.options.softcap)
        return _of_statistics(made.statistics, labels, entries, head.pull(p, w).astype(x.dtype))

    block = _part(head.options.chunk or KERNEL_TILE // entries, tokens)
    block = -(-block // 8) * 8  # kernels write multiples of 8 rows, and to cut some off would be a copy
    if block >= tokens:
        terms = of_block(*(_blocks(rows, block)[0] for rows in (x, labels)))
        return jax.tree.map(lambda leaf: leaf[:tokens], terms)

    def add(i: Any, found: _Terms) -> _Terms:
        start = jnp.minimum(i * block, tokens - block)  # the last block may take some tokens again, but is as long
        terms = of_block(*(lax.dynamic_slice_in_dim(rows, start, block) for rows in (x, labels)))
        return jax.tree.map(lambda all, some: lax.dynamic_update_slice_in_dim(all, some, start, 0), found, terms)

    row = jnp.zeros(tokens)
    empty = _Terms(row, row, row if head.options.total else None, row, jnp.zeros(x.shape, x.dtype), None)
    empty = jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, [x]), empty)
    return lax.fori_loop(0, -(-tokens // block), add, empty)


Gradients = tuple[Any, Any, Any]  # by x, by w (a list of its leaves' for a view) and by bias; None where not asked


def _backward_frozen(head: _Head, found: _Terms, w: Any, labels: jax.Array, by: _Slopes) -> jax.Array:
    """Returns the gradient by ``x`` of a head of which nothing is trained."""
    assert found.pulled is not None
    entries = w.shape[1 - head.options.w_axis]
    at_label = jnp.where((labels >= 0) & (labels < entries), by.at_label(found.rest), 0.0) * head.slope(found.target)
    dx = by.lse[:, None] * found.pulled + at_label[:, None] * head.rows(w, labels)
    if by.total is not None:
        evenly = found.evenly
        if evenly is None:
            evenly = head.pull(jnp.ones((1, entries), found.pulled.dtype), w)
        dx += by.total[:, None] * evenly
    return dx.astype(found.pulled.dtype)


def _backward_tiles(head: _Head, kept: _Kept, by: _Slopes, part: int, by_kernels: bool) -> Gradients:
    """Returns the gradients at a dense head by tiles of all tokens and ``part`` entries, made again."""
    x, w, labels, bias, found = kept.x, kept.w, kept.labels, kept.bias, kept.found
    axis = 1 - head.options.w_axis

    def add(carry: Any, start: Any, size: int) -> Any:
        dx, dw, dbias = carry
        w_part, bias_part = head.cut(w, bias, start, size)
        if by_kernels:
            slab = {"start": start, "columns": size} | head.settings(bias)
            dz = low = kernels.logit_gradients(x, w, labels, found.lse, by.for_kernels(), **slab)
        else:
            z = head.logits(x, w_part, bias_part)
            dz = _by_logits(head, z, labels - start, found.lse, found.rest, by)
            low = dz.astype(x.dtype)
        if dx is not None:
            dx += head.pull(low, w_part)
        if dw is not None:
            dw = lax.dynamic_update_slice_in_dim(dw, head.push(x, low, w.dtype), start, axis)
        if dbias is not None:
            sums = dz.sum(axis=0, dtype=jnp.float32).astype(dbias.dtype)
            dbias = lax.dynamic_update_slice_in_dim(dbias, sums, start, 0)
        return dx, dw, dbias

    start = (
        jnp.zeros(x.shape, jnp.float32) if kept.moves_x else None,
        jnp.zeros(w.shape, w.dtype) if any(kept.moves_w) else None,
        jnp.zeros(bias.shape, bias.dtype) if bias is not None and kept.moves_bias else None,
    )
    start = jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, [x]), start)
    dx, dw, dbias = _over(add, start, w.shape[axis], part)
    return None if dx is None else dx.astype(x.dtype), dw, dbias


def _backward_at_once(head: _Head, kept: _Kept, by: _Slopes) -> Gradients:
    """Returns the gradients at a dense head from all logits: by ``x`` an eighth of the tokens at a time, by the head a
    sixteenth of the vocabulary."""
    x, w, bias, found = kept.x, kept.w, kept.bias, kept.found
    axis = 1 - head.options.w_axis
    all_z: Any = kept.z
    rows = (all_z, kept.labels, found.lse, found.rest, by)

    def by_x(dx: jax.Array, start: Any, size: int) -> jax.Array:
        part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), rows)
        low = _by_logits(head, *part).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(dx, head.pull(low, w).astype(x.dtype), start, 0)

    def by_head(carry: Any, start: Any, size: int) -> Any:
        dw, dbias = carry
        z = lax.dynamic_slice_in_dim(all_z, start, size, 1)
        dz = _by_logits(head, z, kept.labels - start, found.lse, found.rest, by)
        if dw is not None:
            dw = lax.dynamic_update_slice_in_dim(dw, head.push(x, dz.astype(x.dtype), w.dtype), start, axis)
        if dbias is not None:
            dbias = lax.dynamic_update_slice_in_dim(dbias, dz.sum(axis=0).astype(dbias.dtype), start, 0)
        return dw, dbias

    start = (
        jnp.zeros_like(x) if kept.moves_x else None,
        jnp.zeros(w.shape, w.dtype) if any(kept.moves_w) else None,
        jnp.zeros(bias.shape, bias.dtype) if bias is not None and kept.moves_bias else None,
    )
    dx, *rest = jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, [x]), start)
    if dx is not None:
        dx = _over(by_x, dx, x.shape[0], _part(x.shape[0] // 8, x.shape[0]))
    dw, dbias = _over(by_head, tuple(rest), w.shape[axis], _part(w.shape[axis] // 16, w.shape[axis]))
    return dx, dw, dbias


def _backward_of_exponentials(head: _Head, kept: _Kept, made: kernels.Exponentials, by: _Slopes) -> Gradients:
    """Returns the gradients at a dense head from all exponentials, whose memory becomes that of their gradient."""
    x, w, bias = kept.x, kept.w, kept.bias
    dz = kernels.gradients_of_exponentials(made, kept.labels, by.for_kernels(), softcap=head.options.softcap)
    dx = head.pull(dz, w).astype(x.dtype) if kept.moves_x else None
    dw = head.push(x, dz, w.dtype) if any(kept.moves_w) else None
    if bias is None or not kept.moves_bias:
        return dx, dw, None
    return dx, dw, dz.sum(axis=0, dtype=jnp.float32).astype(bias.dtype)


def _backward_view(head: _Head, kept: _Kept, by: _Slopes, block: int) -> Gradients:
    """Returns the gradients at a head with trained leaves by blocks of tokens, whose logits are made again."""
    x, w, bias, found = kept.x, kept.w, kept.bias, kept.found
    values, tree = jax.tree.flatten(w)
    trained = [value for value, moves in zip(values, kept.moves_w) if moves]

    def product(x: jax.Array, trained: list[jax.Array]) -> jax.Array:
        rest = iter(trained)
        leaves = [next(rest) if moves else value for value, moves in zip(values, kept.moves_w)]
        return head.product(x, jax.tree.unflatten(tree, leaves), x.dtype)

    def add(sums: Any, rows: Any) -> tuple[Any, Any]:
        x, labels, lse, rest, by = rows
        dz = _by_logits(head, head.logits(x, w, bias), labels, lse, rest, by)
        dx, grads = jax.vjp(product, x, trained)[1](dz.astype(x.dtype))
        grads = grads, dz.sum(axis=0) if kept.moves_bias else None
        return jax.tree.map(lambda total, grad: total + grad, sums, grads), dx if kept.moves_x else None

    sums: Any = [jnp.zeros(value.shape, jnp.float32) for value in trained]
    sums = sums, jnp.zeros(bias.shape, jnp.float32) if bias is not None and kept.moves_bias else None
    sums = jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, [x]), sums)
    rows = jax.tree.map(lambda leaf: _blocks(leaf, block), (x, kept.labels, found.lse, found.rest, by))
    (sums, dbias), dx = lax.scan(add, sums, rows)
    totals = iter(total.astype(value.dtype) for total, value in zip(sums, trained))
    leaves = [next(totals) if moves else None for moves in kept.moves_w]
    return _joined(dx, x.shape[0]), leaves, None if dbias is None or bias is None else dbias.astype(bias.dtype)


def _part(size: int, whole: int) -> int:
    """Returns the size of the fewest about equal parts of up to about ``size``, in multiples of 128 unless smaller."""
    part = -(-whole // -(-whole // max(1, min(size, whole))))
    return min(whole, part if part < 128 else -(-part // 128) * 128)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _terms(
    lift: Callable[..., Any], x: jax.Array, w: Any, labels: jax.Array, *biases: jax.Array, options: _Options
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns ``lse``, ``target`` and ``total`` of `_Terms`.

    Args:
      lift: makes a function of arrays take the head.
      x: ``[T, D]``.
      w: the head, an array or an opaque view.
      labels: int32 ``[T]``, out of range where there is none.
      biases: the bias, if there is one.
      options: settings.
    """
    arrays = jax.tree.leaves((x, w, labels, biases))
    x, w, labels, biases = jax.tree.map(lambda leaf: jaxpr_compat.vary_like(leaf, arrays), (x, w, labels, biases))
    head, dense, chunk = _Head(lift, options), isinstance(w, jax.Array), options.chunk
    tokens, entries = x.shape[0], w.shape[1 - options.w_axis]
    run_kernels = _kernels_run(x, w, options)
    # Exponentials that underflow do not tell the slope of a cap.
    exponentials = run_kernels and not (options.total and options.softcap is not None)
    keep = dense and chunk is not None and chunk >= tokens and (exponentials or not run_kernels)
    tile = TILE if chunk is None else chunk * entries
    block = _part(FROZEN_TOKENS if dense else chunk or VIEW_TOKENS, tokens)
    part = _part(tile // block, entries) if dense else entries
    trained_block = tokens if dense else block
    trained_part = _part(max(tile // tokens, 1 if chunk else TRAINED_ENTRIES), entries) if dense else entries
    if run_kernels:  # a slab starts at a multiple of 256
        trained_part = min(entries, -(-(chunk * entries // tokens if chunk else KERNEL_ENTRIES) // 256) * 256)
    tree: Any = jax.tree.structure(w)

    @jax.custom_vjp
    def terms(x: jax.Array, w: Any, labels: jax.Array, bias: jax.Array | None) -> Any:
        if run_kernels:
            return _forward_by_kernels(head, x, w, bias, labels, False)[:3]
        return _forward(head, x, w, bias, labels, False, block, part)[:3]

    def forward(*primals: Any) -> tuple[Any, Any]:
        moves = [[leaf.perturbed for leaf in jax.tree.leaves(primal, is_leaf=_is_primal)] for primal in primals]
        x, w, labels, bias = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
        z = peaks = None
        width = 0
        if not any((*moves[1], *moves[3])):
            if exponentials:
                found = _forward_by_kernels(head, x, w, bias, labels, True)
            else:
                found = _forward(head, x, w, bias, labels, True, block, part)
        elif keep and run_kernels:
            made = kernels.exponentials(x, w, labels, **head.settings(bias), total=options.total)
            found = _of_statistics(made.statistics, labels, entries, None)
            z, peaks, width = made.values, made.peaks, made.width
        elif keep:
            found, z = _forward_at_once(head, x, w, bias, labels)
        elif run_kernels:
            found = _forward_by_kernels(head, x, w, bias, labels, False)
        else:
            found = _forward(head, x, w, bias, labels, False, trained_block, trained_part)
        # What is differentiated must not change the structure, for jax takes that of one trace for another's: what is
        # absent is an array without elements, and so is what is no array, as a shape.
        optional = [jnp.zeros(0) if leaf is None else leaf for leaf in (found.pulled, found.evenly, z, peaks)]
        facts = [jnp.zeros((int(fact), 0)) for fact in (*moves[0], *moves[1], any(moves[3]), width)]
        return found[:3], ((x, w, labels, bias), found[:4], optional, facts)

    def backward(kept: Any, cotangents: Any) -> tuple[Any, Any, None, Any]:
        lse, target, total = (None if _is_zero(cotangent) else cotangent for cotangent in cotangents)
        zero = jnp.zeros(tokens)
        by = _Slopes(zero if lse is None else lse, zero if target is None else target, total)
        (x, w, labels, bias), found, optional, facts = kept
        pulled, evenly, z, peaks = (leaf if leaf.size else None for leaf in optional)
        moves_x, *moves_w, moves_bias, width = (fact.shape[0] for fact in facts)
        gathered = _Terms(*(*found, pulled, evenly))
        kept = _Kept(x, w, labels, bias, gathered, z, moves_x, tuple(moves_w), moves_bias)
        if not any((*moves_w, moves_bias)):
            dx = _backward_frozen(head, kept.found, w, labels, by)
            return dx, jax.tree.unflatten(tree, [None] * tree.num_leaves), None, None
        if not dense:
            dx, grads, dbias = _backward_view(head, kept, by, block)
        else:
            if kept.z is None:
                dx, dw, dbias = _backward_tiles(head, kept, by, trained_part, run_kernels)
            elif peaks is not None:
                made = kernels.Exponentials(kept.z, peaks, kernels.Statistics(*found[:3]), width)
                dx, dw, dbias = _backward_of_exponentials(head, kept, made, by)
            else:
                dx, dw, dbias = _backward_at_once(head, kept, by)
            grads = [dw]
        return dx, jax.tree.unflatten(tree, grads), None, dbias

    terms.defvjp(forward, backward, symbolic_zeros=True)
    return terms(x, w, labels, biases[0] if biases else None)


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
