"""Masks of pruned weights, kept as bits, and optax transforms that leave what is pruned at zero.

A mask is one bit per weight, packed along the last axis: uint8 ``[..., ceil(n / 8)]`` for a weight ``[..., n]``; a set
bit keeps the weight. Sources: Sparse Fine-tuning for Inference Acceleration of Large Language Models, 2023 (fixed
masks); To prune, or not to prune, 2017 (the cubic schedule).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.core.paths import Patterns, leaf_paths, map_with_path, select
from memjax.core.views import Axes, is_view
from memjax.weights import axes_of
from memjax.weights.quantize import check_table

Masks = dict[str, jax.Array]
Score = str | Callable[[str, jax.Array], jax.Array]


def pack_mask(keep: jax.Array) -> jax.Array:
    """Returns the bits uint8 ``[..., ceil(n / 8)]`` of a bool mask ``[..., n]``."""
    return jnp.packbits(keep, axis=-1)


def unpack_mask(bits: jax.Array, n: int) -> jax.Array:
    """Returns the bool mask ``[..., n]`` of its bits."""
    return jnp.unpackbits(bits, axis=-1, count=n).astype(bool)


def prune(
    params: Any,
    amount: float | str,
    where: Patterns = "**/kernel",
    *,
    score: Score = "magnitude",
    fraction: float = 1.0,
    masks: Masks | None = None,
    axes: Mapping[str, Any] | None = None,
) -> tuple[Any, Masks]:
    """Sets the least important weights to zero, in every matrix of a stack alike.

    Args:
      params: any pytree; the selected leaves are dense arrays.
      amount: share of a matrix's weights that is pruned, in [0, 1); or ``"n:m"``, such as ``"2:4"``, which keeps the n
        best of every m consecutive weights along the input axes.
      where: pattern(s) over logical paths, or a predicate of (path, leaf).
      score: ``"magnitude"``, or a function of (path, weight) that returns the importance of every weight.
      fraction: for ``"n:m"``, the share of a matrix's groups that is pruned: those that lose the least.
      masks: earlier masks; what they pruned stays pruned.
      axes: pattern -> input and output axes, for weights that are not ``[*batch, in, out]``.

    Returns:
      (params with zeros, path -> bits of the mask).

    Raises:
      ValueError: an amount or fraction out of range, groups that do not divide, a pattern that matches nothing.
      TypeError: a selected leaf that is a weight view.
    """
    pattern = _pattern(amount)
    if pattern is None and fraction != 1.0:
        raise ValueError(f"fraction={fraction} is for 'n:m' patterns; lower the amount, which is {amount}")
    share = fraction if pattern else amount
    if not 0 <= float(share) <= 1 or (pattern is None and share == 1):
        raise ValueError(f"expected an amount in [0, 1) and a fraction in [0, 1], got {amount=}, {fraction=}")
    chosen = set(select(params, where))
    check_table(params, axes)
    new: Masks = {}

    def cut(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        earlier = None if masks is None or path not in masks else unpack_mask(masks[path], leaf.shape[-1])
        keep = _keep(path, leaf, pattern, share, score, earlier, axes)
        new[path] = pack_mask(keep)
        return jnp.where(keep, leaf, 0)

    return map_with_path(cut, params), new


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> optax.Schedule:
    """Returns the schedule ``final + (initial - final) (1 - t)^3`` where t runs from 0 at ``begin`` to 1 at ``end``.

    Args:
      final, initial: shares that are pruned at the end and at the beginning.
      begin, end: steps.

    Raises:
      ValueError: shares outside [0, 1], or an end that is not after the beginning.
    """
    if not (0 <= initial <= final <= 1 and 0 <= begin < end):
        raise ValueError(f"expected 0 <= {initial=} <= {final=} <= 1 and 0 <= {begin=} < {end=}")

    def share(step: Any) -> jax.Array:
        left = 1 - jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
        return final + (initial - final) * left**3

    return share


class MaskedState(NamedTuple):
    """The masks that a transform applies."""

    masks: Masks  # path -> uint8 bits


def masked_updates(masks: Masks) -> optax.GradientTransformation:
    """Returns a transform that makes pruned weights exactly zero; the last of a chain.

    The masks live in its state, so that a jitted step takes them as arguments.

    Args:
      masks: path -> bits, as `prune` returns them, by the paths of the trained tree; other leaves pass.
    """

    def init(params: Any) -> MaskedState:
        leaves = dict(leaf_paths(params))
        for path, bits in masks.items():
            if path not in leaves:
                raise ValueError(f"the masks name {path}, which is no leaf of the trained tree")
            shape = (*leaves[path].shape[:-1], -(-leaves[path].shape[-1] // 8))
            if bits.shape != shape or bits.dtype != jnp.uint8:
                raise ValueError(f"{path}: expected mask bits uint8{list(shape)}, got {bits.dtype}{list(bits.shape)}")
        return MaskedState(dict(masks))

    def update(updates: Any, state: MaskedState, params: Any = None) -> tuple[Any, MaskedState]:
        return _apply(updates, state.masks, params), state

    return optax.GradientTransformation(init, update)


class GradualState(NamedTuple):
    """Steps done, and the masks so far."""

    step: jax.Array  # int32 scalar
    masks: Masks  # path -> uint8 bits


def gradual(
    schedule: optax.Schedule,
    where: Patterns = "**/kernel",
    *,
    pattern: str | None = None,
    every: int = 100,
    score: Score = "magnitude",
    axes: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Returns a transform that prunes more and more while training; the last of a chain.

    At every step that is a multiple of ``every`` the masks grow to what the schedule says, by the weights of that
    moment; what is pruned stays exactly zero. It sorts every matrix at those steps.

    Args:
      schedule: step -> share that is pruned, such as `cubic`; of the weights, or with a pattern of its groups.
      where: pattern(s) over the paths of the trained tree.
      pattern: None prunes single weights; ``"n:m"`` prunes groups, those that lose the least first.
      every: steps between two growths of the masks.
      score, axes: as in `prune`.

    Raises:
      ValueError: settings out of range.
    """
    parsed = None if pattern is None else _pattern(pattern)
    if every < 1 or (pattern is not None and parsed is None):
        raise ValueError(f"expected every >= 1 and a pattern such as '2:4' or None, got {every=}, {pattern=}")

    def init(params: Any) -> GradualState:
        leaves = dict(leaf_paths(params))
        chosen = select(params, where)
        check_table(params, axes)
        for path in chosen:
            jax.eval_shape(lambda w, path=path: _keep(path, w, parsed, 0.0, score, None, axes), leaves[path])
        masks = {path: pack_mask(jnp.ones(leaves[path].shape, bool)) for path in chosen}
        return GradualState(jnp.zeros((), jnp.int32), masks)

    def update(updates: Any, state: GradualState, params: Any = None) -> tuple[Any, GradualState]:
        if params is None:
            raise ValueError("gradual masks need the params: tx.update(updates, state, params)")
        leaves = {path: leaf for path, leaf in leaf_paths(params) if path in state.masks}

        def grow(masks: Masks) -> Masks:
            share = schedule(state.step)
            return {
                path: pack_mask(_keep(path, w, parsed, share, score, unpack_mask(masks[path], w.shape[-1]), axes))
                for path, w in leaves.items()
            }

        masks = jax.lax.cond(state.step % every == 0, grow, lambda masks: masks, state.masks)
        return _apply(updates, masks, params), GradualState(state.step + 1, masks)

    return optax.GradientTransformation(init, update)


def _apply(updates: Any, masks: Masks, params: Any) -> Any:
    """Returns updates that take pruned weights to zero, whatever they are now."""
    if params is None:
        raise ValueError("masked updates need the params: tx.update(updates, state, params)")

    def mask(path: str, update: Any, w: Any) -> Any:
        if path not in masks:
            return update
        return jnp.where(unpack_mask(masks[path], w.shape[-1]), update, -w.astype(update.dtype))

    return map_with_path(mask, updates, params)


def _pattern(amount: Any) -> tuple[int, int] | None:
    """Returns (n, m) of ``"n:m"``, or None for a number."""
    if not isinstance(amount, str):
        return None
    found = re.fullmatch(r"(\d+):(\d+)", amount)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"expected a pattern such as '2:4' with 0 < n < m, got {amount!r}")
    return int(found[1]), int(found[2])


def _keep(
    path: str,
    w: Any,
    pattern: tuple[int, int] | None,
    share: Any,
    score: Score,
    earlier: jax.Array | None,
    axes: Mapping[str, Any] | None,
) -> jax.Array:
    """Returns the bool mask of a weight ``[*batch, ...]``, in its own axis order."""
    if is_view(w):
        raise TypeError(f"{path}: expected a dense array to prune, got {type(w).__name__}")
    own: Axes = axes_of(path, w.shape, axes)
    scores = jnp.abs(w) if score == "magnitude" else score(path, w) if callable(score) else None
    if scores is None:
        raise ValueError(f"score must be 'magnitude' or a function of (path, weight), got {score!r}")
    if scores.shape != w.shape:
        raise ValueError(f"{path}: expected scores of shape {w.shape}, got {scores.shape}")
    scores = scores.astype(jnp.float32)
    if earlier is not None:
        scores = jnp.where(earlier, scores, -jnp.inf)
    lead = w.ndim - own.ndim
    order = (*range(lead), *(w.ndim + axis for axis in own.outputs + own.inputs))
    moved = scores.transpose(order)
    matrices = moved.reshape(-1, math.prod(w.shape[lead:]))
    if pattern is None:
        keep = _highest(matrices, share)
    else:
        n, m = pattern
        d_in = math.prod(w.shape[axis] for axis in own.inputs)
        if d_in % m:
            raise ValueError(f"{path}: groups of {m} do not divide the {d_in} inputs of the weight")
        groups = matrices.reshape(len(matrices), -1, m)
        rank = jnp.argsort(jnp.argsort(groups, axis=-1), axis=-1)
        best = rank >= m - n
        lost = jnp.sum(jnp.where(best | jnp.isneginf(groups), 0, groups), axis=-1)
        done = jnp.sum(jnp.isneginf(groups), axis=-1) >= m - n  # pruned before, so they come first
        keep = (best | _highest(jnp.where(done, -jnp.inf, lost), share)[..., None]).reshape(matrices.shape)
    back = sorted(range(w.ndim), key=order.__getitem__)
    keep = keep.reshape(moved.shape).transpose(back)
    return keep if earlier is None else keep & earlier


def _highest(scores: jax.Array, share: Any) -> jax.Array:
    """Returns which of each row of ``scores [rows, n]`` are not the lowest ``share``; of equals the first is lower."""
    n = scores.shape[1]
    count = round(share * n) if isinstance(share, int | float) else jnp.round(share * n).astype(jnp.int32)

    def row(scores: jax.Array) -> jax.Array:
        return jnp.zeros(n, bool).at[jnp.argsort(scores)].set(jnp.arange(n) >= count)

    return jax.vmap(row)(scores)
