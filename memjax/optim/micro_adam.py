"""MicroAdam: Adam on the largest gradients of the last steps, with what was left out kept in 4 bits.

A step adds the kept error to the gradient, takes the largest elements of every block out of it into a ring of the last
steps, and keeps the rest in 4 bits. The moments are made anew from the ring, so nothing moves but what it holds.
Source: Modoranu et al., "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and Provable Convergence"
(2024). Bytes: `micro_adam_state_bytes`, for large leaves ``d / 2 + 4 * window * density * d`` and the error's ranges.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.codecs.grouped import Grouped
from memjax.codecs.packed import Packed
from memjax.core.roles import check_trained
from memjax.optim.quantized_state import LEAST, encode

BLOCK = 2**14
"""Elements among which the largest are chosen, so that a place fits 16 bits."""


class Ring(NamedTuple):
    """What MicroAdam keeps of a large leaf of ``blocks`` blocks.

    Attributes:
      places: within a block of the elements of the last steps, uint16 ``[window, blocks, k]``.
      values: bfloat16 ``[window, blocks, k]``; the row of step t is ``t % window``.
      error: what was left out, `Packed` 4-bit codes of ``[blocks, block]``.
    """

    places: jax.Array
    values: jax.Array
    error: Packed


class Moments(NamedTuple):
    """Plain Adam's moments of a small leaf, float32, of the leaf's shape."""

    mu: jax.Array
    nu: jax.Array


class MicroAdamState(NamedTuple):
    """State of all leaves.

    Attributes:
      count: steps taken, int32 ``[]``.
      leaves: tree like the parameters of `Ring` (large leaves) or `Moments`.
    """

    count: jax.Array  # type: ignore[assignment]
    leaves: Any


class _Cut(NamedTuple):
    blocks: int
    block: int
    k: int


def _cut(shape: tuple[int, ...], density: float, group: int, least: int) -> _Cut | None:
    """Returns how a leaf is cut, or None for a small one; the last block is filled up with zeros."""
    size = math.prod(shape)
    if size < least:
        return None
    blocks = -(-size // BLOCK)
    block = -(-size // (blocks * group)) * group
    return _Cut(blocks, block, max(1, math.ceil(block * density)))


def _codec(group: int) -> Grouped:
    return Grouped(4, group, False, "bfloat16")


def micro_adam_state_bytes(
    params: Any, density: float = 0.01, window: int = 10, group: int = 256, least: int = LEAST
) -> int:
    """Returns the bytes of the state.

    Of a large leaf of ``d`` elements (filled up to whole blocks): ``d / 2`` codes and ``4 d / group`` for their ranges,
    and ``4 * window * k`` per block; of a small one 8 per element; 4 for the count.
    """
    total = 4
    for leaf in jax.tree.leaves(params):
        cut = _cut(tuple(leaf.shape), density, group, least)
        if cut is None:
            total += 8 * math.prod(leaf.shape)
        else:
            size = cut.blocks * cut.block
            total += size // 2 + 4 * size // group + 4 * window * cut.k * cut.blocks
    return total


def scale_by_micro_adam(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    density: float = 0.01,
    window: int = 10,
    group: int = 256,
    least: int = LEAST,
) -> optax.GradientTransformation:
    """Returns MicroAdam's direction.

    Args:
      b1, b2: decay of the moments, scalars.
      eps: added to the root of the second moment.
      density: of the elements of a block that a step takes.
      window: steps that are kept.
      group: elements of the error that share a range.
      least: elements below which a leaf has plain Adam's moments.

    Returns:
      A transform with `MicroAdamState`.

    Raises:
      ValueError: a density out of (0, 1], no step in the window, or groups that do not fill bytes.
    """
    if not 0 < density <= 1 or window < 1 or group < 2 or group % 2:
        raise ValueError(
            f"expected a density in (0, 1], a window of 1 or more and an even group, got {density}, {window}, {group}"
        )

    def start(p: Any) -> Any:
        cut = _cut(tuple(p.shape), density, group, least)
        if cut is None:
            return Moments(jnp.zeros(p.shape, jnp.float32), jnp.zeros(p.shape, jnp.float32))
        scales, offsets = (jnp.zeros((cut.blocks, cut.block // group), jnp.uint16) for _ in range(2))
        codes = jnp.zeros((cut.blocks, cut.block // 2), jnp.uint8)
        error = Packed((codes,), scales, offsets, _codec(group), (-1,), jnp.dtype(jnp.float32))
        rows = (window, cut.blocks, cut.k)
        return Ring(jnp.zeros(rows, jnp.uint16), jnp.zeros(rows, jnp.bfloat16), error)

    def init(params: Any) -> MicroAdamState:
        check_trained(params, floats=False)
        return MicroAdamState(jnp.zeros((), jnp.int32), jax.tree.map(start, params))

    def update(updates: Any, state: MicroAdamState, params: Any = None) -> tuple[Any, MicroAdamState]:
        del params
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return (m / (1 - b1**steps)) / (jnp.sqrt(v / (1 - b2**steps)) + eps)

        def step(g: jax.Array, held: Any) -> tuple[jax.Array, Any]:
            slope = g.astype(jnp.float32)
            if isinstance(held, Moments):
                m = b1 * held.mu + (1 - b1) * slope
                v = b2 * held.nu + (1 - b2) * (slope * slope)
                return direction(m, v).astype(g.dtype), Moments(m, v)
            blocks, block = held.error.shape
            flat = jnp.pad(slope.reshape(-1), (0, blocks * block - g.size)).reshape(blocks, block)
            whole = flat + held.error.decode()
            _, places = jax.lax.top_k(jnp.abs(whole), held.places.shape[-1])
            values = jnp.take_along_axis(whole, places, -1)
            rest = jnp.put_along_axis(whole, places, 0.0, axis=-1, inplace=False)
            row = state.count % window
            new_places = held.places.at[row].set(places.astype(jnp.uint16))
            new_values = held.values.at[row].set(values.astype(jnp.bfloat16))
            ages = ((row - jnp.arange(window)) % window).astype(jnp.float32)
            valid = ages < steps
            at = jnp.moveaxis(new_places, 0, 1).astype(jnp.int32)  # [blocks, window, k]
            taken = jnp.moveaxis(new_values, 0, 1).astype(jnp.float32)

            def moment(b: Any, powers: jax.Array) -> jax.Array:
                weights = jnp.where(valid, (1 - b) * b**ages, 0.0)
                added = (weights[:, None] * powers).reshape(blocks, -1)
                rows = jnp.arange(blocks)[:, None]
                return jnp.zeros((blocks, block), jnp.float32).at[rows, at.reshape(blocks, -1)].add(added)

            found = direction(moment(b1, taken), moment(b2, taken * taken))
            found = found.reshape(-1)[: g.size].reshape(g.shape)
            return found.astype(g.dtype), Ring(new_places, new_values, encode(rest, held.error))

        tree: Any = jax.tree.structure(updates)
        made = [step(*leaves) for leaves in zip(tree.flatten_up_to(updates), tree.flatten_up_to(state.leaves))]
        found, leaves = (jax.tree.unflatten(tree, [row[i] for row in made]) for i in range(2))
        return found, MicroAdamState(count, leaves)

    return optax.GradientTransformation(init, update)


def micro_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    *,
    density: float = 0.01,
    window: int = 10,
    group: int = 256,
    least: int = LEAST,
) -> optax.GradientTransformation:
    """Returns MicroAdam; arguments as in `scale_by_micro_adam` and `optax.adamw`."""
    return optax.chain(
        scale_by_micro_adam(b1, b2, eps, density=density, window=window, group=group, least=least),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
