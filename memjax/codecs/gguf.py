"""The block formats Q4_0, Q4_1 and Q8_0 of GGUF files: 32 elements and a float16 scale per block.

Codes, scales and offsets are those that ggml's reference quantizer gives (blocks whose scale is below the
smallest normal float32 excepted, which become zeros) where float32 division rounds correctly, as on a CPU. XLA's
division on a GPU is off by an ulp at times, which can move an element that lies half-way between two codes.
Source: ggml, `ggml-quants.c` and `gguf-py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs.packed import Codec, Packed, to_bits

BLOCK = 32
_FLOAT16_MAX = 65504.0


def _reciprocal(step: jax.Array) -> jax.Array:
    return jnp.where(step == 0, 0.0, 1 / jnp.where(step == 0, 1.0, step))


def _divide(x: jax.Array, power: int) -> jax.Array:
    """Returns ``x / (power - 1)`` correctly rounded, for a power of two.

    XLA multiplies by the reciprocal of a constant instead; the residual of that quotient is computed without
    rounding and corrects it.
    """
    reciprocal = np.float32(1 / (power - 1))
    quotient = jax.lax.optimization_barrier(x * reciprocal)
    residual = (x - power * quotient) + quotient
    return quotient + residual * reciprocal


def _round_up_from(x: jax.Array, shift: float) -> jax.Array:
    """Returns ``floor(x + shift)`` as uint8 with the product that made ``x`` rounded on its own.

    The maximum never bites (x > -9); it keeps the compiler from fusing product and sum into one rounding.
    """
    return jnp.floor(jnp.maximum(x, -9.0) + np.float32(shift)).astype(jnp.uint8)


def _quantize_q4_0(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, None]:
    size = jnp.abs(x)
    order, stride = jnp.zeros((), jnp.int32), 1
    for axis in reversed(axes):
        order = order + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim) * stride
        stride *= x.shape[axis]
    largest = size == jnp.max(size, axes, keepdims=True)
    first = jnp.min(jnp.where(largest, order, stride), axes, keepdims=True)
    step = jnp.max(jnp.where(order == first, x, -jnp.inf), axes, keepdims=True) / -8
    codes = jnp.minimum(_round_up_from(x * _reciprocal(step), 8.5), 15)
    return codes, to_bits(step, "float16"), None


def _quantize_q4_1(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    low, high = jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)
    step = _divide(high - low, 16)
    codes = jnp.minimum(_round_up_from((x - low) * _reciprocal(step), 0.5), 15)
    return codes, to_bits(step, "float16"), to_bits(low, "float16")


def _quantize_q8_0(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, None]:
    step = _divide(jnp.max(jnp.abs(x), axes, keepdims=True), 128)
    steps = jax.lax.round(x * _reciprocal(step), jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    codes = jax.lax.bitcast_convert_type(steps.astype(jnp.int8), jnp.uint8)
    return codes, to_bits(step, "float16"), None


_QUANTIZE = {"Q4_0": _quantize_q4_0, "Q4_1": _quantize_q4_1, "Q8_0": _quantize_q8_0}


@dataclasses.dataclass(frozen=True)
class Gguf(Codec):
    """A GGUF block format; 4.5 (Q4_0), 5 (Q4_1) or 8.5 (Q8_0) bits per element."""

    kind: str
    bits: int
    symmetric: bool

    group = BLOCK
    scale_dtype = "float16"

    @property
    def limit(self) -> float:
        return _FLOAT16_MAX * (2 ** (self.bits - 1) - 1) if self.symmetric else _FLOAT16_MAX

    def encode(self, x: Any, axes: int | tuple[int, ...] = (-2,), key: None = None) -> Packed:
        """Encodes as `Codec.encode`, with ggml's own rounding; a ``key`` raises ValueError."""
        if key is not None:
            raise ValueError(f"{self.kind} has its own rounding, got a key for stochastic rounding; use int4 or int8")
        return super().encode(x, axes)

    def quantize(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return _QUANTIZE[self.kind](x, axes)


def q4_0() -> Gguf:
    """Returns Q4_0: codes 0..15 standing for -8..7, times a scale."""
    return Gguf("Q4_0", 4, True)


def q4_1() -> Gguf:
    """Returns Q4_1: codes 0..15 times a scale, plus an offset."""
    return Gguf("Q4_1", 4, False)


def q8_0() -> Gguf:
    """Returns Q8_0: codes -127..127 times a scale."""
    return Gguf("Q8_0", 8, True)


_CODECS = {codec.kind: codec for codec in (q4_0(), q4_1(), q8_0())}


def from_gguf(kind: str, raw: np.ndarray, shape: tuple[int, ...], dtype: Any = "float32") -> Packed:
    """Splits the bytes of a GGUF tensor into codes and scales; nothing is decoded or rounded.

    Args:
      kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q8_0"``.
      raw: uint8 ``[rows, row_bytes]``, the tensor's bytes.
      shape: logical shape ``[..., columns]`` (slowest axis first) with ``rows`` rows in all.
      dtype: dtype of the array that the codes stand for.

    Returns:
      `Packed` with numpy leaves and groups along axis -1.

    Raises:
      ValueError: another kind, or bytes that do not fit ``shape``.
    """
    codec = _CODECS.get(kind.upper())
    if codec is None:
        raise ValueError(f"expected a GGUF kind among {', '.join(_CODECS)}, got {kind!r}")
    *lead, columns = shape
    block_bytes = int(codec.bits_per_element() * BLOCK / 8)
    if columns % BLOCK:
        raise ValueError(f"{codec.kind} rows hold blocks of {BLOCK} elements, got rows of {columns} in shape {shape}")
    expected = (int(np.prod(lead, dtype=np.int64)), columns // BLOCK * block_bytes)
    if raw.dtype != np.uint8 or raw.shape != expected:
        raise ValueError(
            f"expected uint8 bytes of shape {expected} for a {codec.kind} array of shape {tuple(shape)}, "
            f"got {raw.dtype} {raw.shape}"
        )
    blocks = raw.reshape(*lead, columns // BLOCK, block_bytes)
    header = 2 if codec.symmetric else 4
    halves = np.ascontiguousarray(blocks[..., :header]).view("<u2").astype(np.uint16, copy=False)
    codes = blocks[..., header:].reshape(*lead, columns * codec.bits // 8)
    offset = None if codec.symmetric else halves[..., 1]
    return Packed((codes,), halves[..., 0], offset, codec, (-1,), jnp.dtype(dtype))


def to_gguf(packed: Packed) -> np.ndarray:
    """Returns the bytes of a GGUF tensor, uint8 ``[rows, row_bytes]``; exact inverse of `from_gguf`.

    Raises:
      ValueError: codes of another format, or groups that do not run along the last axis (transpose first).
    """
    if not isinstance(packed.codec, Gguf):
        raise ValueError(f"expected Q4_0, Q4_1 or Q8_0 codes, got {packed.codec}")
    if packed.axes != (-1,):
        raise ValueError(f"GGUF blocks run along the last axis, got groups along {packed.axes}: transpose first")
    *lead, columns = packed.shape
    halves = [packed.scale] if packed.offset is None else [packed.scale, packed.offset]
    header = np.stack([np.asarray(half) for half in halves], axis=-1).astype("<u2", copy=False).view(np.uint8)
    codes = np.asarray(packed.planes[0]).reshape(*lead, columns // BLOCK, -1)
    return np.concatenate([header, codes], axis=-1).reshape(int(np.prod(lead, dtype=np.int64)), -1)
