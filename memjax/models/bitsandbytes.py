"""NF4 weights in safetensors checkpoints that transformers saved with bitsandbytes.

A quantized tensor ``X`` lies in the file as uint8 codes ``X``, its scales ``X.absmax``, the tables ``X.quant_map`` and
``X.nested_quant_map``, the second-level scales ``X.nested_absmax``, and JSON settings, as bytes, in
``X.quant_state.bitsandbytes__nf4``. Source: bitsandbytes, `functional.py` (``QuantState.as_dict``).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from memjax import codecs
from memjax.codecs.nf4 import DYNAMIC_MAP, LEVELS, SECOND_BLOCK
from memjax.models.safetensors_reader import SafeTensor

_SETTINGS = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclasses.dataclass(frozen=True)
class Nf4Tensor:
    """Where one quantized tensor lies.

    Attributes:
      name: name in the file.
      shape: logical shape ``(out, in)``.
      block: elements per scale.
      nested_offset: mean of the scales, where they are quantized, else None.
      parts: the tensors in the file: ``codes``, ``absmax``, and where nested ``nested_absmax``.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    nested_offset: float | None
    parts: Mapping[str, SafeTensor]

    @property
    def kind(self) -> str:
        """The format in words."""
        nested = "plain" if self.nested_offset is None else "nested"
        whole = "" if self.shape[-1] % self.block == 0 else " across rows"
        return f"NF4 ({nested} scales of {self.block}{whole})"

    def packed(self) -> codecs.Packed:
        """Returns the tensor as `memjax.codecs.Packed` with numpy leaves, groups along axis -1.

        Raises:
          ValueError: parts that do not fit the shape, or rows that are no whole number of blocks.
        """
        return self._packed(self.shape)

    def decode(self) -> np.ndarray:
        """Returns the dense values, ``float32[*shape]``."""
        return np.asarray(self._packed((1, math.prod(self.shape))).decode()).reshape(self.shape)

    def _packed(self, shape: tuple[int, ...]) -> codecs.Packed:
        nested = self.parts["nested_absmax"].read() if "nested_absmax" in self.parts else None
        codes = self.parts["codes"].read().reshape(-1).view(np.uint8)
        absmax = self.parts["absmax"].read().reshape(-1)
        try:
            return codecs.from_bitsandbytes(codes, absmax, shape, nested, self.nested_offset, self.block)
        except ValueError as problem:
            raise ValueError(f"tensor {self.name!r}: {problem}") from None


def is_four_bit(config: Mapping[str, Any]) -> bool:
    """Returns whether a model's ``config.json`` says that bitsandbytes stored its weights in 4 bits."""
    settings = config.get("quantization_config") or {}
    return settings.get("quant_method") == "bitsandbytes" and bool(settings.get("load_in_4bit"))


def join_quantized(tensors: Mapping[str, SafeTensor]) -> dict[str, SafeTensor | Nf4Tensor]:
    """Returns ``tensors`` with the parts of each quantized tensor joined to one entry under its name.

    Raises:
      ValueError: another format than NF4, missing parts, or tables that are not those of NF4; names the tensor.
    """
    joined: dict[str, SafeTensor | Nf4Tensor] = dict(tensors)
    for key in tensors:
        name, separator, kind = key.partition(_SETTINGS)
        if not separator:
            continue
        if kind != "nf4":
            raise ValueError(f"tensor {name!r} is in the 4-bit format {kind!r} of bitsandbytes; only 'nf4' is read")
        del joined[key]
        found = {part: joined.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in joined}
        joined[name] = _join(name, _json_of(tensors[key]), {"codes": joined.get(name), **found})
    return joined


def _json_of(tensor: SafeTensor) -> dict[str, Any]:
    """Returns the JSON object that a uint8 tensor holds.

    Raises:
      ValueError: no such object.
    """
    try:
        settings = json.loads(tensor.read().tobytes().decode())
    except ValueError as problem:
        raise ValueError(f"tensor {tensor.name!r} holds no JSON: {problem}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"tensor {tensor.name!r} must hold a JSON object, got {type(settings).__name__}")
    return settings


def _join(name: str, settings: dict[str, Any], parts: dict[str, Any]) -> Nf4Tensor:
    nested = "nested_absmax" in parts
    for part, table in (("quant_map", LEVELS), ("nested_quant_map", DYNAMIC_MAP)):
        if part == "nested_quant_map" and not nested:
            continue
        found = parts[part].read() if part in parts else np.zeros(0)
        if found.shape != table.shape or not np.allclose(found, table, rtol=0, atol=1e-6):
            raise ValueError(f"tensor '{name}.{part}': expected the {table.size} values of NF4, found others")
    if nested and settings.get("nested_blocksize") != SECOND_BLOCK:
        raise ValueError(
            f"tensor {name!r}: expected nested blocks of {SECOND_BLOCK}, found {settings.get('nested_blocksize')!r}"
        )
    shape, block, offset = settings.get("shape"), settings.get("blocksize"), settings.get("nested_offset")
    if not (
        isinstance(shape, list)
        and all(isinstance(size, int) and size > 0 for size in shape)
        and isinstance(block, int)
        and block > 0
        and (offset is None) != nested
        and None not in (parts.get("codes"), parts.get("absmax"))
    ):
        raise ValueError(f"tensor {name!r}: its parts {sorted(parts)} do not fit its settings {settings!r:.300}")
    offset = None if offset is None else float(offset)
    return Nf4Tensor(name, tuple(shape), block, offset, parts)
