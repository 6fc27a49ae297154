"""Unstructured sparsity as bitmaps: one bit per element and the nonzero values, in tiles of 64 x 64.

Follows the bitmap formats of "SpInfer" (2025) and "Coruscant" (2025), successors of "Flash-LLM" (2023). Smaller than
Tiled-CSL at every density above 1/16, smaller than dense below 15/16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from memjax.core.views import Axes
from memjax.weights.decoded import Matrix, sizes_of, to_matrix

TILE = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "masks", "offsets"],
    meta_fields=["axes", "input_sizes", "inner_sizes", "dense_dtype"],
)
@dataclass(frozen=True)
class Bitmap(Matrix):
    """A weight of which the nonzero elements are stored, and a mask of where they are.

    The matrix ``[K, N]`` is cut into tiles of 64 x 64, the last ones padded with zeros. Values are ordered by tile
    column, tile row, column and row, so that a mesh can shard whole tile columns. The capacity of a tile column is the
    largest number of values that any of them (of any batch slice) holds, at least 1; the others end in zeros.

    Bytes, with ``t = ceil(K / 64)`` and ``s = ceil(N / 64)``: ``batch * (8 t N + 4 t s + s * capacity * value bytes)``.

    Attributes:
      values: ``[*batch, s, capacity]`` in their own dtype, which is that of the weight unless it was cast.
      masks: uint32 ``[*batch, 2 t, N]``; bit ``k % 32`` of word ``k // 32`` says whether row k is stored.
      offsets: int32 ``[*batch, t, s]``, the place of a tile's first value within its tile column.
      axes: input and output axes.
      input_sizes, inner_sizes: sizes of the input axes, and of the output axes but the first.
      dense_dtype: dtype of the dense weight.
    """

    values: jax.Array
    masks: jax.Array
    offsets: jax.Array
    axes: Axes
    input_sizes: tuple[int, ...]
    inner_sizes: tuple[int, ...]
    dense_dtype: Any

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dense_dtype)

    @property
    def lead(self) -> tuple[int, ...]:
        return (*self.masks.shape[:-2], self.masks.shape[-1])

    def matrix(self) -> jax.Array:
        decode: Callable[..., jax.Array] = functools.partial(_decode, rows=math.prod(self.input_sizes))
        for _ in range(self.masks.ndim - 2):
            decode = jax.vmap(decode)
        return decode(self.values, self.masks, _starts(self.masks, self.offsets)).astype(self.dtype)

    def rows(self, indices: jax.Array) -> jax.Array:
        word = indices // 32
        before = lax.population_count(self.masks[indices // TILE * 2]) * (word % 2)[:, None].astype(jnp.uint32)
        first = _starts(self.masks, self.offsets)[indices // TILE] + before.astype(jnp.int32)
        tile = jnp.arange(self.masks.shape[-1]) // TILE
        found = _pick(self.values, tile, self.masks[word], first, (indices % 32).astype(jnp.uint32)[:, None])
        return found.astype(self.dtype)

    def columns(self, indices: jax.Array) -> jax.Array:
        starts = _starts(self.masks, self.offsets)[:, indices]
        rows = math.prod(self.input_sizes)
        return _decode(self.values, self.masks[:, indices], starts, indices // TILE, rows=rows).astype(self.dtype)

    def astype(self, dtype: Any) -> Bitmap:
        return replace(self, dense_dtype=jnp.dtype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        batch, columns = self.shards(spec)
        if columns is not None and self.masks.shape[-1] % TILE:
            raise ValueError(f"a mesh cannot shard {self.masks.shape[-1]} columns, which are not whole tiles of {TILE}")
        specs: dict[str, Any] = {
            "values": PartitionSpec(*batch, columns, None),
            "masks": PartitionSpec(*batch, None, columns),
            "offsets": PartitionSpec(*batch, None, columns),
        }
        return replace(self, **specs)

    def check(self) -> None:
        super().check()
        *batch, n = self.lead
        t, s = -(-math.prod(self.input_sizes) // TILE), -(-n // TILE)
        capacity = self.values.shape[-1]
        expected = {"masks": (*batch, 2 * t, n), "offsets": (*batch, t, s), "values": (*batch, s, capacity)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {getattr(self, name).shape}")
        if self.masks.dtype != jnp.uint32 or self.offsets.dtype != jnp.int32:
            raise ValueError(f"expected uint32 masks, int32 offsets, got {self.masks.dtype}, {self.offsets.dtype}")


def encode(w: jax.Array, mask: jax.Array, axes: Axes) -> Bitmap:
    """Stores the elements of ``w`` where ``mask`` is true; both concrete, as the capacity depends on the mask.

    Args:
      w: floating ``[*batch, ...]``.
      mask: bool, shape of ``w``.
      axes: input and output axes.
    """
    matrix, mask = to_matrix(jnp.asarray(w), axes), to_matrix(jnp.asarray(mask), axes)
    *batch, k, n = matrix.shape
    pad = [(0, 0)] * len(batch) + [(0, -k % TILE), (0, -n % TILE)]
    counts = jnp.pad(mask, pad).reshape(*batch, -(-k // TILE), TILE, -(-n // TILE), TILE).sum((-3, -1))
    capacity = int(jnp.max(jnp.sum(counts, -2), initial=1))
    store: Callable[..., tuple[jax.Array, ...]] = functools.partial(_encode, capacity=capacity)
    for _ in batch:
        store = jax.vmap(store)
    values, masks, offsets = store(matrix, mask)
    return Bitmap(values, masks, offsets, axes, *sizes_of(w.shape, axes), jnp.dtype(w.dtype))


@functools.partial(jax.jit, static_argnames="capacity")
def _encode(w: jax.Array, mask: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    k, n = w.shape
    mask = jnp.pad(mask, ((0, -k % TILE), (0, 0)))
    bits = mask.reshape(-1, 32, n).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[:, None]
    masks = jnp.sum(bits, 1, dtype=jnp.uint32)
    in_column = jnp.cumsum(mask.reshape(-1, TILE, n), 1, dtype=jnp.int32)
    in_tile = jnp.pad(in_column[:, -1], ((0, 0), (0, -n % TILE))).reshape(in_column.shape[0], -1, TILE).sum(-1)
    offsets = jnp.cumsum(in_tile, 0, dtype=jnp.int32) - in_tile
    place = (_starts(masks, offsets)[:, None] + in_column - 1).reshape(-1, n)[:k]
    place = jnp.where(mask[:k], place, capacity)
    tile = jnp.broadcast_to(jnp.arange(n) // TILE, place.shape)
    values = jnp.zeros((offsets.shape[1], capacity), w.dtype).at[tile, place].set(w, mode="drop")
    return values, masks, offsets


def _starts(masks: jax.Array, offsets: jax.Array) -> jax.Array:
    """Returns int32 ``[*batch, t, N]``: where the first value of every column of every tile is in its tile column."""
    *batch, words, n = masks.shape
    counts = lax.population_count(masks).astype(jnp.int32).reshape(*batch, words // 2, 2, n).sum(-2)
    counts = jnp.pad(counts, [*[(0, 0)] * (len(batch) + 1), (0, -n % TILE)]).reshape(*counts.shape[:-1], -1, TILE)
    before = jnp.cumsum(counts, -1, dtype=jnp.int32) - counts + offsets[..., None]
    return before.reshape(*before.shape[:-2], -1)[..., :n]


def _decode(
    values: jax.Array, masks: jax.Array, starts: jax.Array, tile: jax.Array | None = None, *, rows: int
) -> jax.Array:
    """Decodes columns ``[rows, n]``, whose tile columns are ``tile``, in order by default."""
    words, n = masks.shape
    tile = jnp.arange(n) // TILE if tile is None else tile
    halves = lax.population_count(masks).astype(jnp.int32).reshape(words // 2, 2, n)
    first = jnp.stack([starts, starts + halves[:, 0]], 1).reshape(words, 1, n)
    bit = jnp.arange(32, dtype=jnp.uint32)[:, None]
    return _pick(values, tile, masks[:, None], first, bit).reshape(words * 32, n)[:rows]


def _pick(values: jax.Array, tile: jax.Array, word: jax.Array, first: jax.Array, bit: jax.Array) -> jax.Array:
    """Returns the element that ``bit`` of a mask word stands for, given the place of the word's first value."""
    below = word & ((np.uint32(1) << bit) - np.uint32(1))
    place = first + lax.population_count(below).astype(jnp.int32)
    value = values.at[jnp.broadcast_to(tile, place.shape), place].get(mode="clip")
    return jnp.where((word >> bit) & 1 == 1, value, jnp.zeros((), values.dtype))
