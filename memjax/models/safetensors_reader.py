"""Reads safetensors checkpoints one tensor at a time through a memory map.

The format: 8 bytes of little-endian header length, a JSON header of ``name -> {dtype, shape, data_offsets}``,
then the tensors' bytes without gaps. A folder holds ``model.safetensors``, or shards that
``model.safetensors.index.json`` maps. Headers are checked whole before any tensor is read, so a damaged file
fails early and by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from memjax.models._tables import TensorTable, map_bytes

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """Where one tensor lies.

    Attributes:
      name: name in the file.
      dtype: dtype in the file.
      shape: shape in the file.
      file: the safetensors file.
      offset: first byte in the file.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Returns the tensor, ``dtype[*shape]``, read-only; backed by the file if that keeps it aligned."""
        array = map_bytes(self.file, self.offset, self.nbytes).view(self.dtype).reshape(self.shape)
        return array if array.flags.aligned else array.copy()


def read_safetensors(path: str | pathlib.Path) -> TensorTable:
    """Opens a safetensors file, or a folder with one or with shards; reads and checks the headers only.

    Args:
      path: a ``.safetensors`` file, or a folder with ``model.safetensors`` or
        ``model.safetensors.index.json``.

    Returns:
      Table of name -> `SafeTensor`; ``table[name].read()`` reads one tensor.

    Raises:
      ValueError: pickled weights, no weights, a damaged header, a missing shard, or a tensor that the index
        promises and its shard lacks.
    """
    path = pathlib.Path(path)
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(_refuse_pickle([path]))
        return TensorTable(path, _read_header(path))
    if not path.is_dir():
        raise ValueError(f"{path} is neither a safetensors file nor a folder")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return TensorTable(single, _read_header(single))
    if index.is_file():
        return TensorTable(index, _read_shards(index))
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(_refuse_pickle(pickles))
    raise ValueError(f"{path} has neither model.safetensors nor model.safetensors.index.json")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ValueError: not JSON, not an object, or a key that comes twice.
    """
    return _parse_json(file.read_bytes(), str(file))


def _refuse_pickle(files: list[pathlib.Path]) -> str:
    names = ", ".join(str(file) for file in files)
    return (
        f"{names}: pickled weights are refused, because loading a pickle can run any code it holds; save the "
        "checkpoint as safetensors (in transformers: model.save_pretrained(folder, safe_serialization=True))"
    )


def _parse_json(data: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} comes twice")
        return table

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _read_header(file: pathlib.Path) -> dict[str, SafeTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(
                f"{file} is truncated or not a safetensors file: it has {size} bytes, and its first 8 say "
                f"that the header has {length}"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{file} claims a header of {length} bytes; the format allows {MAX_HEADER_BYTES}"
            )
        header = _parse_json(stream.read(length), f"the header of {file}")
    header.pop("__metadata__", None)

    start, data_size = 8 + length, size - 8 - length
    tensors: dict[str, SafeTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"tensor {name!r} of {file}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} must have dtype, shape and data_offsets, got {entry!r:.200}")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ValueError(
                f"{where} has dtype {kind!r:.40}, which is not read; known are {', '.join(DTYPES)}"
            )
        if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{where} has the shape {shape!r:.200}, not a list of sizes")
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
            raise ValueError(
                f"{where} has the data_offsets {offsets!r:.200}, which do not lie within the {data_size} "
                "bytes of data that the file has: it is truncated or damaged"
            )
        begin, end = offsets
        tensor = SafeTensor(name, DTYPES[kind], tuple(shape), file, start + begin)
        if tensor.nbytes != end - begin:
            raise ValueError(
                f"{where} has shape {tensor.shape} and dtype {kind}, so {tensor.nbytes} bytes, but its "
                f"data_offsets hold {end - begin}"
            )
        tensors[name] = tensor
        spans.append((begin, end, name))
    spans.sort()
    position, before = 0, "the header"
    for begin, end, name in spans:
        if begin != position:
            relation = "overlaps" if begin < position else "leaves a gap after"
            raise ValueError(f"tensor {name!r} of {file} {relation} {before!r} (bytes {begin} to {end})")
        position, before = end, name
    if position != data_size:
        raise ValueError(f"{file} has {data_size - position} bytes after its last tensor")
    return tensors


def _read_shards(index: pathlib.Path) -> dict[str, SafeTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensor name -> shard")
    shards: dict[str, dict[str, SafeTensor]] = {}
    tensors: dict[str, SafeTensor] = {}
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or pathlib.PurePath(shard).name != shard
            or not shard.endswith(".safetensors")
        ):
            raise ValueError(
                f"{index} places {name!r} in {shard!r:.100}, which is not a .safetensors file beside it"
            )
        if shard not in shards:
            file = index.parent / shard
            if not file.is_file():
                raise ValueError(f"the shard {file} is missing; {index.name} places {name!r} in it")
            shards[shard] = _read_header(file)
        if name not in shards[shard]:
            raise ValueError(
                f"{index.parent / shard} has no tensor {name!r}, which {index.name} places in it"
            )
        tensors[name] = shards[shard][name]
    return tensors
