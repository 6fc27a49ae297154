"""Writes models as folders that `load` reads: in Hugging Face's form where all weights are dense, else in memjax's."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from memjax.core.files import replacing
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view
from memjax.models import bert, llama
from memjax.models.layers import Source
from memjax.models.model import Config, Model
from memjax.models.safetensors_reader import DTYPES
from memjax.models.tokenizer import Tokenizer
from memjax.weights import save as save_weights

DENSE_FILE, PACKED_FILE = "model.safetensors", "memjax.safetensors"


def save(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a folder with the model's configuration, weights and tokenizer, which `load` reads back.

    Dense params become ``model.safetensors`` under Hugging Face's names, in a folder that transformers loads. Params
    with packed weights become ``memjax.safetensors``, codes as they are. Every file is replaced atomically, and
    ``config.json``, without which a folder is no model, comes last.

    Args:
      folder: made if missing.
      model: a model of the Llama or BERT family.

    Raises:
      ValueError: a folder with other weights in it, or sizes that Hugging Face's configurations cannot say.
      TypeError: a leaf that is neither an array nor a packed weight, such as one with an adapter attached.
    """
    folder = pathlib.Path(folder)
    packed = any(is_view(leaf) for _, leaf in leaf_paths(model.params))
    file = PACKED_FILE if packed else DENSE_FILE
    settings = to_hf(model.config)
    others = {path.name for path in folder.glob("*.safetensors*")} - {file}
    if others:
        raise ValueError(f"{folder} holds other weights already: {', '.join(sorted(others))}")
    folder.mkdir(parents=True, exist_ok=True)
    if packed:
        save_weights(folder / file, model.params)
    else:
        write_safetensors(folder / file, _tensors(model), {"format": "pt"})
    if model.tokenizer is not None:
        settings |= _write_tokenizer(folder, model.tokenizer)
    settings["dtype"] = str(next(leaf.dtype for path, leaf in leaf_paths(model.params) if path.endswith("scale")))
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def hf_sources(config: Config) -> dict[str, Source]:
    """Returns leaf path -> tensor of a Hugging Face checkpoint."""
    return llama.hf_sources(config) if isinstance(config, llama.LlamaConfig) else bert.hf_sources()


def to_hf(config: Config) -> dict[str, Any]:
    """Returns the content of a Hugging Face ``config.json``.

    Raises:
      ValueError: sizes that no supported ``model_type`` can say.
    """
    return llama.config_to_hf(config) if isinstance(config, llama.LlamaConfig) else bert.config_to_hf(config)


class _Entry(NamedTuple):
    """A tensor to write: a part of a leaf."""

    name: str
    leaf: Any
    layer: int | None
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.leaf.shape if self.layer is None else self.leaf.shape[1:]
        return tuple(shape[::-1] if self.transpose else shape)


def _tensors(model: Model) -> list[_Entry]:
    leaves = dict(leaf_paths(model.params))
    entries = []
    for path, source in hf_sources(model.config).items():
        leaf = leaves[path]
        stacked = "{}" in source.name
        for i in range(leaf.shape[0]) if stacked else [None]:
            entries.append(_Entry(source.name.format(i), leaf, i, source.transpose))
    return entries


def write_safetensors(
    path: str | os.PathLike[str], entries: Iterable[_Entry], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file tensor by tensor, so that the host holds one leaf beside the model."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for entry in entries:
        dtype = np.dtype(entry.leaf.dtype)
        size = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
        offsets = [position, position + size]
        header[entry.name] = {"dtype": names[dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    held, values = None, np.empty(0)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            if entry.leaf is not held:
                held, values = entry.leaf, np.asarray(entry.leaf)
            part = values if entry.layer is None else values[entry.layer]
            stream.write(np.ascontiguousarray(part.T if entry.transpose else part).tobytes())


def _write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the tokenizer, and returns what the configuration says of it."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    known = {role: number for role, number in ids.items() if number is not None}
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer.backend.save(str(temporary))
    names = {f"{role}_token": tokenizer.backend.id_to_token(number) for role, number in known.items()}
    with replacing(folder / "tokenizer_config.json") as temporary:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {f"{role}_token_id": number for role, number in known.items()}
