"""N:M sparsity: n of every m consecutive inputs of a column are kept, as values and packed small indices.

The pattern 2:4 is that of "Accelerating Sparse Deep Neural Networks" (2021); storage and expansion suit any n and m.
Expansion has no gather: ``out[m * i + c]`` is the kept value whose index is ``c``, else zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from memjax.codecs import Codec, Packed
from memjax.core.views import Axes
from memjax.weights.decoded import Decoded
from memjax.weights.dense import cast_chain
from pallas_kernels._bits import PLANES, pack, unpack


def index_bits(m: int) -> int:
    """Returns the stored bits of an index below ``m``: ceil(log2 m), at least 1."""
    return max(1, (m - 1).bit_length())


def _block(m: int) -> int:
    """Returns how many indices fill whole bytes in every plane."""
    return 8 // min(PLANES[index_bits(m)])


def bits_per_weight(n: int, m: int, value_bits: float = 16) -> float:
    """Returns the stored bits of a dense element: ``n / m * (value_bits + index_bits)``."""
    return n / m * (value_bits + index_bits(m))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["axes", "n", "m", "dense_dtype"]
)
@dataclass(frozen=True)
class NMSparse(Decoded):
    """A weight of which n in every m consecutive elements along the last input axis are stored.

    Bytes: ``size * n / m`` values (or their codes), plus ``size * n / m * index_bits(m) / 8`` index bytes; the indices
    of a column are padded to whole bytes.

    Attributes:
      values: kept values ``[*batch, ..., K * n / m, ...]``, in the order of their positions; an array or codes.
      indices: uint8 planes, the position of every kept value among its m elements, packed along the same axis.
      axes: input and output axes.
      n, m: the pattern.
      dense_dtype: dtype of the dense weight.
    """

    values: jax.Array | Packed
    indices: tuple[jax.Array, ...]
    axes: Axes
    n: int
    m: int
    dense_dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axes.inputs[-1]] = shape[self.axes.inputs[-1]] // self.n * self.m
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dense_dtype)

    def materialize(self) -> jax.Array:
        return _decode(self)

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        flat = indices.reshape(-1)
        if axis == self.axes.inputs[-1]:
            rows = self._inputs(flat)
        else:
            pick = functools.partial(jnp.take, indices=flat, axis=axis, mode="clip")
            rows = jax.tree.map(pick, self).materialize()
        rows = jnp.moveaxis(rows, axis, 0)
        return cast_chain(rows.reshape(indices.shape + rows.shape[1:]), casts)

    def _inputs(self, positions: jax.Array) -> jax.Array:
        """Decodes slices along the sparse axis: the n stored values of their groups, and nothing else."""
        axis = self.axes.inputs[-1]
        kept = (positions // self.m * self.n)[:, None] + jnp.arange(self.n)
        flat = kept.reshape(-1)
        take = functools.partial(jnp.take, axis=axis, mode="clip")
        values = self.values.take(flat, axis) if isinstance(self.values, Packed) else take(self.values, flat)
        column = [1] * values.ndim
        column[axis] = -1
        block, low = _block(self.m), 0
        codes = jnp.zeros((), jnp.uint8)
        for plane, width in zip(self.indices, PLANES[index_bits(self.m)]):
            stride = block * width // 8
            shift = (flat % block // stride * width).astype(jnp.uint8).reshape(column)
            field = take(plane, flat // block * stride + flat % block % stride) >> shift
            codes = codes | ((field & np.uint8(2**width - 1)) << np.uint8(low))
            low += width
        wanted = jnp.repeat(positions % self.m, self.n).reshape(column)
        found = jnp.where(codes == wanted, values, jnp.zeros((), values.dtype))
        groups = found.reshape(_split(found.shape, axis, self.n))
        return jnp.sum(groups, axis % found.ndim + 1, dtype=values.dtype).astype(self.dtype)

    def astype(self, dtype: Any) -> NMSparse:
        return replace(self, dense_dtype=jnp.dtype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        axis = self.axes.inputs[-1]
        if spec[axis] is not None and self.values.shape[axis] % _block(self.m):
            raise ValueError(
                f"axis {axis} of the {self.n}:{self.m} sparse weight {self.shape} cannot be sharded: the indices of "
                f"its {self.values.shape[axis]} kept elements do not fill whole blocks of {_block(self.m)}"
            )
        return jax.tree.map(lambda leaf: PartitionSpec(*spec), self)

    def check(self) -> None:
        """Raises a ValueError for leaves that do not fit each other."""
        axis, block = self.axes.inputs[-1], _block(self.m)
        if not 0 < self.n <= self.m:
            raise ValueError(f"expected a pattern n:m with 0 < n <= m, got {self.n}:{self.m}")
        expected = list(self.values.shape)
        size = expected[axis]
        if size % self.n:
            raise ValueError(f"{size} kept elements along axis {axis} are not groups of {self.n}")
        for plane, width in zip(self.indices, PLANES[index_bits(self.m)], strict=True):
            expected[axis] = -(-size // block) * block * width // 8
            if plane.shape != tuple(expected) or plane.dtype != jnp.uint8:
                raise ValueError(f"expected uint8 indices of shape {tuple(expected)}, got {plane.dtype} {plane.shape}")


def encode(w: jax.Array, mask: jax.Array, axes: Axes, n: int, m: int, codec: Codec | None = None) -> NMSparse:
    """Stores the elements of ``w`` where ``mask`` is true.

    Args:
      w: floating ``[*batch, ...]``; the last input axis is a multiple of ``m``.
      mask: bool, shape of ``w``; at most n of every m consecutive elements along the last input axis.
      axes: input and output axes.
      n, m: the pattern, ``0 < n <= m <= 256``.
      codec: format of the values; its groups count kept elements.

    Raises:
      ValueError: sizes or masks that do not fit the pattern.
    """
    check_mask(mask, axes, n, m)
    values, indices = _encode(w, mask, axes.inputs[-1], n, m)
    stored = values if codec is None else codec.encode(values, axes.inputs)
    return NMSparse(stored, indices, axes, n, m, jnp.dtype(w.dtype))


def check_mask(mask: jax.Array, axes: Axes, n: int, m: int) -> None:
    """Raises a ValueError unless ``mask`` keeps at most n of every m consecutive elements along the last input axis."""
    _check_pattern(mask.shape, axes, n, m)
    if not isinstance(mask, jax.core.Tracer):
        groups = mask.reshape(_split(mask.shape, axes.inputs[-1], m))
        count = int(jnp.max(jnp.sum(groups, axes.inputs[-1] % mask.ndim + 1), initial=0))
        if count > n:
            raise ValueError(f"the mask keeps {count} of {m} consecutive elements, and the pattern {n}:{m} at most {n}")


def _check_pattern(shape: tuple[int, ...], axes: Axes, n: int, m: int) -> None:
    axis = axes.inputs[-1]
    if not 0 < n <= m <= 256:
        raise ValueError(f"expected a pattern n:m with 0 < n <= m <= 256, got {n}:{m}")
    if shape[axis] % m:
        raise ValueError(f"axis {axis} of size {shape[axis]} (shape {shape}) is not a multiple of {m} for {n}:{m}")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def by_magnitude(w: jax.Array, axes: Axes, n: int, m: int) -> jax.Array:
    """Returns the mask of the n largest of every m consecutive elements along the last input axis; the first of equals.

    Raises:
      ValueError: a pattern that is none, or an axis that ``m`` does not divide.
    """
    _check_pattern(w.shape, axes, n, m)
    axis = axes.inputs[-1]
    groups = jnp.abs(w).reshape(_split(w.shape, axis, m))
    position = axis % w.ndim + 1
    order = jnp.argsort(-groups, position, stable=True)
    return (jnp.argsort(order, position) < n).reshape(w.shape)


def _split(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    axis %= len(shape)
    return (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _encode(w: jax.Array, mask: jax.Array, axis: int, n: int, m: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    position = axis % w.ndim + 1
    kept = mask.reshape(_split(w.shape, axis, m))
    groups = jnp.where(kept, w.reshape(kept.shape), jnp.zeros((), w.dtype))
    first = jnp.argsort(~kept, position, stable=True)  # kept positions first, then unused ones, both ascending
    chosen = jnp.sort(jax.lax.slice_in_dim(first, 0, n, axis=position), position)
    compact = (*w.shape[: position - 1], w.shape[axis] // m * n, *w.shape[position:])
    values = jnp.take_along_axis(groups, chosen, position).reshape(compact)
    codes = chosen.astype(jnp.uint8).reshape(compact)
    pad = [(0, 0)] * w.ndim
    pad[position - 1] = (0, -compact[position - 1] % _block(m))
    return values, pack(jnp.pad(codes, pad), index_bits(m), axis, _block(m))


@functools.partial(jax.jit, inline=True)
def _decode(view: NMSparse) -> jax.Array:
    axis, n, m = view.axes.inputs[-1], view.n, view.m
    values = view.values.decode() if isinstance(view.values, Packed) else view.values
    codes = unpack(view.indices, index_bits(m), axis, _block(m))
    codes = jax.lax.slice_in_dim(codes, 0, values.shape[axis], axis=axis)
    shape, position = values.shape, axis % values.ndim + 1
    values, codes = (x.reshape(_split(shape, axis, n)) for x in (values, codes))
    dense = (*values.shape[:position], m, *values.shape[position + 1 :])
    place = jax.lax.broadcasted_iota(jnp.uint8, dense, position)
    out = jnp.zeros(dense, values.dtype)
    for j in range(n):
        value, code = (jax.lax.slice_in_dim(x, j, j + 1, axis=position) for x in (values, codes))
        out = jnp.where(place == code, value, out)
    return out.reshape(*shape[: position - 1], shape[axis] // n * m, *shape[position:]).astype(view.dtype)
