"""Adapter folders of Hugging Face PEFT, read and written: LoRA, rank-stabilised LoRA.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with one set of tensors per module and layer,
each matrix transposed; here the layers of a projection are one stacked array. Layers whose ranks differ are padded with
zeros to the largest rank: a padded column of ``a`` meets a padded row of ``b``, so both get zero gradients and stay
zero in training. Where the scales alpha / r of the layers of one projection differ, each is multiplied into its
layer's ``b`` and the scale is 1; where they agree, as in most files, ``alpha`` stays a setting.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memjax import adapters
from memjax.adapters.adapter import Theta
from memjax.adapters.stack import low_rank
from memjax.core.files import replacing
from memjax.core.paths import leaf_paths
from memjax.core.views import Axes, is_view
from memjax.models.layers import Source
from memjax.models.model import Model
from memjax.models.safetensors_reader import SafeTensor, read_json, read_safetensors
from memjax.models.save import hf_sources

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|base_layer)(?:\.weight)?"
)
# Settings that change what the tensors mean, and that memjax has no counterpart of.
_UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class _Place(NamedTuple):
    """Where a module's weight lies: the leaf, and the layer within it (None for leaves that are no stack)."""

    path: str
    layer: int | None


_Factors = dict[str, np.ndarray]
_Layers = dict[int | None, _Factors]  # layer -> factor name of the file -> array


def load_peft(
    folder: str | os.PathLike[str], model: Model, *, dtype: Any = jnp.float32
) -> tuple[adapters.Adapter, Any, Theta]:
    """Reads an adapter that peft wrote.

    Args:
      folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
      model: the model that it adapts, as `memjax.models.load` returned it.
      dtype: of the factors.

    Returns:
      (adapter, frozen, theta) as `memjax.adapters.load` returns them: attach ``theta`` to ``frozen``.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a method or a setting without a counterpart here, tensors of other modules or shapes than the model
        has; names the setting or the tensor.
    """
    folder = pathlib.Path(folder)
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            pickled = folder / "adapter_model.bin"
            hint = f"; {pickled.name} is pickled, and loading it can run any code" if pickled.is_file() else ""
            raise FileNotFoundError(f"{folder} holds no PEFT adapter: {name} is missing{hint}")
    config = read_json(folder / SETTINGS)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / SETTINGS} has peft_type {kind!r}; read are LORA")
    _check_settings(folder, config)
    leaves = dict(leaf_paths(model.params))
    modules = _modules(model)
    found: dict[str, _Layers] = {}
    for name, tensor in read_safetensors(folder / WEIGHTS).items():
        match = _TENSOR.fullmatch(name)
        place = modules.get(match["module"]) if match else None
        if match is None or place is None:
            raise ValueError(f"{folder / WEIGHTS} has the tensor {name!r}, which fits no weight of the model")
        if match["factor"] == "base_layer":
            _check_base(tensor, leaves[place.path], place)
            continue
        found.setdefault(place.path, {}).setdefault(place.layer, {})[match["factor"]] = tensor.read()
    if not found:
        raise ValueError(f"{folder / WEIGHTS} has no tensors of an adapter")
    names = {place: module for module, place in reversed(modules.items())}
    return _read_lora(config, found, leaves, names, model.params, dtype)


def save_peft(
    folder: str | os.PathLike[str],
    model: Model,
    adapter: adapters.Adapter,
    theta: Theta,
    frozen: Any = None,
) -> None:
    """Writes an adapter such that peft loads it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Every method whose adapted weight is the frozen weight plus a low-rank product is written as LoRA.

    Args:
      folder: made if missing; each file is replaced atomically.
      model: the model that the adapter was trained for.
      adapter: its method and settings.
      theta: trained factors.
      frozen: the tree of `memjax.adapters.Adapter.prepare`; None means the model's params.

    Raises:
      ValueError: an adapter that peft has no counterpart of; names the leaf.
    """
    from safetensors.numpy import save_file

    attached = dict(leaf_paths(adapter.attach(model.params if frozen is None else frozen, theta)))
    before = dict(leaf_paths(model.params))
    sources = hf_sources(model.config)
    ranks, alphas, tensors = {}, {}, {}
    rslora = getattr(adapter, "scaling", None) == "rslora"
    for path in theta:
        delta = low_rank(path, attached[path], before[path], adapter.method)
        ranks[path] = delta.a.shape[-1]
        alphas[path] = delta.scale * (math.sqrt(ranks[path]) if rslora else ranks[path])
        a, b = np.asarray(delta.a, np.float32), np.asarray(delta.b, np.float32)
        swapped = is_view(before[path]) and before[path].axes == Axes((-1,), (-2,))
        for module, i in _named(sources[path], before[path]):
            down, up = (a, b) if i is None else (a[i], b[i])
            if swapped:
                down, up = up.T, down.T
            embedding = not sources[path].transpose
            for name, value in (("A", down.T), ("B", up.T)):
                key = f"lora_embedding_{name}" if embedding else f"lora_{name}.weight"
                tensors[f"{_PREFIX}{module}.{key}"] = np.ascontiguousarray(value)
    names = _short_names(theta, sources, before)
    rank, rank_pattern = _with_exceptions(ranks, names)
    alpha, alpha_pattern = _with_exceptions({p: int(a) if a == int(a) else a for p, a in alphas.items()}, names)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.kind == "causal" else "FEATURE_EXTRACTION",
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": getattr(adapter, "dropout", 0.0),
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted({name for path in theta for name in names[path]}),
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with replacing(folder / SETTINGS) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n")


def _named(source: Source, leaf: Any) -> list[tuple[str, int | None]]:
    """Returns (module name, layer) of a leaf's modules."""
    name = source.name.removesuffix(".weight")
    return [(name.format(i), i) for i in range(leaf.shape[0])] if "{}" in name else [(name, None)]


def _modules(model: Model) -> dict[str, _Place]:
    """Returns module name -> place, also under the names of models without a head or with one."""
    leaves = dict(leaf_paths(model.params))
    modules: dict[str, _Place] = {}
    for path, source in hf_sources(model.config).items():
        if path.rpartition("/")[2] in ("kernel", "embedding"):
            modules |= {name: _Place(path, layer) for name, layer in _named(source, leaves[path])}
    if model.kind == "causal":
        others = {name.removeprefix("model."): place for name, place in modules.items()}
    else:
        others = {f"{head}.{name}": place for name, place in modules.items() for head in ("bert", "roberta")}
    return modules | {name: place for name, place in others.items() if name not in modules}


def _check_settings(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{folder / SETTINGS} has {name} = {config[name]!r}, which memjax does not read")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder / SETTINGS} has bias = {config['bias']!r}; only adapters without biases are read")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{folder / SETTINGS} has init_lora_weights = {init!r}: its factors belong to a changed base model; save "
            "it in peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def _check_base(tensor: SafeTensor, leaf: Any, place: _Place) -> None:
    """Raises unless a frozen weight that came with the adapter, as embeddings do, has the shape of the model's."""
    shape = leaf.shape if place.layer is None else leaf.shape[1:]
    if tensor.shape not in (shape, shape[::-1]):
        raise ValueError(
            f"tensor {tensor.name!r}: the adapter comes with a weight of shape {tensor.shape}, but the model's has "
            f"{tuple(shape)}: it was trained for a model of another size"
        )


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name, by peft's rule."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _matrices(found: _Factors, leaf: Any, place: _Place, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a layer's ``a [in, r]`` and ``b [r, out]`` in the axis order of the leaf's view."""
    shape = leaf.shape if place.layer is None else leaf.shape[1:]
    embedding = place.path.endswith("embedding")
    wanted = {"lora_embedding_A", "lora_embedding_B"} if embedding else {"lora_A", "lora_B"}
    if not wanted <= set(found):
        raise ValueError(f"the adapter of {name} lacks the tensors {sorted(wanted - set(found))}")
    first, second = (found[key] for key in sorted(wanted))
    if first.shape != (second.shape[-1], shape[0]) or second.shape != (shape[1], first.shape[0]):
        raise ValueError(
            f"the adapter of {name}: expected tensors of shapes (r, {shape[0]}) and ({shape[1]}, r), found "
            f"{first.shape} and {second.shape}"
        )
    swapped = is_view(leaf) and leaf.axes == Axes((-1,), (-2,))
    return (second, first) if swapped else (first.T, second.T)


def _read_lora(
    config: Mapping[str, Any],
    found: dict[str, _Layers],
    leaves: dict[str, Any],
    names: dict[_Place, str],
    params: Any,
    dtype: Any,
) -> tuple[adapters.Adapter, Any, Theta]:
    rslora = bool(config.get("use_rslora"))
    theta: Theta = {}
    ranks, alphas = {}, {}
    for path, layers in found.items():
        parts, scales = {}, {}
        for layer, factors in layers.items():
            place = _Place(path, layer)
            parts[layer] = _matrices(factors, leaves[path], place, names[place])
            r = parts[layer][0].shape[1]
            alpha = _pattern_value(config.get("alpha_pattern") or {}, names[place], config.get("lora_alpha", 8))
            scales[layer] = alpha / (math.sqrt(r) if rslora else r)
        rank = max(a.shape[1] for a, _ in parts.values())
        same = len(set(scales.values())) == 1
        scale = next(iter(scales.values())) if same else 1.0
        ranks[path], alphas[path] = rank, scale * (math.sqrt(rank) if rslora else rank)
        stack = [None] if None in layers else list(range(leaves[path].shape[0]))
        filled = {
            layer: (_padded(a, 1, rank), _padded(b, 0, rank) * (1.0 if same else scales[layer]))
            for layer, (a, b) in parts.items()
        }
        zeros = tuple(np.zeros_like(part) for part in next(iter(filled.values())))
        a, b = (np.stack([filled.get(layer, zeros)[k] for layer in stack]) for k in (0, 1))
        if None in layers:
            a, b = a[0], b[0]
        theta[path] = {"a": jnp.asarray(a, dtype), "b": jnp.asarray(b, dtype)}
    adapter = adapters.lora(
        _one_or_table(ranks),
        _one_or_table(alphas),
        targets=list(theta),
        dropout=float(config.get("lora_dropout") or 0.0),
        scaling="rslora" if rslora else "alpha_over_r",
        dtype=dtype,
    )
    return adapter, params, theta


def _padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return np.pad(np.asarray(x, np.float32), widths)


def _one_or_table(values: dict[str, Any]) -> Any:
    """Returns the value that all paths share, or the table."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def _short_names(theta: Theta, sources: Mapping[str, Source], leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns path -> the shortest endings of module names that name its modules and no others."""
    modules = {
        path: [name for name, _ in _named(source, leaves[path])]
        for path, source in sources.items()
        if path.rpartition("/")[2] in ("kernel", "embedding")
    }
    short = {}
    for path in theta:
        others = [f".{name}" for other, names in modules.items() if other != path for name in names]
        for length in range(1, 1 + max(name.count(".") + 1 for name in modules[path])):
            endings = {".".join(name.split(".")[-length:]) for name in modules[path]}
            if not any(other.endswith(f".{ending}") for other in others for ending in endings):
                break
        short[path] = sorted(endings)
    return short


def _with_exceptions(values: dict[str, Any], names: dict[str, list[str]]) -> tuple[Any, dict[str, Any]]:
    """Returns the most common value, and module ending -> value where it is another."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for path, value in values.items() if value != common for name in names[path]}
