"""Adapter folders of Hugging Face PEFT, read and written: LoRA, rank-stabilised LoRA, DoRA, VeRA and (IA)^3.

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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import adapters
from memjax.adapters.adapter import Theta
from memjax.adapters.stack import low_rank
from memjax.core.files import replacing
from memjax.core.paths import leaf_paths
from memjax.core.views import Axes, WeightView, is_view
from memjax.models.layers import Source
from memjax.models.model import Model
from memjax.models.safetensors_reader import SafeTensor, read_json, read_safetensors
from memjax.models.save import hf_sources
from memjax.weights import Anchored

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|vera_lambda_b|vera_lambda_d|"
    r"ia3_l|base_layer)(?:\.weight)?"
)
_SHARED = re.compile(r"(?:base_model\.)?(?:model\.)?(?P<factor>vera_A|vera_B)")
# Settings that change what the tensors mean, and that memjax has no counterpart of.
_UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
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
_Loaded = tuple[adapters.Adapter, Any, Theta]


class _Folder(NamedTuple):
    """What a folder holds, sorted by the leaves of the model that it adapts.

    Attributes:
      config: the settings.
      found: leaf path -> layer -> factors.
      shared: factors of the whole adapter.
      leaves: leaf path -> frozen weight.
      names: place -> module name.
      params: the model's params.
      dtype: of the factors to return.
    """

    config: Mapping[str, Any]
    found: dict[str, _Layers]
    shared: _Factors
    leaves: dict[str, Any]
    names: dict[_Place, str]
    params: Any
    dtype: Any

    def stack(self, path: str, parts: Mapping[int | None, Any], missing: Any) -> Any:
        """Returns the layers' arrays as one, with ``missing`` (an array per layer, or one) where a layer has none."""
        if None in parts:
            return jnp.asarray(parts[None], self.dtype)
        missing = np.broadcast_to(missing, (self.leaves[path].shape[0], *next(iter(parts.values())).shape))
        layers = [parts.get(layer, missing[layer]) for layer in range(len(missing))]
        return jnp.asarray(np.stack(layers), self.dtype)

    def shape(self, path: str) -> tuple[int, int]:
        """Returns (inputs, outputs) of the modules of a leaf, which must be linear."""
        if path.endswith("embedding"):
            raise ValueError(f"{path}: only LoRA is read of embeddings")
        rows, columns = self.leaves[path].shape[-2:]
        return rows, columns

    def vectors(self, path: str, factor: str, size: int) -> dict[int | None, np.ndarray]:
        """Returns layer -> ``[size]`` of the factor ``factor``."""
        parts = {}
        for layer, factors in self.found[path].items():
            name = self.names[_Place(path, layer)]
            if factor not in factors or factors[factor].size != size:
                found = {key: value.shape for key, value in factors.items()}
                raise ValueError(f"the adapter of {name}: expected {factor} of {size} numbers, found {found}")
            parts[layer] = np.asarray(factors[factor], np.float32).reshape(size)
        return parts


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
    if kind not in _READERS:
        raise ValueError(f"{folder / SETTINGS} has peft_type {kind!r}; read are {', '.join(_READERS)}")
    _check_settings(folder, config)
    leaves = dict(leaf_paths(model.params))
    modules = _modules(model)
    found: dict[str, _Layers] = {}
    shared: _Factors = {}
    for name, tensor in read_safetensors(folder / WEIGHTS).items():
        if match := _SHARED.fullmatch(name):
            shared[match["factor"]] = tensor.read()
            continue
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
    return _READERS[kind](_Folder(config, found, shared, leaves, names, model.params, dtype))


def save_peft(
    folder: str | os.PathLike[str],
    model: Model,
    adapter: adapters.Adapter,
    theta: Theta,
    frozen: Any = None,
) -> None:
    """Writes an adapter such that peft loads it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    DoRA, VeRA and (IA)^3 are written as such, and every other method whose adapted weight is the frozen weight plus a
    low-rank product as LoRA; PiSSA and OLoRA as the LoRA of twice the rank that changes the original weights alike.

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

    frozen = model.params if frozen is None else frozen
    if isinstance(adapter, adapters.Pissa | adapters.Olora):
        adapter, theta = adapter.as_lora(frozen, theta)
        frozen = model.params
    target = _Target(model, dict(leaf_paths(model.params)), hf_sources(model.config))
    write = {"vera": _vera_tensors, "ia3": _ia3_tensors}.get(adapter.method, _lora_tensors)
    names = target.short_names(theta)
    method_settings, tensors = write(target, adapter, frozen, theta, names)
    settings = {
        "task_type": "CAUSAL_LM" if model.kind == "causal" else "FEATURE_EXTRACTION",
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": _all_names(theta, names),
        **method_settings,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    with replacing(folder / SETTINGS) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n")


class _Target(NamedTuple):
    """The model that an adapter is written for.

    Attributes:
      model: the model.
      leaves: leaf path -> frozen weight.
      sources: leaf path -> tensor of a Hugging Face checkpoint.
    """

    model: Model
    leaves: dict[str, Any]
    sources: dict[str, Source]

    def split(self, path: str, stacked: Any) -> list[tuple[str, np.ndarray]]:
        """Returns (prefix of the tensors of a module, its part of an array that is stacked over layers)."""
        values = np.asarray(stacked)
        return [
            (f"{_PREFIX}{module}", values if i is None else values[i])
            for module, i in _named(self.sources[path], self.leaves[path])
        ]

    def short_names(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """Returns path -> the shortest endings of module names that name its modules and no others."""
        modules = {
            path: [name for name, _ in _named(source, self.leaves[path])]
            for path, source in self.sources.items()
            if path.rpartition("/")[2] in ("kernel", "embedding")
        }
        short = {}
        for path in paths:
            if path not in modules:
                raise ValueError(f"{path}: peft adapts the weights of linear modules and embeddings only")
            others = [f".{name}" for other, names in modules.items() if other != path for name in names]
            for length in range(1, 1 + max(name.count(".") + 1 for name in modules[path])):
                endings = {".".join(name.split(".")[-length:]) for name in modules[path]}
                if not any(other.endswith(f".{ending}") for other in others for ending in endings):
                    break
            short[path] = sorted(endings)
        return short


_Written = tuple[dict[str, Any], dict[str, np.ndarray]]  # settings, tensors
_Names = dict[str, list[str]]


def _lora_tensors(target: _Target, adapter: adapters.Adapter, frozen: Any, theta: Theta, names: _Names) -> _Written:
    rslora = getattr(adapter, "scaling", None) == "rslora"
    if isinstance(adapter, adapters.Dora):
        before = dict(leaf_paths(frozen))
        attached = {path: _direction(path, before[path], adapter, factors) for path, factors in theta.items()}
    else:
        attached = dict(leaf_paths(adapter.attach(frozen, theta)))
    ranks, alphas, tensors = {}, {}, {}
    for path in theta:
        leaf = target.leaves[path]
        delta = low_rank(path, attached[path], leaf, adapter.method)
        ranks[path] = delta.a.shape[-1]
        alphas[path] = delta.scale * (math.sqrt(ranks[path]) if rslora else ranks[path])
        embedding = not target.sources[path].transpose
        names_of_file = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        swapped = is_view(leaf) and leaf.axes == Axes((-1,), (-2,))
        for (prefix, a), (_, b) in zip(target.split(path, delta.a), target.split(path, delta.b)):
            for name, value in zip(names_of_file, (b, a) if swapped else (a.T, b.T)):
                tensors[f"{prefix}.{name}"] = value
        if "m" in theta[path]:
            for prefix, m in target.split(path, theta[path]["m"]):
                tensors[f"{prefix}.lora_magnitude_vector"] = m
    rank, rank_pattern = _with_exceptions(ranks, names)
    alpha, alpha_pattern = _with_exceptions({p: int(a) if a == int(a) else a for p, a in alphas.items()}, names)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": getattr(adapter, "dropout", 0.0),
        "use_rslora": rslora,
        "use_dora": isinstance(adapter, adapters.Dora),
        "bias": "none",
        "init_lora_weights": True,
    }
    return settings, tensors


def _direction(path: str, anchored: Any, adapter: adapters.Dora, factors: Mapping[str, Any]) -> WeightView:
    """Returns what a DoRA's weight is before its columns are scaled, and no column norms computed."""
    if not isinstance(anchored, Anchored):
        raise ValueError(f"{path}: not prepared for dora; give save_peft the frozen tree that prepare returned")
    return adapters.Lora.view(adapter, path, anchored.base, {"a": factors["a"], "b": factors["b"]}, {}, None)


def _vera_tensors(target: _Target, adapter: Any, frozen: Any, theta: Theta, names: _Names) -> _Written:
    tensors = {}
    for path, factors in theta.items():
        for factor in ("d", "b"):
            for prefix, vector in target.split(path, factors[factor]):
                tensors[f"{prefix}.vera_lambda_{factor}"] = vector
    d_in, d_out = (max(target.leaves[path].shape[axis] for path in theta) for axis in (-2, -1))
    shared = dict(leaf_paths(adapter.attach(frozen, theta)))[next(iter(theta))].deltas[-1].shared
    tensors["base_model.vera_A"] = np.asarray(shared.draw_a(d_in)).T
    tensors["base_model.vera_B"] = np.asarray(shared.draw_b(d_out)).T
    settings = {
        "peft_type": "VERA",
        "r": adapter.rank,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": adapter.dropout,
        "d_initial": adapter.d_initial,
        "bias": "none",
    }
    return settings, tensors


def _ia3_tensors(target: _Target, adapter: Any, frozen: Any, theta: Theta, names: _Names) -> _Written:
    tensors = {}
    for path, factors in theta.items():
        ((kind, vectors),) = factors.items()
        for prefix, vector in target.split(path, vectors):
            tensors[f"{prefix}.ia3_l"] = vector.reshape(1, -1) if kind == "row" else vector.reshape(-1, 1)
    rows = [path for path, factors in theta.items() if "row" in factors]
    return {"peft_type": "IA3", "feedforward_modules": _all_names(rows, names)}, tensors


def _all_names(paths: Iterable[str], names: _Names) -> list[str]:
    return sorted({name for path in paths for name in names[path]})


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


def _read_lora(folder: _Folder) -> _Loaded:
    config, found, leaves, names = folder.config, folder.found, folder.leaves, folder.names
    rslora, decomposed = bool(config.get("use_rslora")), bool(config.get("use_dora"))
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
        a = {layer: _padded(a, 1, rank) for layer, (a, _) in parts.items()}
        b = {layer: _padded(b, 0, rank) * (1.0 if same else scales[layer]) for layer, (_, b) in parts.items()}
        theta[path] = {"a": folder.stack(path, a, 0.0), "b": folder.stack(path, b, 0.0)}
    settings = {
        "rank": _one_or_table(ranks),
        "alpha": _one_or_table(alphas),
        "targets": list(theta),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "scaling": "rslora" if rslora else "alpha_over_r",
        "dtype": folder.dtype,
    }
    if not decomposed:
        return adapters.lora(**settings), folder.params, theta
    adapter = adapters.dora(**settings)
    frozen, start = adapter.prepare(jax.random.key(0), folder.params)
    for path in theta:
        magnitudes = folder.vectors(path, "lora_magnitude_vector", folder.shape(path)[1])
        theta[path]["m"] = folder.stack(path, magnitudes, start[path]["m"]).astype(start[path]["m"].dtype)
    return adapter, frozen, theta


def _read_vera(folder: _Folder) -> _Loaded:
    config, shapes = folder.config, {path: folder.shape(path) for path in folder.found}
    rank = int(config["r"])
    a, b = folder.shared.get("vera_A"), folder.shared.get("vera_B")
    if a is None or b is None:
        d_in, d_out = (max(sizes) for sizes in zip(*shapes.values()))
        a, b = vera_projections(int(config.get("projection_prng_key") or 0), rank, d_in, d_out)
    a, b = np.asarray(a, np.float32).T, np.asarray(b, np.float32).T
    adapter = adapters.vera(
        rank,
        targets=list(folder.found),
        shared=(a, b),
        d_initial=float(config.get("d_initial", 0.1)),
        dropout=float(config.get("vera_dropout") or 0.0),
        dtype=folder.dtype,
    )
    theta = {
        path: {
            "d": folder.stack(path, folder.vectors(path, "vera_lambda_d", rank), adapter.d_initial),
            "b": folder.stack(path, folder.vectors(path, "vera_lambda_b", shapes[path][1]), 0.0),
        }
        for path in folder.found
    }
    return adapter, folder.params, theta


def vera_projections(key: int, rank: int, d_in: int, d_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the matrices of VeRA that peft draws from ``projection_prng_key`` where a file does not hold them.

    They are uniform within sqrt(6 / columns), from the low 24 bits of the numbers of a Mersenne twister.

    Args:
      key: the setting of the file.
      rank: r.
      d_in, d_out: the most inputs, and the most outputs, of the adapted modules.

    Returns:
      float32 A ``[r, d_in]`` and B ``[d_out, r]``.
    """
    twister = np.random.RandomState(key % 2**32)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        bits = twister.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return bits.astype(np.float32) * np.float32(2**-24) * np.float32(2 * bound) - np.float32(bound)

    return draw((rank, d_in)), draw((d_out, rank))


def _read_ia3(folder: _Folder) -> _Loaded:
    theta: Theta = {}
    rows = []
    for path, layers in folder.found.items():
        d_in, d_out = folder.shape(path)
        shapes = {tuple(factors["ia3_l"].shape) for factors in layers.values() if "ia3_l" in factors}
        forward = shapes == {(1, d_in)}
        if not forward and shapes != {(d_out, 1)}:
            raise ValueError(
                f"{path}: expected ia3_l of shape (1, {d_in}) or ({d_out}, 1) in all layers, found {shapes}"
            )
        vectors = folder.vectors(path, "ia3_l", d_in if forward else d_out)
        theta[path] = {"row" if forward else "column": folder.stack(path, vectors, 1.0)}
        rows += [path] * forward
    return adapters.ia3(targets=list(theta), feedforward=rows, dtype=folder.dtype), folder.params, theta


_READERS: dict[str, Callable[[_Folder], _Loaded]] = {"LORA": _read_lora, "VERA": _read_vera, "IA3": _read_ia3}


def _padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return np.pad(np.asarray(x, np.float32), widths)


def _one_or_table(values: dict[str, Any]) -> Any:
    """Returns the value that all paths share, or the table."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def _with_exceptions(values: dict[str, Any], names: dict[str, list[str]]) -> tuple[Any, dict[str, Any]]:
    """Returns the most common value, and module ending -> value where it is another."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for path, value in values.items() if value != common for name in names[path]}
