"""From a model to a folder: with its weights quantized, or with an adapter merged into them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import adapters, codecs, models
from memjax.adapters.adapter import stored_like
from memjax.core.bytes import nbytes
from memjax.core.files import replacing
from memjax.core.paths import leaf_paths, map_with_path, select
from memjax.core.views import Axes, is_view
from memjax.models.gguf import read_gguf
from memjax.models.load import warn_of_second_rounding
from memjax.models.packages import resolve
from memjax.models.peft import SETTINGS
from memjax.models.safetensors_reader import read_safetensors
from memjax.models.save import PACKED_FILE
from memjax.recipes.formats import codec_of, group_of
from memjax.weights import LeafReport, PackedWeight, Report
from memjax.weights.packed import format_of

MergedDtype = Literal["bfloat16", "float32"]
_WORST = 12
_ALSO_COPIED = ("special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def load_adapter(model: models.Model, folder: str | Path) -> tuple[adapters.Adapter, Any, Any]:
    """Loads an adapter for a model.

    Args:
      model: the model that it was trained for.
      folder: an adapter's folder as memjax or peft writes it, or the folder of the run that trained it.

    Returns:
      (adapter, frozen, theta).

    Raises:
      FileNotFoundError: no adapter there.
      ValueError: an adapter of another model, or of a kind that is not read.
    """
    inside = Path(folder) / "adapter"
    folder = inside if inside.is_dir() else Path(folder)
    if (folder / SETTINGS).is_file():
        return models.load_peft(folder, model)
    return adapters.load(folder, model.params)


def quantize_model(
    source: str,
    out: str | Path,
    *,
    format: str,
    group: int | None = None,
    search: bool = False,
    where: Any = "**/*_proj/kernel",
    dtype: str,
) -> Report:
    """Writes a model with packed weights as a folder that `memjax.models.load` and every command read.

    Weights that ``where`` does not select stay as the source has them. One matrix is dense at a time.

    Args:
      source: what `memjax.models.load` takes.
      out: the folder.
      format: see `memjax.recipes.formats`.
      group, search: see `memjax.recipes.formats.codec_of`.
      where: pattern(s) of the leaves that are packed; an embedding is packed along its features.
      dtype: "float32" or "bfloat16", of the weights that stay dense.

    Returns:
      Bits and errors per packed leaf, and the bytes of all leaves dense in ``dtype``, as written and, where the source
      was packed already, as stored there.

    Raises:
      ValueError: patterns that match nothing, groups that do not divide a leaf, an unknown model.
    """
    check_writable(out)
    codec = codec_of(format, group, search)
    model = models.load(source, dtype=dtype)
    chosen = set(select(model.params, where))
    views = {path: leaf for path, leaf in leaf_paths(model.params) if is_view(leaf)}
    warn_of_second_rounding(source, {format_of(leaf) for path, leaf in views.items() if path in chosen})
    rows: list[LeafReport] = []

    def pack(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        packed, row = _pack(path, leaf, codec)
        rows.append(row)
        return packed

    params = map_with_path(pack, model.params)
    dense_bytes = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for _, leaf in leaf_paths(model.params))
    rows.sort(key=lambda row: -row.relative_frobenius)
    _write(source, out, dataclasses.replace(model, params=params))
    return Report(rows, dense_bytes, nbytes(params), nbytes(model.params) if views else None)


def _pack(path: str, leaf: Any, codec: codecs.Codec) -> tuple[PackedWeight, LeafReport]:
    """Packs a leaf, one matrix of a stack at a time."""
    axes = Axes((-1,), (-2,)) if path.endswith("embedding") else Axes()
    stacked = leaf.ndim > axes.ndim
    parts, errors = [], []
    for i in range(leaf.shape[0]) if stacked else [None]:
        part = leaf if i is None else jax.tree.map(lambda x, i=i: x[i], leaf)
        wide = part.astype(jnp.float32)
        dense = wide.materialize() if is_view(part) else wide
        try:
            parts.append(codec.encode(dense, axes.inputs).astype(leaf.dtype))
        except (ValueError, TypeError) as problem:
            raise type(problem)(f"{path}: {problem}") from None
        errors.append((*codecs.error(dense, parts[-1]), jnp.linalg.norm(dense)))
    packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if stacked else parts[0]
    max_abs, relative, norms = (np.asarray(column, np.float64) for column in zip(*jax.device_get(errors)))
    total = math.sqrt(float(np.sum(norms**2)))
    relative_all = math.sqrt(float(np.sum((relative * norms) ** 2))) / total if total else 0.0
    view = PackedWeight(packed, axes)
    bits = packed.bits_per_element
    return view, LeafReport(path, tuple(leaf.shape), view.nbytes, bits, float(max_abs.max()), relative_all)


class Merged(NamedTuple):
    """What merging an adapter lost per weight, worst first; prints as a table."""

    method: str
    leaves: list[tuple[str, adapters.MergeError]]

    def __str__(self) -> str:
        if not self.leaves:
            return f"{self.method} merged into vectors; nothing was lost but the rounding to their dtype"
        width = max(len(path) for path, _ in self.leaves)
        lines = [f"{self.method} merged into {len(self.leaves)} weights; what storing them lost:"]
        lines += [f"{'weight':<{width}}  {'max abs':>9}  {'rel. err':>9}"]
        lines += [
            f"{path:<{width}}  {e.max_abs:>9.3g}  {e.relative_frobenius:>9.3g}" for path, e in self.leaves[:_WORST]
        ]
        return "\n".join(lines + _and_more(len(self.leaves)))


def merge_model(
    source: str,
    adapter: str | Path,
    out: str | Path,
    *,
    format: str = "dense",
    group: int | None = None,
    dtype: MergedDtype = "bfloat16",
) -> Merged:
    """Writes a model with an adapter merged into its weights.

    Args:
      source: what `memjax.models.load` takes.
      adapter: see `load_adapter`.
      out: the folder: with ``format="dense"`` one that transformers loads, else one that memjax loads.
      format: "dense"; "keep", each weight as the source has it; or how the merged weights are packed.
      group: weights per scale, see `memjax.recipes.formats.group_of`.
      dtype: of dense weights.

    Raises:
      ValueError: an adapter of another model, merged weights that are not finite, groups that do not divide.
    """
    check_writable(out)
    group = group_of(format, group)
    model = models.load(source, dtype=_lossless_dtype(source))
    method, frozen, theta = load_adapter(model, adapter)
    to = {"dense": "dense", "keep": "same"}.get(format) or codec_of(format, group)
    before = dict(leaf_paths(frozen))
    report: dict[str, adapters.MergeError] = {}

    def store(path: str, leaf: Any) -> Any:
        narrow = leaf.astype(dtype)
        if not is_view(leaf):
            return narrow
        if leaf is not before[path]:
            try:
                exact = leaf.astype(jnp.float32).materialize()
            except ValueError as problem:
                raise ValueError(f"{path}: {problem}") from None
            stored, report[path] = stored_like(path, exact, narrow, to)
            return stored
        return narrow.materialize() if format == "dense" else narrow

    params = map_with_path(store, method.attach(frozen, theta))
    _write(source, out, dataclasses.replace(model, params=params))
    return Merged(method.method, sorted(report.items(), key=lambda row: -row[1].relative_frobenius))


def _lossless_dtype(source: str) -> str:
    """Returns the narrower dtype in which the weights of a source load without loss."""
    path = resolve(source)
    plain = (path / "config.json").is_file() and not (path / PACKED_FILE).is_file()
    kinds = {tensor.dtype.name for tensor in read_safetensors(path).values()} if plain else set()
    return "bfloat16" if kinds == {"bfloat16"} else "float32"


def worst(report: Report, count: int = _WORST) -> str:
    """Returns a report's table with no more than the worst leaves."""
    return "\n".join([str(report._replace(leaves=report.leaves[:count])), *_and_more(len(report.leaves), count)])


def _and_more(leaves: int, count: int = _WORST) -> list[str]:
    return [f"and {leaves - count} more with smaller errors"] if leaves > count else []


def check_writable(out: str | Path) -> None:
    """Raises ValueError if ``out`` is there and not empty, before work is done in vain."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give the name of a new folder")


def _write(source: str, out: str | Path, model: models.Model) -> None:
    """Saves the model, with what else the source says about its tokenizer."""
    models.save(out, model)
    path = resolve(source)
    if path.is_dir():
        for name in _ALSO_COPIED:
            if (path / name).is_file():
                shutil.copyfile(path / name, Path(out) / name)
    elif template := read_gguf(path).metadata.get("tokenizer.chat_template"):
        file = Path(out) / "tokenizer_config.json"
        with contextlib.suppress(FileNotFoundError), replacing(file) as temporary:
            settings = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": template}
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
