"""Bipolar integers of any width: "Efficient Arbitrary Precision Acceleration for LLMs on GPU Tensor Cores" (2025).

A word of n bits ``u_i`` stands for ``sum_i (2 u_i - 1) 2**i``, an odd number between ``-(2**n - 1)`` and ``2**n - 1``:
every bit plane has a positive weight, so a product of words is a sum of products of planes, each a population count.
`xor_product`, `and_product` and `int8_product` compute the same integers.
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

from memjax.codecs import bipolar as bipolar_codec
from memjax.codecs import to_bipolar
from memjax.codecs.packed import from_bits, to_bits
from memjax.core.paths import Patterns, map_with_path, select
from memjax.core.views import Axes
from memjax.weights.decoded import Matrix, linear, sizes_of, to_matrix
from memjax.weights.dense import cast_chain, dot_by
from memjax.weights.integer import sum_over_groups
from memjax.weights.quantize import AxesTable, axes_of, check_dense, check_table


def planes_of(codes: jax.Array, bits: int) -> jax.Array:
    """Packs the bits of unsigned codes along axis -2, 32 to a word, the last word filled with zeros.

    Args:
      codes: uint8 ``[..., K, N]`` below ``2**bits``; they stand for ``2 codes - (2**bits - 1)``.
      bits: 1 to 8.

    Returns:
      uint32 ``[..., bits, ceil(K / 32), N]``, least significant plane first; row k is bit ``k % 32`` of a word.
    """
    *lead, k, n = codes.shape
    codes = jnp.pad(codes, [*[(0, 0)] * len(lead), (0, -k % 32), (0, 0)])[..., None, :, :]
    planes = (codes >> jnp.arange(bits, dtype=jnp.uint8)[:, None, None]) & np.uint8(1)
    words = planes.reshape(*lead, bits, -1, 32, n).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[:, None]
    return jnp.sum(words, -2, dtype=jnp.uint32)


def codes_of(planes: jax.Array, k: int) -> jax.Array:
    """Inverse of `planes_of`; returns uint8 ``[..., k, N]``."""
    *lead, bits, words, n = planes.shape
    found = (planes[..., None, :] >> jnp.arange(32, dtype=jnp.uint32)[:, None]) & np.uint32(1)
    found = found.reshape(*lead, bits, words * 32, n)[..., :k, :].astype(jnp.uint8)
    return jnp.sum(found << jnp.arange(bits, dtype=jnp.uint8)[:, None, None], -3, dtype=jnp.uint8)


def xor_product(x: jax.Array, w: jax.Array, k: int) -> jax.Array:
    """Multiplies bipolar matrices by ``sum_ij 2**(i + j) (K - 2 popcount(x_i ^ w_j))``.

    Args:
      x: uint32 planes ``[p, ceil(K / 32), T]`` of the left matrix ``[T, K]``.
      w: uint32 planes ``[n, ceil(K / 32), N]``.
      k: K, without the filling of the last word.

    Returns:
      int32 ``[T, N]``, exact.

    Raises:
      ValueError: a K for which int32 could overflow.
    """
    _check_sum(k, x.shape[0], w.shape[0])
    return _by_planes(x, w, lambda x, w: k - 2 * _count(x[..., None] ^ w[:, None]))


def and_product(x: jax.Array, w: jax.Array, k: int) -> jax.Array:
    """As `xor_product`, by ``4 popcount(x_i & w_j) - 2 popcount(x_i) - 2 popcount(w_j) + K``."""
    _check_sum(k, x.shape[0], w.shape[0])

    def one(x: jax.Array, w: jax.Array) -> jax.Array:
        return 4 * _count(x[..., None] & w[:, None]) - 2 * _count(x)[:, None] - 2 * _count(w) + k

    return _by_planes(x, w, one)


def int8_product(x: jax.Array, w: jax.Array, bits: tuple[int, int]) -> jax.Array:
    """Multiplies bipolar matrices as one int8 product of codes around zero.

    Args:
      x: uint8 codes ``[T, K]``.
      w: uint8 codes ``[K, N]``.
      bits: widths of the codes of x and of w.

    Returns:
      int32 ``[T, N]``, exact.

    Raises:
      ValueError: a K for which int32 could overflow.
    """
    _check_sum(w.shape[0], *bits)
    left, right = ((codes.astype(jnp.int16) - 2 ** (n - 1)).astype(jnp.int8) for codes, n in zip((x, w), bits))
    product = lax.dot_general(left, right, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    rows, columns = jnp.sum(left, 1, dtype=jnp.int32), jnp.sum(right, 0, dtype=jnp.int32)
    return 4 * product + 2 * rows[:, None] + 2 * columns + w.shape[0]


def _check_sum(k: int, p: int, n: int) -> None:
    if k * (2**p - 1) * (2**n - 1) >= 2**31:
        raise ValueError(f"a sum of {k} products of {p} and {n} bits may exceed int32; use smaller groups")


def _count(words: jax.Array) -> jax.Array:
    """Returns the number of ones along axis 0."""
    return jnp.sum(lax.population_count(words).astype(jnp.int32), 0)


def _by_planes(x: jax.Array, w: jax.Array, one: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Returns the sum of ``2**(i + j) one(x_i, w_j)`` over planes; one of x alive at a time."""

    def add(total: jax.Array, plane: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, x = plane
        products = jax.vmap(functools.partial(one, x))(w)
        return total + jnp.tensordot(jnp.int32(1) << (i + jnp.arange(len(w), dtype=jnp.int32)), products, 1), None

    start = jnp.zeros((x.shape[2], w.shape[2]), jnp.int32)
    return lax.scan(add, start, (jnp.arange(len(x), dtype=jnp.int32), x))[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["planes", "scale"],
    meta_fields=["axes", "input_sizes", "inner_sizes", "activation_bits", "dense_dtype"],
)
@dataclass(frozen=True)
class BitPlanes(Matrix):
    """A weight stored as bit planes of bipolar integers, one scale per group of inputs and output.

    With ``activation_bits`` a forward product quantizes every row of the input, group by group, to bipolar integers
    (by the largest size, for one bit the mean size) and multiplies integers. Its gradient is straight-through, that of
    the product with the decoded weight. Other products decode.

    Bytes, for n bits and G groups of g inputs: ``batch * G * N * (4 n ceil(g / 32) + 2)``.

    Attributes:
      planes: uint32 ``[*batch, G, n, ceil(g / 32), N]``.
      scale: bfloat16 bit patterns, uint16 ``[*batch, G, N]``.
      axes: input and output axes.
      input_sizes, inner_sizes: sizes of the input axes, and of the output axes but the first.
      activation_bits: 1 to 8, or None to leave the input as it is.
      dense_dtype: dtype of the dense weight.
    """

    planes: jax.Array
    scale: jax.Array
    axes: Axes
    input_sizes: tuple[int, ...]
    inner_sizes: tuple[int, ...]
    activation_bits: int | None
    dense_dtype: Any

    @property
    def bits(self) -> int:
        """Bits of a stored integer."""
        return self.planes.shape[-3]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return math.prod(self.input_sizes) // self.scale.shape[-2]

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dense_dtype)

    @property
    def lead(self) -> tuple[int, ...]:
        return (*self.scale.shape[:-2], self.scale.shape[-1])

    def matrix(self) -> jax.Array:
        codes = codes_of(self.planes, self.group)
        w = to_bipolar(codes, self.bits).astype(jnp.float32) * from_bits(self.scale, "bfloat16")[..., None, :]
        return w.reshape(*w.shape[:-3], -1, w.shape[-1]).astype(self.dtype)

    def rows(self, indices: jax.Array) -> jax.Array:
        group, place = indices // self.group, indices % self.group
        words = self.planes[group, :, place // 32]
        found = ((words >> (place % 32).astype(jnp.uint32)[:, None, None]) & np.uint32(1)).astype(jnp.uint8)
        codes = jnp.sum(found << jnp.arange(self.bits, dtype=jnp.uint8)[:, None], 1, dtype=jnp.uint8)
        return (to_bipolar(codes, self.bits).astype(jnp.float32) * from_bits(self.scale[group], "bfloat16")).astype(
            self.dtype
        )

    def columns(self, indices: jax.Array) -> jax.Array:
        return jax.tree.map(lambda leaf: leaf[..., indices], self).matrix()

    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        settings = {"precision": precision, "preferred_element_type": preferred_element_type}
        if transpose or self.activation_bits is None:
            return super().dot(x, transpose=transpose, casts=casts, **settings)

        def multiply(x: jax.Array, view: BitPlanes) -> jax.Array:
            dense = cast_chain(view.materialize(), casts)
            return dot_by(lambda fn: fn(x, dense), view, transpose=False, **settings)

        dtype = preferred_element_type or jnp.promote_types(x.dtype, casts[-1] if casts else self.dtype)
        return linear(multiply, x, self, forward=lambda x, view: view._integer_dot(x).astype(dtype))

    def _integer_dot(self, x: jax.Array) -> jax.Array:
        batch, shape = self.batch_ndim, self.shape
        rows = x.shape[batch : x.ndim - len(self.axes.inputs)]
        one: Callable[..., jax.Array] = functools.partial(_product, bits=self.activation_bits or 8, group=self.group)
        for _ in range(batch):
            one = jax.vmap(one)
        flat = x.reshape(*shape[:batch], math.prod(rows), math.prod(self.input_sizes))
        y = one(flat, self.planes, from_bits(self.scale, "bfloat16"))
        return y.reshape(*shape[:batch], *rows, *(shape[axis] for axis in self.axes.outputs))

    def astype(self, dtype: Any) -> BitPlanes:
        return replace(self, dense_dtype=jnp.dtype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        batch, columns = self.shards(spec)
        specs: dict[str, Any] = {
            "planes": PartitionSpec(*batch, None, None, None, columns),
            "scale": PartitionSpec(*batch, None, columns),
        }
        return replace(self, **specs)

    def check(self) -> None:
        super().check()
        *batch, n = self.lead
        k, groups = math.prod(self.input_sizes), self.scale.shape[-2]
        expected = (*batch, groups, self.bits, -(-self.group // 32), n)
        if k % groups or not 1 <= self.bits <= 8 or self.planes.shape != expected:
            raise ValueError(f"expected planes of shape {expected} for {k} inputs, got {self.planes.shape}")
        if self.planes.dtype != jnp.uint32 or self.scale.dtype != jnp.uint16:
            raise ValueError(f"expected uint32 planes and uint16 scales, got {self.planes.dtype}, {self.scale.dtype}")
        if self.activation_bits is not None:
            if not 1 <= self.activation_bits <= 8:
                raise ValueError(f"activation_bits must be 1 to 8, got {self.activation_bits}")
            _check_sum(self.group, self.activation_bits, self.bits)


def _product(x: jax.Array, planes: jax.Array, scale: jax.Array, *, bits: int, group: int) -> jax.Array:
    """Multiplies ``x [T, K]`` by planes ``[G, n, words, N]`` with scales ``[G, N]``; returns float32 ``[T, N]``."""
    x = jnp.moveaxis(x.astype(jnp.float32).reshape(x.shape[0], -1, group), 1, 0)
    size, top = jnp.abs(x), 2**bits - 1
    x_scale = jnp.mean(size, -1) if bits == 1 else jnp.max(size, -1) / top
    odd = x / jnp.where(x_scale == 0, 1, x_scale)[..., None]
    codes = jnp.clip(jnp.round((odd + top) / 2), 0, top).astype(jnp.uint8)

    def product(x: jax.Array, planes: jax.Array) -> jax.Array:
        return int8_product(x, codes_of(planes, group), (bits, planes.shape[0]))

    return sum_over_groups(product, codes, x_scale, planes, scale)


def encode(
    w: jax.Array, axes: Axes, bits: int, activation_bits: int | None = None, group: int | None = None
) -> BitPlanes:
    """Rounds a weight to bipolar integers.

    Args:
      w: floating ``[*batch, ...]``.
      axes: input and output axes.
      bits: 1 to 8; a single bit takes the mean size as scale, which is its best; more, the largest size.
      activation_bits: 1 to 8, or None for products of decoded weights.
      group: consecutive inputs that share a scale; None for all.

    Raises:
      ValueError: bits out of range, or groups that do not divide the inputs.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    matrix = to_matrix(w, axes).astype(jnp.float32)
    *batch, k, n = matrix.shape
    if k % (group or k):
        raise ValueError(f"groups of {group} do not divide the {k} inputs")
    groups = matrix.reshape(*batch, -1, group or k, n)
    planes, scale = _encode(groups, bits)
    sizes = sizes_of(w.shape, axes)
    view = BitPlanes(planes, scale, axes, *sizes, activation_bits, jnp.dtype(w.dtype))
    view.check()
    return view


@functools.partial(jax.jit, static_argnums=1)
def _encode(groups: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    if bits == 1:
        return planes_of((groups >= 0).astype(jnp.uint8), 1), to_bits(jnp.mean(jnp.abs(groups), -2), "bfloat16")
    codes, scale, _ = bipolar_codec(bits, "channel").quantize(groups, (-2,), None)
    return planes_of(codes, bits), scale.squeeze(-2)


def bipolar(
    params: Any,
    weight_bits: int,
    activation_bits: int | None = None,
    where: Patterns = "**/kernel",
    *,
    group: int | None = None,
    axes: AxesTable | None = None,
) -> Any:
    """Returns ``params`` with the selected weights as bit planes of bipolar integers.

    Args:
      params: any pytree of arrays.
      weight_bits: 1 to 8.
      activation_bits: 1 to 8 to quantize the inputs of products too, or None.
      where: pattern(s) over logical paths, or a predicate of (path, leaf).
      group: consecutive inputs that share a scale; None for all inputs of an output.
      axes: pattern -> input and output axes, for weights that are not ``[*batch, in, out]``.

    Raises:
      ValueError: a pattern that matches nothing, bits or groups that do not fit, a weight that is not finite.
      TypeError: a selected leaf that is a view already or not floating point.
    """
    chosen = set(select(params, where))
    check_table(params, axes)

    def convert(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        check_dense(path, leaf)
        try:
            return encode(leaf, axes_of(path, leaf.shape, axes), weight_bits, activation_bits, group)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None

    return map_with_path(convert, params)
