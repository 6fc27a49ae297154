"""What the checkpoint readers share: a table of tensors with clear errors, and memory-mapped bytes."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np


class TensorTable(dict[str, Any]):
    """Tensors of a checkpoint by name; a name that is not there raises `ValueError` instead of `KeyError`."""

    def __init__(self, source: pathlib.Path, tensors: dict[str, Any]):
        super().__init__(tensors)
        self.source = source

    def __missing__(self, name: str) -> Any:
        near = [other for other in self if other.split(".")[-2:] == name.split(".")[-2:]][:3]
        hint = f" (it has {', '.join(near)})" if near else ""
        raise ValueError(f"{self.source} has no tensor {name!r} among its {len(self)}{hint}")


def map_bytes(file: pathlib.Path, offset: int, size: int) -> np.ndarray:
    """Returns ``uint8[size]``, a read-only view of the file's bytes from ``offset``; nothing is read until
    touched.

    Every call maps anew, so the pages leave memory with the array.

    Raises:
      ValueError: the file is shorter than ``offset + size``.
    """
    if size == 0:
        return np.empty(0, np.uint8)
    if file.stat().st_size < offset + size:
        raise ValueError(
            f"{file} became shorter while it was read: bytes {offset} to {offset + size} are gone"
        )
    return np.asarray(np.memmap(file, np.uint8, "r", offset, (size,)))
