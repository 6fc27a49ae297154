"""Many LoRA adapters on one base: a batch whose rows choose their adapter, and adapters added up or averaged.

Sources: Punica: Multi-Tenant LoRA Serving, 2023; S-LoRA: Serving Thousands of Concurrent LoRA Adapters, 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from memjax.adapters.adapter import Adapter, Theta, adapted, check_known
from memjax.adapters.lora import Lora, lora
from memjax.core.paths import leaf_paths, map_with_path
from memjax.core.views import Axes, WeightView, is_view
from memjax.weights import Adapted, Anchored, Delta, Dense, LowRank, axes_of
from memjax.weights.dense import in_order, product

Loaded = tuple[Adapter, Any, Theta]
"""(adapter, frozen, theta) as `load` returns them."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "index"], meta_fields=[])
@dataclass(frozen=True)
class PerRow(Delta):
    """For every row of a batch the low-rank product of the adapter that the row's index names.

    The rows of an operand are ``[B, ...]``, or flattened: any number of rows that B divides.

    Attributes:
      a: ``[*batch, n, *inputs, r]`` of n adapters.
      b: ``[*batch, n, r, *outputs]``.
      index: int32 ``[*batch, B]``, or ``[*batch]`` for one adapter in all rows; -1 for none.
    """

    a: jax.Array
    b: jax.Array
    index: jax.Array

    def dot(self, x: jax.Array, axes: Axes, *, transpose: bool, dtype: Any, **settings: Any) -> jax.Array:
        def pick_dot(pick: LowRank, x: jax.Array) -> jax.Array:
            return pick.dot(x, axes, transpose=transpose, dtype=dtype, **settings)

        contracted = len(axes.outputs if transpose else axes.inputs)

        def one(delta: PerRow, x: jax.Array) -> jax.Array:
            rows = x.shape[: x.ndim - contracted]
            blocks, index = delta._blocks(x, rows)
            y = delta._products(pick_dot, blocks, index)
            return y.reshape(*rows, *y.shape[2:])

        for _ in range(self.a.ndim - len(axes.inputs) - 2):
            one = jax.vmap(one)
        return one(self, x)

    def take(self, indices: jax.Array, axes: Axes, *, axis: int, dtype: Any) -> jax.Array:
        blocks, index = self._blocks(indices, indices.shape)
        own = jnp.maximum(index, 0)
        if (axis,) == axes.inputs:
            rows, other, contract, rest = (
                self.a[own[:, None], blocks],
                self.b[own],
                -1 - len(axes.outputs),
                axes.outputs,
            )
        else:
            rows, other, contract, rest = self.b[own[:, None], :, blocks], self.a[own], -1, axes.inputs
        y = product(rows.astype(dtype), other.astype(dtype), contract=(contract,), batch_ndim=1)
        y = in_order(_where_any(index, y), rest, tuple(sorted(rest)))
        return y.reshape(*indices.shape, *y.shape[2:])

    def conv(
        self, x: jax.Array, axes: Axes, *, permutation: tuple[int, ...], dtype: Any, params: dict[str, Any]
    ) -> jax.Array:
        numbers = params["dimension_numbers"]
        of_x, of_y = numbers.lhs_spec[0], numbers.out_spec[0]

        def convolve(pick: LowRank, images: jax.Array) -> jax.Array:
            images = jnp.moveaxis(images, 0, of_x)
            return jnp.moveaxis(pick.conv(images, axes, permutation=permutation, dtype=dtype, params=params), of_y, 0)

        images = jnp.moveaxis(x, of_x, 0)
        blocks, index = self._blocks(images, images.shape[:1])
        y = self._gathered(convolve, blocks, index)
        return jnp.moveaxis(y.reshape(len(images), *y.shape[2:]), 0, of_y)

    def materialize(self, axes: Axes) -> jax.Array:
        raise TypeError("every row of the batch has its own adapter, so there is no one weight to materialise")

    def specs(self, spec: tuple[Any, ...], axes: Axes) -> Any:
        batch = spec[: len(spec) - axes.ndim]
        a = PartitionSpec(*batch, None, *(spec[axis] for axis in axes.inputs), None)
        b = PartitionSpec(*batch, None, None, *(spec[axis] for axis in axes.outputs))
        return PerRow(a, b, PartitionSpec(*batch))  # type: ignore[arg-type]

    def _blocks(self, x: jax.Array, rows: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Returns ``x [*rows, ...]`` as ``[B, T, ...]``, and the index ``[B]``."""
        index = self.index.reshape(-1)
        size = math.prod(rows)
        if (rows[0] if rows else 1) % len(index):
            raise ValueError(
                f"the index names an adapter for each of {len(index)} rows, but the operand has rows {tuple(rows)}: "
                "its first axis must be the batch, alone or flattened with what follows it"
            )
        return x.reshape(len(index), size // len(index), *x.shape[len(rows) :]), index

    def _products(self, fn: Callable[..., jax.Array], x: jax.Array, index: jax.Array) -> jax.Array:
        """Returns ``fn(adapter of the block, block)`` for the blocks of ``x [B, T, ...]``.

        Picking copies the factors once per block, which is little beside x where a block has r rows or more. Shorter
        blocks are, if there are many, first brought together by adapter, in blocks of as many rows as adapters have on
        average: then the copies are at most about twice the stack. (`jax.lax.ragged_dot` would copy nothing, but
        except on TPU it multiplies every row by every adapter.)
        """
        n, rank = self.b.shape[:2]
        (count, length), rows = x.shape[:2], x.shape[0] * x.shape[1]
        size = -(-rows // n)
        blocks = rows // size + n + 1
        if length >= rank or count <= blocks:
            return self._gathered(fn, x, index)
        group = jnp.where(index < 0, n, jnp.minimum(index, n - 1)).repeat(length)
        counts = jnp.bincount(group, length=n + 1)
        first_row, ends = jnp.cumsum(counts) - counts, jnp.cumsum(-(-counts // size))
        order = jnp.argsort(group)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(rows)) - first_row[group]  # of a row within its group
        slot = (ends - -(-counts // size))[group] * size + place
        owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
        flat = x.reshape(rows, *x.shape[2:])
        blocked = jnp.zeros((blocks * size, *flat.shape[1:]), x.dtype).at[slot].set(flat, unique_indices=True)
        y = self._gathered(fn, blocked.reshape(blocks, size, *flat.shape[1:]), jnp.where(owner < n, owner, -1))
        return y.reshape(blocks * size, *y.shape[2:])[slot].reshape(count, length, *y.shape[2:])

    def _gathered(self, fn: Callable[..., jax.Array], x: jax.Array, index: jax.Array) -> jax.Array:
        own = jnp.maximum(index, 0)
        return _where_any(index, jax.vmap(fn)(LowRank(self.a[own], self.b[own], 1.0), x))


def _where_any(index: jax.Array, y: jax.Array) -> jax.Array:
    """Returns ``y [B, ...]`` with zeros where the index is negative."""
    return jnp.where((index >= 0).reshape(-1, *[1] * (y.ndim - 1)), y, 0)


def stack(params: Any, adapters: Sequence[Loaded]) -> Theta:
    """Stacks adapters of one base, for `attach_stack`.

    Ranks may differ: the smaller ones are padded with zeros. A weight that an adapter lacks is zero for it. The scale
    of each adapter is multiplied into its ``b``.

    Args:
      params: the tree that all adapters adapt.
      adapters: (adapter, frozen, theta) of each, as `load` and `memjax.models.load_peft` return them; of methods that
        add one low-rank product to the frozen weight.

    Returns:
      Logical path -> ``{"a": [*batch, n, *inputs, r], "b": [*batch, n, r, *outputs]}`` of n adapters.

    Raises:
      ValueError: no adapters, or one that is not the base plus one low-rank product; names the leaf.
    """
    deltas, axes = _deltas(params, adapters)
    stacked: Theta = {}
    for path, found in deltas.items():
        batch = found[0][1].a.ndim - len(axes[path].inputs) - 1
        rank = max(delta.a.shape[-1] for _, delta in found)
        a = [jnp.zeros((*found[0][1].a.shape[:-1], rank), found[0][1].a.dtype)] * len(adapters)
        shape = found[0][1].b.shape
        b = [jnp.zeros((*shape[:batch], rank, *shape[batch + 1 :]), found[0][1].b.dtype)] * len(adapters)
        for i, delta in found:
            a[i] = _padded(delta.a, -1, rank)
            b[i] = _padded(_scaled(delta.b, delta.scale), batch, rank)
        stacked[path] = {"a": jnp.stack(a, batch), "b": jnp.stack(b, batch)}
    return stacked


def attach_stack(params: Any, stacked: Theta, index: jax.Array, axes: Mapping[str, Any] | None = None) -> Any:
    """Returns ``params`` with stacked adapters attached, of which every row of a batch has its own.

    Call the model under `memjax.lift` with the result, as with `Adapter.attach`. Other values of ``index`` need no new
    compilation, nor do other adapters of the same shapes.

    Args:
      params: the frozen tree.
      stacked: what `stack` returned.
      index: int32 ``[B]``, the adapter of each sequence of a batch whose first axis is B, also where the model
        flattens it with the axes that follow; or a scalar, one adapter for all. -1 is none.
      axes: pattern -> (input axes, output axes) of weights that are not ``[*batch, in, out]``.

    Raises:
      ValueError: a path that ``params`` lacks, factors that do not fit, an index that is no adapter's.
      TypeError: an index that is not of integers.
    """
    check_known(stacked, params)
    if not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise TypeError(f"index must be of integers, got {jnp.result_type(index)}")
    if jnp.ndim(index) > 1:
        raise ValueError(f"index must be [B] or a scalar, got shape {jnp.shape(index)}")

    def adapt(path: str, leaf: Any) -> Any:
        if path not in stacked:
            return leaf
        if isinstance(leaf, Anchored):
            raise ValueError(f"{path}: prepared for {leaf.method}; attach that adapter before the stack")
        base = leaf if is_view(leaf) else Dense(leaf, axes_of(path, leaf.shape, axes))
        a, b = stacked[path]["a"], stacked[path]["b"]
        _check_stacked(path, base, a, b)
        batch = base.shape[: base.batch_ndim]
        if not isinstance(index, jax.core.Tracer):
            known, count = np.asarray(index), b.shape[len(batch)]
            if known.size and not -1 <= known.min() <= known.max() < count:
                raise ValueError(f"{path}: index must be -1 to {count - 1}, got {known.tolist()}")
        rows = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (*batch, *jnp.shape(index)))
        return adapted(base, PerRow(a, b, rows))

    return map_with_path(adapt, params)


def compose(params: Any, adapters: Sequence[Loaded], weights: Sequence[float] | None = None) -> tuple[Lora, Theta]:
    """Returns the one LoRA adapter whose delta is the weighted sum of those of others, exactly.

    The factors of the parts stand side by side, so its rank is the sum of theirs.

    Args:
      params: the tree that all adapters adapt.
      adapters: (adapter, frozen, theta) of each, as in `stack`.
      weights: of the sum; None means 1 for each.

    Returns:
      (adapter, theta): attach ``theta`` to ``params``.

    Raises:
      ValueError: no adapters, as many weights as not adapters, or one that is not the base plus one low-rank product.
    """
    weights = _checked(weights, len(adapters))
    deltas, axes = _deltas(params, adapters)
    theta: Theta = {}
    for path, found in deltas.items():
        batch = found[0][1].a.ndim - len(axes[path].inputs) - 1
        a = jnp.concatenate([delta.a for _, delta in found], -1)
        b = jnp.concatenate([_scaled(delta.b, weights[i] * delta.scale) for i, delta in found], batch)
        theta[path] = {"a": a, "b": b}
    ranks = {path: factors["a"].shape[-1] for path, factors in theta.items()}
    dtype = next(iter(theta.values()))["b"].dtype
    table = {path: tuple(group) for path, group in axes.items() if group != Axes()}
    return lora(ranks, targets=list(ranks), axes=table, dtype=dtype), theta


def average(thetas: Sequence[Theta], weights: Sequence[float] | None = None) -> Theta:
    """Returns the weighted mean of the factors of adapters that have the same settings, whatever their method.

    Args:
      thetas: trained factors of the same paths, names and shapes.
      weights: positive; they are divided by their sum. None means equal weights.

    Raises:
      ValueError: none, factors that differ in path or shape, or weights that do not fit.
    """
    weights = _checked(weights, len(thetas))
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"the weights of a mean must not be negative, and not all zero, got {list(weights)}")
    shapes = [{path: {k: x.shape for k, x in factors.items()} for path, factors in theta.items()} for theta in thetas]
    for i, other in enumerate(shapes):
        if other != shapes[0]:
            odd = next(path for path in {**shapes[0], **other} if shapes[0].get(path) != other.get(path))
            raise ValueError(
                f"{odd}: adapter 0 has factors {shapes[0].get(odd)} and adapter {i} has {other.get(odd)}; only equal "
                "shapes have a mean (compose adds adapters of any rank)"
            )
    total = sum(weights)
    return jax.tree.map(lambda *xs: sum(x * jnp.asarray(w / total, x.dtype) for x, w in zip(xs, weights)), *thetas)


def low_rank(path: str, view: Any, frozen: Any, method: str) -> LowRank:
    """Returns the one low-rank product that an adapter adds to a frozen weight.

    Args:
      path: for messages.
      view: what `Adapter.attach` put at ``path``.
      frozen: the weight as it was before the adapter, an array or a view.
      method: for messages.

    Raises:
      ValueError: ``view`` is anything else than ``frozen`` plus one low-rank product.
    """
    if isinstance(view, Adapted) and len(view.deltas) == 1 and isinstance(view.deltas[0], LowRank):
        base = view.base.array if isinstance(view.base, Dense) and not is_view(frozen) else view.base
        if base is frozen:
            return view.deltas[0]
    raise ValueError(f"{path}: {method} makes it something else than the frozen weight plus one low-rank product")


def _deltas(params: Any, adapters: Sequence[Loaded]) -> tuple[dict[str, list[tuple[int, LowRank]]], dict[str, Axes]]:
    """Returns path -> (number of the adapter, its low-rank product) of those that have one, and the paths' axes."""
    if not adapters:
        raise ValueError("expected one or more adapters, got none")
    before = dict(leaf_paths(params))
    deltas: dict[str, list[tuple[int, LowRank]]] = {}
    axes: dict[str, Axes] = {}
    for i, (adapter, frozen, theta) in enumerate(adapters):
        check_known(theta, params)
        attached = dict(leaf_paths(adapter.attach(frozen, theta)))
        for path in theta:
            delta = low_rank(path, attached[path], before[path], adapter.method)
            deltas.setdefault(path, []).append((i, delta))
            if axes.setdefault(path, attached[path].axes) != attached[path].axes:
                raise ValueError(f"{path}: adapters with axes {axes[path]} and {attached[path].axes}")
    return deltas, axes


def _checked(weights: Sequence[float] | None, count: int) -> Sequence[float]:
    if count == 0:
        raise ValueError("expected one or more adapters, got none")
    if weights is not None and len(weights) != count:
        raise ValueError(f"expected {count} weights, one for each adapter, got {list(weights)}")
    return [1.0] * count if weights is None else weights


def _check_stacked(path: str, base: WeightView, a: jax.Array, b: jax.Array) -> None:
    batch = base.shape[: base.batch_ndim]
    inputs, outputs = (tuple(base.shape[axis] for axis in group) for group in base.axes)
    lead, rank = (*batch, b.shape[len(batch)] if b.ndim > len(batch) else 0), a.shape[-1]
    wanted = ((*lead, *inputs, rank), (*lead, rank, *outputs))
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise ValueError(
            f"{path}: expected stacked factors of shapes {wanted[0]} and {wanted[1]} for a weight of shape "
            f"{base.shape}, got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _scaled(b: jax.Array, scale: float) -> jax.Array:
    return b if scale == 1 else b * jnp.asarray(scale, b.dtype)
