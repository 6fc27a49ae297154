"""Saving and loading of trees of arrays and packed weights: one safetensors file, replaced atomically."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs import Bipolar, Fp8, Gguf, Grouped, Nf4, Packed
from memjax.core.files import replacing
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view, make_axes
from memjax.weights.packed import PackedWeight

FORMAT = "memjax-weights-1"
_CODECS: dict[str, Any] = {"grouped": Grouped, "gguf": Gguf, "bipolar": Bipolar, "nf4": Nf4, "fp8": Fp8}


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
            for part, tensor in _parts(packed).items():
                tensors[f"{name}#{part}"] = np.asarray(tensor)
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


def _parts(packed: Packed) -> dict[str, Any]:
    """Returns the leaves of ``packed`` by their names in the file, in the order of the leaves."""
    parts = {f"plane{i}": plane for i, plane in enumerate(packed.planes)}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(packed.scale)[0]:
        parts[".".join(["scale", *(key.name for key in keys)])] = leaf
    return parts if packed.offset is None else {**parts, "offset": packed.offset}


def _packed(path: str, name: str, recorded: dict[str, Any], tensors: dict[str, Any]) -> PackedWeight:
    try:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded["settings"].items()}
        codec = _CODECS[recorded["codec"]](**settings)
        plane, axes = tensors[f"{name}#plane0"], tuple(recorded["group_axes"])
        shape = Packed((plane,), None, None, codec, axes, jnp.dtype(recorded["dtype"])).shape
        weight_axes = make_axes(recorded["inputs"], recorded["outputs"], len(shape))
        expected = jax.eval_shape(lambda: codec.encode(jnp.zeros(shape, recorded["dtype"]), axes))
        leaves = [tensors[f"{name}#{part}"] for part in _parts(expected)]
        packed = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
        raise ValueError(f"{path}: {name} does not fit its recorded format {recorded}: {problem}") from None
    found = {key.partition("#")[2]: (t.shape, t.dtype) for key, t in tensors.items() if key.partition("#")[0] == name}
    wanted = {part: (leaf.shape, leaf.dtype) for part, leaf in _parts(expected).items()}
    if found != wanted or packed.axes != axes:
        raise ValueError(f"{path}: {name} holds {found}, but its recorded format needs {wanted}")
    return PackedWeight(packed, weight_axes)
