"""Reads GGUF files (version 2 and 3, little-endian): metadata, tensors, block formats.

The format: ``GGUF``, version, counts; metadata as typed key-value pairs; a table of tensors (name, sizes with
the fastest first, type, offset); then, aligned, the tensors' bytes. Every count, length and offset is checked
against the bytes that the file has before anything of that size is made. Values of quantised types lie in
blocks along the last axis; K-types have blocks of 256 with 6-bit scales of sub-blocks. Source: the GGUF
specification and block formats of ggml, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from memjax.models._tables import TensorTable, map_bytes

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9:
    "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17:
    "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25:
    "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33:
    "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ROWS_AT_ONCE_ELEMENTS = 1 << 20


def _nibbles(q: np.ndarray) -> np.ndarray:
    """Returns the low nibbles of ``uint8[..., n]``, then the high ones: ``uint8[..., 2, n]``."""
    return np.stack([q & 15, q >> 4], axis=-2)


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _decode_q4_0(block: np.ndarray) -> np.ndarray:
    q = _nibbles(block["q"]).reshape(-1, 32)
    return _f32(block["d"])[:, None] * (_f32(q) - 8)


def _decode_q4_1(block: np.ndarray) -> np.ndarray:
    q = _nibbles(block["q"]).reshape(-1, 32)
    return _f32(block["d"])[:, None] * _f32(q) + _f32(block["m"])[:, None]


def _decode_q8_0(block: np.ndarray) -> np.ndarray:
    return _f32(block["d"])[:, None] * _f32(block["q"])


def _k_scales(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns scales and minima of the 8 sub-blocks, ``float32[blocks, 8, 1]`` each, from 6-bit codes."""
    low, high, rest = (block["scales"][:, i : i + 4] for i in (0, 4, 8))
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    scale, minimum = (
        _f32(block[name])[:, None] * _f32(codes) for name, codes in (("d", scale), ("dmin", minimum))
    )
    return scale[..., None], minimum[..., None]


def _decode_q4_k(block: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(block)
    q = _nibbles(block["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scale * _f32(q) - minimum


def _decode_q5_k(block: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(block)
    q = _nibbles(block["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = block["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return scale * _f32(q | fifth << 4) - minimum


def _decode_q6_k(block: np.ndarray) -> np.ndarray:
    low = _nibbles(block["q"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = block["high"].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = (_f32(low | high << 4) - 32).reshape(-1, 16, 16)
    scale = _f32(block["d"])[:, None] * _f32(block["scales"])
    return scale[..., None] * q


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tensor type: ``elements`` values in a block of dtype ``block``, and how blocks become float32."""

    elements: int
    block: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]


def _block(**fields: Any) -> np.dtype:
    return np.dtype(
        [(name, *spec) if isinstance(spec, tuple) else (name, spec) for name, spec in fields.items()]
    )


KINDS: dict[str, Kind] = {
    "F32": Kind(1, np.dtype("<f4"), _f32),
    "F16": Kind(1, np.dtype("<f2"), _f32),
    "BF16": Kind(1, np.dtype(ml_dtypes.bfloat16), _f32),
    "Q4_0": Kind(32, _block(d="<f2", q=("u1", 16)), _decode_q4_0),
    "Q4_1": Kind(32, _block(d="<f2", m="<f2", q=("u1", 16)), _decode_q4_1),
    "Q8_0": Kind(32, _block(d="<f2", q=("i1", 32)), _decode_q8_0),
    "Q4_K": Kind(256, _block(d="<f2", dmin="<f2", scales=("u1", 12), q=("u1", 128)), _decode_q4_k),
    "Q5_K": Kind(
        256, _block(d="<f2", dmin="<f2", scales=("u1", 12), high=("u1", 32), q=("u1", 128)), _decode_q5_k
    ),
    "Q6_K": Kind(256, _block(q=("u1", 128), high=("u1", 64), scales=("i1", 16), d="<f2"), _decode_q6_k),
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
      name: name in the file.
      kind: type name, a key of `KINDS`.
      shape: logical shape with the contiguous axis last (the file lists it first); a kernel is ``(out, in)``.
      file: the GGUF file.
      offset: first byte in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int

    @property
    def rows(self) -> int:
        """Product of all axes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the last axis."""
        kind = KINDS[self.kind]
        return self.shape[-1] // kind.elements * kind.block.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.rows * self.row_bytes

    def raw(self) -> np.ndarray:
        """Returns the blocks as the file has them, ``uint8[rows, row_bytes]``, read-only and backed by it."""
        return map_bytes(self.file, self.offset, self.nbytes).reshape(self.rows, self.row_bytes)

    def decode(self, dtype: Any = np.float32) -> np.ndarray:
        """Returns the dense values, ``dtype[*shape]``, decoded in float32 some rows at a time."""
        kind, raw = KINDS[self.kind], self.raw()
        out = np.empty((self.rows, self.shape[-1]), dtype)
        step = max(1, _ROWS_AT_ONCE_ELEMENTS // self.shape[-1])
        for i in range(0, self.rows, step):
            blocks = np.ascontiguousarray(raw[i : i + step]).reshape(-1).view(kind.block)
            out[i : i + step] = kind.decode(blocks).reshape(-1, self.shape[-1])
        return out.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """What a GGUF file says of itself.

    Attributes:
      path: the file.
      metadata: key -> int, float, bool, str, numpy array (arrays of numbers) or list of str.
      tensors: name -> `GgufTensor`.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: TensorTable


class _Cursor:
    """Reads forward through a buffer and never past its end."""

    def __init__(self, buffer: mmap.mmap, path: pathlib.Path):
        self.buffer, self.path, self.position, self.size = buffer, path, 0, len(buffer)

    def require(self, count: int, each: int, what: str) -> None:
        """Raises unless ``count`` things of at least ``each`` bytes can follow."""
        if count * each > self.size - self.position:
            raise ValueError(
                f"{self.path} is truncated or damaged: {what} at byte {self.position} needs {count * each} "
                f"bytes, the file has {self.size - self.position} more"
            )

    def take(self, size: int, what: str) -> bytes:
        self.require(size, 1, what)
        self.position += size
        return self.buffer[self.position - size : self.position]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {data!r:.80}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: {what} has the unknown value type {kind}")
        value = self.number(_SCALARS[kind], what)
        if kind == _BOOL:
            if value > 1:
                raise ValueError(f"{self.path}: {what} is a bool with the byte {value}")
            return bool(value)
        return value

    def array(self, what: str) -> Any:
        kind, count = (
            self.number("<I", f"the item type of {what}"),
            self.number("<Q", f"the length of {what}"),
        )
        if kind == _STRING:
            self.require(count, 8, f"{what}, {count} strings,")
            return [self.string(f"item {i} of {what}") for i in range(count)]
        if kind == _ARRAY:
            raise ValueError(f"{self.path}: {what} is an array of arrays, which is not read")
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: {what} has items of the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        self.require(count, dtype.itemsize, f"{what}, {count} numbers,")
        items = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        return items.astype(np.bool_) if kind == _BOOL else items


def read_gguf(path: str | pathlib.Path) -> Gguf:
    """Opens a GGUF file; reads and checks everything but the tensors' bytes.

    Args:
      path: a ``.gguf`` file.

    Returns:
      Its metadata and tensors; ``gguf.tensors[name].raw()`` and ``.decode()`` read one tensor.

    Raises:
      ValueError: not a GGUF file of version 2 or 3, little-endian; a tensor type that is not read; or counts,
        lengths, sizes or offsets that the file cannot hold, names that come twice, tensors that overlap.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too few for a GGUF header")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        return _parse(_Cursor(buffer, path))


def _parse(cursor: _Cursor) -> Gguf:
    path = cursor.path
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        big = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
        raise ValueError(f"{path} has GGUF version {version}{big}; little-endian versions 2 and 3 are read")
    tensor_count, key_count = cursor.number("<Q", "the tensor count"), cursor.number("<Q", "the key count")
    cursor.require(key_count, 13, f"metadata of {key_count} keys")
    cursor.require(tensor_count, 32, f"a table of {tensor_count} tensors")

    metadata: dict[str, Any] = {}
    for i in range(key_count):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise ValueError(f"{path}: the metadata key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.number("<I", f"the type of {key!r}"), f"metadata {key!r}")
    parts = metadata.get("split.count", 1)
    if parts != 1 and type(parts) is int and parts > 1:
        raise ValueError(
            f"{path} is one part of {parts}; merge them (llama-gguf-split --merge) and give the result"
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment must be a power of two, got {alignment!r:.80}")

    cursor.require(tensor_count, 32, f"a table of {tensor_count} tensors")
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for i in range(tensor_count):
        name = cursor.string(f"the name of tensor {i}")
        if name in entries:
            raise ValueError(f"{path}: the tensor {name!r} comes twice")
        entries[name] = _tensor_entry(cursor, name)

    start = -(-cursor.position // alignment) * alignment
    tensors, spans = {}, []
    for name, (kind, shape, offset) in entries.items():
        tensor = GgufTensor(name, kind, shape, path, start + offset)
        end = tensor.offset + tensor.nbytes
        if offset % alignment:
            raise ValueError(
                f"{path}: tensor {name!r} has the offset {offset}, not a multiple of {alignment}"
            )
        if end > cursor.size:
            raise ValueError(
                f"{path} is truncated or damaged: tensor {name!r} ({kind}, {shape}) ends at byte {end}, the "
                f"file has {cursor.size}"
            )
        tensors[name] = tensor
        spans.append((tensor.offset, end, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{path}: tensors {name!r} and {other!r} overlap at byte {begin}")
    return Gguf(path, metadata, TensorTable(path, tensors))


def _tensor_entry(cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int]:
    """Returns kind, shape and offset of the tensor whose name was just read."""
    where = f"{cursor.path}: tensor {name!r}"
    ndim = cursor.number("<I", f"the number of axes of {name!r}")
    if not 1 <= ndim <= 4:
        raise ValueError(f"{where} has {ndim} axes; GGUF tensors have 1 to 4")
    sizes = tuple(cursor.number("<Q", f"the sizes of {name!r}") for _ in range(ndim))
    number = cursor.number("<I", f"the type of {name!r}")
    offset = cursor.number("<Q", f"the offset of {name!r}")
    kind = TYPE_NAMES.get(number, f"number {number}, unknown to this version")
    if kind not in KINDS:
        raise ValueError(
            f"{where} has the type {kind}, which is not read; read are {', '.join(KINDS)}: take another "
            "quantisation of the model, or requantise it (llama-quantize)"
        )
    if 0 in sizes or sizes[0] % KINDS[kind].elements:
        raise ValueError(
            f"{where} has the sizes {sizes}; they must be positive and, for {kind}, the first a multiple of "
            f"{KINDS[kind].elements}"
        )
    return kind, sizes[::-1], offset
