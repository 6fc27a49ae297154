"""Saving and loading of trees of arrays and packed weights: one safetensors file, replaced atomically."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs import Gguf, Grouped, Packed
from memjax.core.files import replacing
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view, make_axes
from memjax.weights.packed import PackedWeight

FORMAT = "memjax-weights-1"
_CODECS: dict[str, Any] = {"grouped": Grouped, "gguf": Gguf}


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Writes a tree of nested dicts of arrays and packed weights to one safetensors file.

    The file is written under a temporary name and renamed, so an interrupted save leaves the previous file.

    Args:
      path: file to write.
      params: nested dicts (or a Flax state); views other than packed ones are refused.

    Raises:
      TypeError: a leaf that is neither an array nor a packed weight (save an adapter with the adapter's own save).
      ValueError: a path with a ``#``, which separates a weight from its parts in the file.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    formats: dict[str, Any] = {}
    for name, leaf in leaf_paths(params):
        if "#" in name:
            raise ValueError(f"{name}: a path cannot be saved with a '#' in it")
        if isinstance(leaf, PackedWeight):
            packed = leaf.packed
            formats[name] = {
                "codec": next(key for key, kind in _CODECS.items() if type(packed.codec) is kind),
                "settings": {
                    f.name: getattr(packed.codec, f.name) for f in dataclasses.fields(cast(Any, packed.codec))
                },
                "group_axes": packed.axes,
                "inputs": leaf.axes.inputs,
                "outputs": leaf.axes.outputs,
                "dtype": jnp.dtype(packed.dtype).name,
            }
            for i, plane in enumerate(packed.planes):
                tensors[f"{name}#plane{i}"] = np.asarray(plane)
            tensors[f"{name}#scale"] = np.asarray(packed.scale)
            if packed.offset is not None:
                tensors[f"{name}#offset"] = np.asarray(packed.offset)
        elif is_view(leaf) or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}: expected an array or a packed weight to save, got {type(leaf).__name__}")
        else:
            tensors[name] = np.asarray(leaf)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "packed": json.dumps(formats)})


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote, as nested dicts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that `save` did not write, a recorded format that is unknown, or leaves that do not fit it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: expected format {FORMAT!r}, found {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            formats = json.loads(metadata["packed"])
            if not isinstance(formats, dict):
                raise ValueError(f"{path}: expected a table of formats, found {formats!r}")
    except (SafetensorError, KeyError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path}: not a readable file of weights ({problem})") from None
    params: dict[str, Any] = {}
    for name in [*formats, *(name for name in tensors if "#" not in name)]:
        *parents, last = name.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path}: {name} lies inside another leaf")
        if last in place:
            raise ValueError(f"{path}: other leaves lie inside {name}")
        if name in formats:
            place[last] = jax.tree.map(jnp.asarray, _packed(str(path), name, formats[name], tensors))
        else:
            place[last] = jnp.asarray(tensors.pop(name))
    stray = [name for name in tensors if name.partition("#")[0] not in formats]
    if stray:
        raise ValueError(f"{path}: {stray} are parts of packed weights whose format is not recorded")
    return params


def _packed(path: str, name: str, recorded: dict[str, Any], tensors: dict[str, Any]) -> PackedWeight:
    try:
        codec = _CODECS[recorded["codec"]](**recorded["settings"])
        planes = tuple(tensors[f"{name}#plane{i}"] for i in range(sum(k.startswith(f"{name}#plane") for k in tensors)))
        packed = Packed(
            planes,
            tensors[f"{name}#scale"],
            tensors.get(f"{name}#offset"),
            codec,
            tuple(recorded["group_axes"]),
            jnp.dtype(recorded["dtype"]),
        )
        axes = make_axes(recorded["inputs"], recorded["outputs"], packed.ndim)
        expected = jax.eval_shape(lambda: codec.encode(jnp.zeros(packed.shape, packed.dtype), packed.axes))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
        raise ValueError(f"{path}: {name} does not fit its recorded format {recorded}: {problem}") from None
    found = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(packed)]
    wanted = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)]
    if found != wanted:
        raise ValueError(f"{path}: {name} holds {found}, but its recorded format needs {wanted}")
    return PackedWeight(packed, axes)
