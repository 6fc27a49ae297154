"""Tiled-CSL of "Flash-LLM" (2023): a 32-bit word per nonzero, its float16 value and its place in a tile.

The words, their order and the offsets are those of the released encoder. `Bitmap` is smaller at every density above
1/16; this format is for exchange and comparison.
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
from memjax.weights.decoded import Matrix, to_matrix

ROWS, COLUMNS = 128, 64
_VECTOR, _LANES, _BANKS = 4, 32, 32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "offsets"],
    meta_fields=["axes", "input_sizes", "output_sizes", "dense_dtype"],
)
@dataclass(frozen=True)
class TiledCSL(Matrix):
    """A weight stored as the nonzeros of ``W^T [N, K]`` in tiles of 128 x 64, row by row of tiles.

    A word holds the float16 value in its low half and ``row * 64 + (column ^ (row % 8) * 8)`` in its high half. Tiles
    are padded to four words with zeros at places that hold zeros; the words of a tile are ordered so that the 32 lanes
    of a warp, which load four words each, write to different banks. Sizes that are not multiples of the tile are
    padded with zeros, and batch slices to the longest.

    Bytes: ``batch * (4 * words + 4 * (tiles + 2))``.

    Attributes:
      words: uint32 ``[*batch, capacity]``.
      offsets: int32 ``[*batch, tiles + 2]``: the first vector of four words of every tile; the last two are the total.
      axes: input and output axes.
      input_sizes, output_sizes: sizes of the input axes and of the output axes.
      dense_dtype: dtype of the dense weight.
    """

    words: jax.Array
    offsets: jax.Array
    axes: Axes
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    dense_dtype: Any

    @property
    def inner_sizes(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.output_sizes[1:]

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dense_dtype)

    @property
    def lead(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], math.prod(self.output_sizes))

    def matrix(self) -> jax.Array:
        k, n = math.prod(self.input_sizes), math.prod(self.output_sizes)
        decode: Callable[..., jax.Array] = functools.partial(_decode, k=k, n=n)
        for _ in range(self.words.ndim - 1):
            decode = jax.vmap(decode)
        return decode(self.words, self.offsets).astype(self.dtype)

    def astype(self, dtype: Any) -> TiledCSL:
        return replace(self, dense_dtype=jnp.dtype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        batch, columns = self.shards(spec)
        if columns is not None:
            raise ValueError(f"the tiles of Tiled-CSL {self.shape} follow each other: a mesh can shard batch axes only")
        return jax.tree.map(lambda leaf: PartitionSpec(*batch, None), self)

    def check(self) -> None:
        super().check()
        tiles = -(-math.prod(self.output_sizes) // ROWS) * -(-math.prod(self.input_sizes) // COLUMNS)
        if self.offsets.shape != (*self.words.shape[:-1], tiles + 2) or self.offsets.dtype != jnp.int32:
            raise ValueError(f"expected int32 offsets of {tiles} tiles, got {self.offsets.dtype} {self.offsets.shape}")
        if self.words.dtype != jnp.uint32 or self.words.shape[-1] % _VECTOR:
            raise ValueError(f"expected uint32 vectors of {_VECTOR} words, got {self.words.dtype} {self.words.shape}")


def encode(w: jax.Array, mask: jax.Array, axes: Axes) -> TiledCSL:
    """Stores the elements of ``w`` where ``mask`` is true, on the host.

    Args:
      w: floating ``[*batch, ...]``, rounded to float16; elements that become zero are not stored.
      mask: bool, shape of ``w``.
      axes: input and output axes.

    Raises:
      ValueError: elements beyond float16.
    """
    matrix = np.asarray(to_matrix(jnp.where(mask, w, jnp.zeros((), w.dtype)), axes), np.float32)
    largest = np.max(np.abs(matrix), initial=0.0)
    if largest >= 65520:
        raise ValueError(f"Tiled-CSL holds float16 values, got an element of size {largest:.4g}")
    *batch, k, n = matrix.shape
    slices = [_encode(w.T.astype(np.float16)) for w in matrix.reshape(-1, k, n)]
    capacity = max(max(len(words) for words, _ in slices), _VECTOR)
    words = np.stack([np.pad(words, (0, capacity - len(words))) for words, _ in slices])
    offsets = np.stack([offsets for _, offsets in slices])
    return TiledCSL(
        jnp.asarray(words.reshape(*batch, -1)),
        jnp.asarray(offsets.reshape(*batch, -1)),
        axes,
        tuple(w.shape[axis] for axis in axes.inputs),
        tuple(w.shape[axis] for axis in axes.outputs),
        jnp.dtype(w.dtype),
    )


def _encode(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes float16 ``A [M, K]``; returns the words and the offsets."""
    a = np.pad(a, ((0, -a.shape[0] % ROWS), (0, -a.shape[1] % COLUMNS)))
    tiles = a.reshape(a.shape[0] // ROWS, ROWS, -1, COLUMNS).swapaxes(1, 2).reshape(-1, ROWS, COLUMNS)
    words = [_encode_tile(tile) for tile in tiles]
    ends = np.cumsum([len(tile) // _VECTOR for tile in words])
    return np.concatenate(words), np.array([0, *ends, ends[-1]], np.int32)


def _encode_tile(tile: np.ndarray) -> np.ndarray:
    row, column = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    column ^= row % 8 << 3
    location, bank = row * COLUMNS + column, column // 2
    bits = tile.reshape(-1).view(np.uint16)
    stored = tile.reshape(-1) != 0
    chosen = np.flatnonzero(stored)
    counts = np.bincount(bank[chosen], minlength=_BANKS)
    free = [np.flatnonzero(~stored & (bank == b)).tolist() for b in range(_BANKS)]
    for _ in range(-len(chosen) % _VECTOR):
        emptiest = min((b for b in range(_BANKS) if free[b]), key=lambda b: counts[b])
        chosen = np.append(chosen, free[emptiest].pop(0))
        counts[emptiest] += 1
    words = (location[chosen].astype(np.uint32) << 16) | np.where(stored[chosen], bits[chosen], 0)
    return _in_lanes(words, bank[chosen])


def _in_lanes(words: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Orders the words of a tile: each comes from the bank that then has most words left, its last word first."""
    level = np.zeros(len(bank), np.int64)
    for b in range(_BANKS):
        level[bank == b] = np.arange(np.sum(bank == b))
    picked = words[np.lexsort((bank, -level))]
    lanes = len(words) // _VECTOR % _LANES  # of the last, partial load, which is picked first
    tail, rounds = picked[: lanes * _VECTOR].reshape(_VECTOR, lanes), picked[lanes * _VECTOR :].reshape(-1, _LANES)
    main = rounds[::-1].reshape(-1, _VECTOR, _LANES).swapaxes(1, 2)
    return np.concatenate([main.reshape(-1), tail[::-1].T.reshape(-1)])


@functools.partial(jax.jit, static_argnames=("k", "n"), inline=True)
def _decode(words: jax.Array, offsets: jax.Array, *, k: int, n: int) -> jax.Array:
    across = -(-k // COLUMNS)
    index = jnp.arange(words.shape[0], dtype=jnp.int32) // _VECTOR
    tile = jnp.searchsorted(offsets[1:-1], index, side="right").astype(jnp.int32)
    location = (words >> 16).astype(jnp.int32)
    row, column = location // COLUMNS, location % COLUMNS ^ location // COLUMNS % 8 * 8
    value = lax.bitcast_convert_type(words.astype(jnp.uint16), jnp.float16)
    place = (tile % across * COLUMNS + column, tile // across * ROWS + row)  # words beyond the end are in no tile
    return jnp.zeros((k, n), jnp.float16).at[place].set(value, mode="drop")
