"""Saving and loading of trees of arrays and stored weights: one safetensors file, replaced atomically."""

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
from memjax.core.views import Axes, is_view, make_axes
from memjax.weights.bipolar import BitPlanes
from memjax.weights.bitmap import Bitmap
from memjax.weights.factored import Factored
from memjax.weights.integer import IntegerWeight
from memjax.weights.nm_sparse import NMSparse
from memjax.weights.packed import PackedWeight
from memjax.weights.tiled_csl import TiledCSL

FORMAT = "memjax-weights-1"
_VIEWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "nm_sparse": (NMSparse, ("values", "indices")),
    "bitmap": (Bitmap, ("values", "masks", "offsets")),
    "tiled_csl": (TiledCSL, ("words", "offsets")),
    "factored": (Factored, ("u", "v")),
    "integer": (IntegerWeight, ("packed",)),
    "bit_planes": (BitPlanes, ("planes", "scale")),
}
_CODECS: dict[str, Any] = {"grouped": Grouped, "gguf": Gguf, "bipolar": Bipolar, "nf4": Nf4, "fp8": Fp8}


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Writes a tree of nested dicts of arrays and packed, sparse, factored or integer weights to one safetensors file.

    The file is written under a temporary name and renamed, so an interrupted save leaves the previous file.

    Args:
      path: file to write.
      params: nested dicts (or a Flax state); adapted weights are refused.

    Raises:
      TypeError: a leaf that is neither an array nor a stored weight (save an adapter with the adapter's own save).
      ValueError: a path with a ``#``, which separates a weight from its parts in the file.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    formats: dict[str, Any] = {}
    for name, leaf in leaf_paths(params):
        if "#" in name:
            raise ValueError(f"{name}: a path cannot be saved with a '#' in it")
        if type(leaf) is PackedWeight or any(type(leaf) is view for view, _ in _VIEWS.values()):
            parts: dict[str, Any] = {}
            if type(leaf) is PackedWeight:
                formats[name] = {**_record(leaf.packed), "inputs": leaf.axes.inputs, "outputs": leaf.axes.outputs}
                parts = _parts(leaf.packed)
            else:
                formats[name] = _write_view(leaf, parts)
            tensors |= {f"{name}#{part}": np.asarray(tensor) for part, tensor in parts.items()}
        elif is_view(leaf) or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}: expected an array or a stored weight to save, got {type(leaf).__name__}")
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
            place[last] = jax.tree.map(jnp.asarray, _stored(str(path), name, formats[name], tensors))
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


def _record(packed: Packed) -> dict[str, Any]:
    """Returns what a file says of codes beside their leaves."""
    return {
        "codec": next(key for key, kind in _CODECS.items() if type(packed.codec) is kind),
        "settings": {f.name: getattr(packed.codec, f.name) for f in dataclasses.fields(cast(Any, packed.codec))},
        "group_axes": packed.axes,
        "dtype": jnp.dtype(packed.dtype).name,
    }


def _restored(recorded: dict[str, Any], prefix: str, tensors: dict[str, np.ndarray]) -> Packed:
    """Returns the codes whose leaves have names that begin with ``prefix``; takes them out of ``tensors``."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded["settings"].items()}
    codec, axes = _CODECS[recorded["codec"]](**settings), tuple(recorded["group_axes"])
    shape = Packed((tensors[f"{prefix}plane0"],), None, None, codec, axes, jnp.dtype(recorded["dtype"])).shape
    expected = jax.eval_shape(lambda: codec.encode(jnp.zeros(shape, recorded["dtype"]), axes))
    wanted = {part: (leaf.shape, leaf.dtype) for part, leaf in _parts(expected).items()}
    leaves = [tensors.pop(prefix + part) for part in wanted]
    found = {part: (leaf.shape, leaf.dtype) for part, leaf in zip(wanted, leaves)}
    if found != wanted or expected.axes != axes:
        raise ValueError(f"it holds {found}, but its format needs {wanted}")
    return jax.tree.unflatten(jax.tree.structure(expected), leaves)


def _write_view(leaf: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Adds the leaves of a view to ``tensors`` by their names; returns what the file says of it beside them."""
    kind = next(kind for kind, (view, _) in _VIEWS.items() if type(leaf) is view)
    record: dict[str, Any] = {"view": kind, "inputs": leaf.axes.inputs, "outputs": leaf.axes.outputs}
    record |= {"settings": {}, "leaves": {}}
    for field in dataclasses.fields(leaf):
        name, value = field.name, getattr(leaf, field.name)
        if name not in _VIEWS[kind][1]:
            if name != "axes":
                record["settings"][name] = jnp.dtype(value).name if name == "dense_dtype" else value
        elif isinstance(value, Packed):
            record["leaves"][name] = _record(value)
            tensors.update({f"{name}.{part}": tensor for part, tensor in _parts(value).items()})
        elif isinstance(value, tuple):
            record["leaves"][name] = len(value)
            tensors.update({f"{name}{i}": tensor for i, tensor in enumerate(value)})
        else:
            record["leaves"][name] = None
            tensors[name] = value
    return record


def _view(recorded: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """Returns the view that `_write_view` recorded; takes its leaves out of ``tensors``."""
    view, names = _VIEWS[recorded["view"]]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded["settings"].items()}
    if "dense_dtype" in settings:
        settings["dense_dtype"] = jnp.dtype(settings["dense_dtype"])
    leaves: dict[str, Any] = {}
    for name, kind in recorded["leaves"].items():
        if isinstance(kind, dict):
            leaves[name] = _restored(kind, f"{name}.", tensors)
        elif kind is None:
            leaves[name] = tensors.pop(name)
        else:
            leaves[name] = tuple(tensors.pop(f"{name}{i}") for i in range(kind))
    if set(leaves) != set(names):
        raise ValueError(f"expected leaves {names}, found {tuple(leaves)}")
    found = view(**leaves, **settings, axes=Axes(tuple(recorded["inputs"]), tuple(recorded["outputs"])))
    make_axes(found.axes.inputs, found.axes.outputs, found.ndim)
    found.check()
    dense = jax.eval_shape(found.materialize)
    if dense.shape != found.shape or not jnp.issubdtype(dense.dtype, jnp.floating):
        raise ValueError(f"its leaves give {dense.dtype} {dense.shape}, not a weight of shape {found.shape}")
    return found


def _stored(path: str, name: str, recorded: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """Returns the packed weight or other view ``name`` of a file."""
    own = {key.partition("#")[2]: tensor for key, tensor in tensors.items() if key.partition("#")[0] == name}
    try:
        if "view" in recorded:
            view = _view(recorded, own)
        else:
            packed = _restored(recorded, "", own)
            view = PackedWeight(packed, make_axes(recorded["inputs"], recorded["outputs"], packed.ndim))
        if own:
            raise ValueError(f"its format does not need {sorted(own)}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as problem:
        raise ValueError(f"{path}: {name} does not fit its recorded format {recorded}: {problem}") from None
    return view
