"""`Packed`, an array kept as small codes with a scale per group, and `Codec`, which makes and reads it."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.codecs import fused
from pallas_kernels._bits import PLANES, flat_counter, hash_bits, pack, seed_words, uniform, unpack
from pallas_kernels.codec import Form

Rounding = Literal["nearest", "up", "down"]
_BIT_PATTERN = {"bfloat16": jnp.uint16, "float16": jnp.uint16, "float32": jnp.uint32}


def check_scale_dtype(name: str) -> None:
    """Raises ValueError unless ``name`` is a dtype that scales can be stored in."""
    if name not in _BIT_PATTERN:
        raise ValueError(f"scale_dtype must be one of {', '.join(_BIT_PATTERN)}, got {name!r}")


def to_bits(x: jax.Array, dtype: str, rounding: Rounding = "nearest") -> jax.Array:
    """Returns the bit patterns of ``x`` rounded to ``dtype``.

    Args:
      x: float32 ``[...]``.
      dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
      rounding: to the nearest (ties to even), or to the next value not below (not above) ``x``.

    Returns:
      uint16 ``[...]`` (uint32 for float32).
    """
    pattern = _BIT_PATTERN[dtype]
    # The barrier keeps XLA from cancelling the conversion against the one that reads the bits back.
    bits = lax.optimization_barrier(lax.bitcast_convert_type(x.astype(dtype), pattern))
    if rounding == "nearest" or dtype == "float32":
        return bits
    value = from_bits(bits, dtype)
    one, sign = pattern(1), pattern(0x8000)
    if rounding == "up":
        above = jnp.where(value == 0, one, jnp.where(value > 0, bits + one, bits - one))
        return jnp.where(value < x, above, bits)
    below = jnp.where(value == 0, sign | one, jnp.where(value > 0, bits - one, bits + one))
    return jnp.where(value > x, below, bits)


def from_bits(bits: jax.Array | np.ndarray, dtype: str) -> jax.Array:
    """Returns the float32 values of bit patterns made by `to_bits`."""
    return lax.bitcast_convert_type(bits, jnp.dtype(dtype)).astype(jnp.float32)


def check_group(group: int | str) -> None:
    """Raises ValueError unless ``group`` is a number of elements or ``"channel"``."""
    if group != "channel" and not (isinstance(group, int) and not isinstance(group, bool) and group > 0):
        raise ValueError(f"group must be a positive integer or 'channel', got {group!r}")


def round_steps(x: jax.Array, noise: jax.Array | None) -> jax.Array:
    """Rounds to integers: to the nearest (ties to even), or up where ``noise`` is below the fraction."""
    if noise is None:
        return jnp.round(x)
    whole = jnp.floor(x)
    return whole + (noise < x - whole)


def scale_bits(step: jax.Array, dtype: str, rounding: Rounding) -> jax.Array:
    """Returns the bit patterns of ``step``, 1 where it is zero; an exact step survives rounding up."""
    if rounding == "up":
        step = step * np.float32(1 - 2**-20)
    bits = to_bits(step, dtype, rounding)
    return jnp.where(from_bits(bits, dtype) == 0, to_bits(jnp.ones((), jnp.float32), dtype), bits)


def group_blocks(shape: tuple[int, ...], axes: tuple[int, ...], group: int | str) -> tuple[int, ...]:
    """Returns how many elements of each group axis one group covers.

    A group is ``group`` consecutive elements of the group axes flattened in the order of ``axes``; it lies
    within the last axis or covers it (and the axes before it, from the last on) whole.

    Args:
      shape: shape of the array.
      axes: negative numbers of the group axes.
      group: elements per group, or ``"channel"`` for all of the group axes.

    Raises:
      ValueError: groups that do not divide the axes.
    """
    sizes = [shape[axis] for axis in axes]
    rest = math.prod(sizes) if isinstance(group, str) else group
    blocks: list[int] = []
    for size in reversed(sizes):
        block = min(rest, size)
        if size == 0 or rest % block or size % block:
            named = ", ".join(f"{axis} (size {size})" for axis, size in zip(axes, sizes))
            raise ValueError(f"groups of {group} do not divide the group axes {named} of shape {shape}")
        blocks.append(block)
        rest //= block
    if rest != 1:
        raise ValueError(f"groups of {group} are larger than the group axes of sizes {tuple(sizes)} in shape {shape}")
    return tuple(reversed(blocks))


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats the elements of ``x`` along every axis to ``shape``, whose sizes are multiples of its own."""
    split = [part for size in x.shape for part in (size, 1)]
    repeated = [part for size, full in zip(x.shape, shape) for part in (size, full // size)]
    return jnp.broadcast_to(x.reshape(split), repeated).reshape(shape)


def blocked(x: jax.Array, axes: tuple[int, ...], counts: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Splits each of ``axes`` into (group, element); returns the array and the element axes, negative."""
    split = {axis % x.ndim: count for axis, count in zip(axes, counts)}
    shape: list[int] = []
    elements: dict[int, int] = {}
    for axis, size in enumerate(x.shape):
        if axis in split:
            shape += [split[axis], size // split[axis]]
            elements[axis] = len(shape) - 1
        else:
            shape.append(size)
    return x.reshape(shape), tuple(elements[axis % x.ndim] - len(shape) for axis in axes)


class Codec(abc.ABC):
    """How an array is stored small: a frozen, hashable value.

    A decoded element is ``values(code) * scale + offset``, with one scale (and offset) per group.
    """

    bits: int
    group: int | str
    symmetric: bool
    scale_dtype: str

    @property
    @abc.abstractmethod
    def limit(self) -> float:
        """Largest absolute value whose scale and offset are finite in `scale_dtype`."""

    @abc.abstractmethod
    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Chooses the codes of groups.

        Args:
          x: float32 ``[...]`` in which ``axes`` together are one group.
          axes: negative axis numbers, in the order in which a group's elements follow each other.
          noise: float32 uniform in [0, 1), shape of ``x``, for stochastic rounding; None rounds to nearest.

        Returns:
          uint8 codes (shape of ``x``), and the bit patterns of scale and offset (``axes`` of size 1; the
          offset is None where the codec has none).
        """

    def values(self, codes: jax.Array) -> jax.Array:
        """Returns the float32 values of uint8 codes before scale and offset.

        Symmetric codes are two's complement at 8 bits and offset by ``2**(bits - 1)`` below 8; others are
        unsigned.
        """
        if not self.symmetric:
            return codes.astype(jnp.float32)
        if self.bits == 8:
            return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
        return codes.astype(jnp.float32) - np.float32(2 ** (self.bits - 1))

    def kernel_form(self, group: int) -> Form | None:
        """Returns the kernels' name of this format for groups of so many elements, or None where they know none."""
        return None

    def store_scales(self, scale: jax.Array, axes: tuple[int, ...]) -> Any:
        """Returns what `Packed` keeps of the bit patterns ``scale``; see `scales`."""
        return scale

    def scales(self, scale: Any) -> jax.Array:
        """Returns the float32 scales ``[..., n / group, ...]`` of what `store_scales` gave."""
        return from_bits(scale, self.scale_dtype)

    def bits_per_element(self, group: int | None = None) -> float:
        """Returns the exact stored bits per element: ``bits + scale bits / group`` (twice with an offset).

        Args:
          group: elements per group; needed for ``"channel"``.
        """
        size = self.group if group is None else group
        if isinstance(size, str):
            raise ValueError("a codec with one group per channel needs the channel's size: bits_per_element(group=...)")
        stored = jnp.dtype(self.scale_dtype).itemsize * 8
        return self.bits + stored * (1 if self.symmetric else 2) / size

    def encode(self, x: Any, axes: int | tuple[int, ...] = (-2,), key: Any = None) -> Packed:
        """Encodes an array.

        Args:
          x: floating-point ``[...]``; its dtype is remembered.
          axes: axes along which groups run; the last one varies fastest within a group.
          key: a random key or integer seed for stochastic rounding, under which every element's expectation
            is its own value; None rounds to nearest.

        Returns:
          `Packed`; every leaf has the axes of ``x``, the group axes shortened.

        Raises:
          TypeError: ``x`` is not floating point.
          ValueError: axes out of range or repeated, groups that do not divide them or do not fill bytes, and,
            where ``x`` is concrete, NaN, infinities and values whose scale overflows.
        """
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"expected a floating-point array to encode, got {getattr(x, 'dtype', type(x).__name__)}")
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        for axis in axes:
            if not -x.ndim <= axis < x.ndim:
                raise ValueError(f"group axis {axis} is out of range for shape {tuple(x.shape)}")
        axes = tuple(axis if axis < 0 else axis - x.ndim for axis in axes)
        if not axes or len(set(axes)) != len(axes):
            raise ValueError(f"expected distinct group axes, got {axes}")
        group_blocks(tuple(x.shape), axes, self.group)
        if not isinstance(x, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                largest = float(_max_abs(x))
            if not largest <= self.limit:
                found = f"an element of size {largest:.4g}" if math.isfinite(largest) else "NaN or infinity"
                raise ValueError(
                    f"{self} cannot encode {found} (array of shape {tuple(x.shape)}, {x.dtype}); "
                    f"the largest finite size is {self.limit:.4g}"
                )
        words = None if key is None else seed_words(key)
        planes, scale, offset = _encode(self, axes, x, words)
        return Packed(planes, scale, offset, self, axes, jnp.dtype(x.dtype))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "scale", "offset"),
    meta_fields=("codec", "axes", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """An array stored as packed codes; leaves are numpy or jax arrays that all carry every axis of the array.

    Attributes:
      planes: uint8 ``[..., n * plane_bits / 8, ...]``, packed along the last of ``axes`` as in `pack`.
      scale: bit patterns of one scale per group, uint16 or uint32 ``[..., n / group, ...]``; a codec may keep its
        scales as several leaves, the first of which has one element per group (`Codec.scales` decodes either).
      offset: bit patterns of one offset per group, or None.
      codec: the format.
      axes: negative numbers of the axes along which groups run.
      dtype: dtype of the array that the codes stand for.
    """

    planes: tuple[jax.Array | np.ndarray, ...]
    scale: Any
    offset: jax.Array | np.ndarray | None
    codec: Codec
    axes: tuple[int, ...]
    dtype: np.dtype

    def __repr__(self) -> str:
        """Codes are left out: a tree of packed weights is looked at often."""
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(self)):  # a tree of something else, of its form
            return f"Packed({self.planes}, {self.scale}, {self.offset}, {self.codec})"
        sizes = ", ".join(map(str, self.shape))
        return f"Packed({np.dtype(self.dtype).name}[{sizes}] in {self.nbytes:,} bytes, axes {self.axes}, {self.codec})"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.planes[0].shape)
        shape[self.axes[-1]] *= 8 // PLANES[self.codec.bits][0]
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.planes[0].ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of groups along each of `axes`."""
        return tuple(jax.tree.leaves(self.scale)[0].shape[axis] for axis in self.axes)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element of the array."""
        return self.nbytes * 8 / self.size

    def decode(self, dtype: Any = None) -> jax.Array:
        """Returns the array ``[...]`` in ``dtype`` (default: the `dtype` of the array).

        Shifts, products and broadcasts only, so that it fuses into its consumer; large arrays of `Grouped` codes along
        the last axis are decoded by a kernel where the device is a Hopper GPU.
        """
        return _decode(self, jnp.dtype(self.dtype if dtype is None else dtype))

    def take(self, indices: jax.Array, axis: int) -> jax.Array:
        """Decodes slices along one axis and reads nothing else.

        Args:
          indices: integers ``[n]``, in range.
          axis: negative axis number; not one of several group axes.

        Returns:
          The array in `dtype` with ``axis`` of size n.
        """
        take = functools.partial(jnp.take, axis=axis, mode="clip")
        size = self.shape[axis]

        def take_spans(leaf: jax.Array | np.ndarray) -> jax.Array:
            span = size // leaf.shape[axis]
            return take(leaf, indices if span == 1 else indices // span)

        if axis not in self.axes:
            return jax.tree.map(take_spans, self).decode()
        if len(self.axes) > 1:
            raise ValueError(f"cannot look up along axis {axis}, one of the group axes {self.axes}")
        group = size // self.counts[0]
        column = [1] * self.ndim
        column[axis] = -1
        position = indices % group
        codes, low = jnp.zeros((), jnp.uint8), 0
        for plane, width in zip(self.planes, PLANES[self.codec.bits]):
            stride = group * width // 8
            shift = (position // stride * width).astype(jnp.uint8).reshape(column)
            field = take(plane, indices // group * stride + position % stride) >> shift
            codes = codes | ((field & np.uint8(2**width - 1)) << np.uint8(low))
            low += width
        values = self.codec.values(codes) * self.codec.scales(jax.tree.map(take_spans, self.scale))
        if self.offset is not None:
            values = values + from_bits(take_spans(self.offset), self.codec.scale_dtype)
        return values.astype(self.dtype)

    def astype(self, dtype: Any) -> Packed:
        """Returns the same codes standing for an array of ``dtype``."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transpose(self, permutation: tuple[int, ...]) -> Packed:
        """Returns the transposed array's codes: permutes the axes of every leaf.

        Raises:
          ValueError: ``permutation`` is not one of all axes.
        """
        order = [axis % self.ndim if -self.ndim <= axis < self.ndim else axis for axis in permutation]
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"expected a permutation of {self.ndim} axes, got {tuple(permutation)}")
        moved = jax.tree.map(lambda leaf: leaf.transpose(order), self)
        axes = tuple(order.index(axis % self.ndim) - self.ndim for axis in self.axes)
        return dataclasses.replace(moved, axes=axes)


@jax.jit
def _max_abs(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _encode(
    codec: Codec, axes: tuple[int, ...], x: jax.Array, words: tuple[jax.Array, jax.Array] | None
) -> tuple[tuple[jax.Array, ...], Any, jax.Array | None]:
    x = lax.stop_gradient(x)
    blocks = group_blocks(x.shape, axes, codec.group)
    form = codec.kernel_form(blocks[-1]) if axes == (-1,) else None
    if form is not None and fused.takes(form, x.shape, x.dtype):
        codes, scale, offset = fused.encode(x, words, form)
        return (codes,), scale, offset
    counts = tuple(x.shape[axis] // block for axis, block in zip(axes, blocks))
    noise = None
    if words is not None:
        noise, _ = blocked(uniform(hash_bits(words, flat_counter(x.shape))), axes, counts)
    groups, elements = blocked(x.astype(jnp.float32), axes, counts)
    codes, scale, offset = codec.quantize(groups, elements, noise)
    planes = pack(codes.reshape(x.shape), codec.bits, axes[-1], blocks[-1])
    return (
        planes,
        codec.store_scales(scale.squeeze(elements), axes),
        None if offset is None else offset.squeeze(elements),
    )


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _decode(packed: Packed, dtype: np.dtype) -> jax.Array:
    shape, axes, codec = packed.shape, packed.axes, packed.codec
    counts = packed.counts
    form = codec.kernel_form(shape[-1] // counts[-1]) if axes == (-1,) else None
    if form is not None and fused.takes(form, shape, dtype):
        return fused.decode(packed.planes[0], packed.scale, packed.offset, form, dtype)
    codes = unpack(packed.planes, codec.bits, axes[-1], shape[axes[-1]] // counts[-1])
    values = blocked(codec.values(codes), axes, counts)[0]
    values = values * blocked(codec.scales(packed.scale), axes, counts)[0]
    if packed.offset is not None:
        values = values + blocked(from_bits(packed.offset, codec.scale_dtype), axes, counts)[0]
    return values.reshape(shape).astype(dtype)


class CodecError(NamedTuple):
    """Error of a code: largest absolute difference, and norm of the difference over the norm of the array."""

    max_abs: jax.Array
    relative_frobenius: jax.Array


@jax.jit
def error(x: jax.Array, packed: Packed) -> CodecError:
    """Returns how far ``packed`` is from the array ``x``, in float32; 0 and 0 for equal arrays.

    Raises:
      ValueError: shapes that differ.
    """
    if x.shape != packed.shape:
        raise ValueError(f"expected an array of the packed shape {packed.shape}, got {x.shape}")
    x = x.astype(jnp.float32)
    difference = jnp.abs(x - packed.decode(jnp.float32))
    norm = jnp.sqrt(jnp.sum(difference**2))
    relative = jnp.where(norm == 0, 0.0, norm / jnp.sqrt(jnp.sum(x**2)))
    return CodecError(jnp.max(difference, initial=0.0), relative)
