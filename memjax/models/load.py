"""Loads checkpoints leaf by leaf: Hugging Face folders (safetensors) and GGUF files into params.

A leaf that is stacked over layers is allocated once and filled layer by layer from memory-mapped tensors, so the host
holds little more than the result and one leaf.
"""

from __future__ import annotations

import fnmatch
import pathlib
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import codecs
from memjax.core.paths import Patterns, leaf_paths, map_with_path, select
from memjax.core.views import Axes, is_view
from memjax.models import bert, llama
from memjax.models.bitsandbytes import Nf4Tensor, is_four_bit, join_quantized
from memjax.models.gguf import GgufTensor, read_gguf
from memjax.models.layers import Source
from memjax.models.model import Config, Model, abstract
from memjax.models.packages import resolve
from memjax.models.safetensors_reader import SafeTensor, read_json, read_safetensors
from memjax.models.save import PACKED_FILE, hf_sources
from memjax.models.tokenizer import load_tokenizer
from memjax.weights import PackedWeight, astype
from memjax.weights import load as load_weights
from memjax.weights.packed import format_of

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
PACKED_KINDS = ("Q4_0", "Q4_1", "Q8_0")
Tensor = SafeTensor | GgufTensor | Nf4Tensor


class Checkpoint(NamedTuple):
    """A checkpoint whose headers are read and whose tensors are not.

    Attributes:
      config: sizes of the model.
      sources: leaf path -> where it comes from.
      tensors: tensor name -> tensor.
      ignored: patterns of tensor names that the model has no use for.
      tokenizer: the checkpoint's tokenizer, or None.
    """

    config: Config
    sources: dict[str, Source]
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]
    tokenizer: Any


def load(
    source: str | pathlib.Path,
    *,
    dtype: str = "bfloat16",
    weights: Any = "keep",
    targets: Patterns = "**/*_proj/kernel",
) -> Model:
    """Loads a pretrained model.

    Args:
      source: a Hugging Face folder, a folder that `save` wrote, a ``.gguf`` file, "smollm2" or "minilm" (packaged
        weights), or a hub name.
      dtype: "float32" or "bfloat16"; dtype of dense leaves, and the logical dtype of packed ones.
      weights: "keep" leaves the packed tensors of a GGUF file, of a folder that bitsandbytes quantized (NF4) or of a
        saved folder packed, as weight views; "dense" decodes them; a codec packs the leaves of ``targets`` while they
        are read, one layer at a time, and keeps the rest as "keep" does.
      targets: pattern or patterns of the leaves that a codec packs.

    Returns:
      The model; leaves stacked over layers have a leading layer axis.

    Raises:
      ValueError: an unknown model type, a tensor that is missing, unknown or of another shape or dtype than the
        configuration says, a damaged file, or options that do not fit.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if isinstance(weights, str) and weights not in ("keep", "dense"):
        raise ValueError(f"weights must be 'keep', 'dense' or a codec, got {weights!r}")
    path = resolve(source)
    if (path / PACKED_FILE).is_file():
        return _load_saved(path, str(source), dtype, weights, targets)
    checkpoint = _open_gguf(path) if path.suffix == ".gguf" and path.is_file() else _open_folder(path)
    shapes = abstract(checkpoint.config, dtype)
    _check(checkpoint, shapes)
    packed = set() if isinstance(weights, str) else set(select(shapes, targets))
    formats: set[str] = set()

    def read(leaf_path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        source = checkpoint.sources[leaf_path]
        stacked = "{}" in source.name
        names = [source.name.format(i) for i in range(leaf.shape[0])] if stacked else [source.name]
        tensors = [checkpoint.tensors[name] for name in names]
        if leaf_path in packed:
            kinds = {tensor.kind for tensor in tensors if not isinstance(tensor, SafeTensor)}
            formats.update(kinds - {"F32", "F16", "BF16"})
            codes = _fill(
                lambda i: _encode(weights, _dense(tensors[i], source), leaf_path, tensors[i].name),
                len(tensors),
                stacked,
            )
            return PackedWeight(codes.astype(leaf.dtype), Axes())
        if weights != "dense" and len(leaf.shape) == 2 + stacked and _keeps(leaf_path, tensors):
            axes = Axes() if source.transpose else Axes(inputs=(-1,), outputs=(-2,))
            packed_leaf = _fill(lambda i: _packed(tensors[i], source), len(tensors), stacked)
            return PackedWeight(packed_leaf.astype(leaf.dtype), axes)
        return _fill(lambda i: _dense(tensors[i], source), len(tensors), stacked, leaf.dtype)

    params = map_with_path(read, shapes)
    warn_of_second_rounding(source, formats)
    return Model(checkpoint.config, params, checkpoint.tokenizer, str(source))


def _load_saved(folder: pathlib.Path, source: str, dtype: str, weights: Any, targets: Patterns) -> Model:
    """Loads what `memjax.models.save` wrote of a model with packed weights."""
    config, tokenizer, _ = _read_folder(folder)
    params = load_weights(folder / PACKED_FILE)
    shapes = abstract(config, dtype)
    wanted, found = ({path: tuple(leaf.shape) for path, leaf in leaf_paths(tree)} for tree in (shapes, params))
    for path in {**wanted, **found}:
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"{folder / PACKED_FILE}: {path} has the shape {found.get(path)}, but config.json needs "
                f"{wanted.get(path)}"
            )
    packed = set() if isinstance(weights, str) else set(select(shapes, targets))
    formats = {format_of(leaf) for path, leaf in leaf_paths(params) if path in packed and is_view(leaf)}
    warn_of_second_rounding(source, formats, stacklevel=4)

    def hold(path: str, leaf: Any) -> Any:
        if path in packed:
            stacked = len(leaf.shape) > 2

            def encode(i: int) -> codecs.Packed:
                part = jax.tree.map(lambda x: x[i], leaf) if stacked else leaf
                dense = part.materialize() if is_view(part) else part
                return _encode(weights, dense, path)

            codes = _fill(encode, leaf.shape[0] if stacked else 1, stacked)
            return PackedWeight(codes.astype(leaf.dtype), Axes())
        return leaf.materialize() if is_view(leaf) and weights == "dense" else leaf

    return Model(config, map_with_path(hold, astype(params, dtype)), tokenizer, source)


def warn_of_second_rounding(source: str | pathlib.Path, formats: Collection[str], stacklevel: int = 3) -> None:
    """Warns that weights which a source has packed in some formats are packed anew."""
    if formats:
        warnings.warn(
            f"{source} is packed in {'; '.join(sorted(formats))} already: packing it again rounds its weights a second "
            "time",
            stacklevel=stacklevel,
        )


def _read_folder(folder: pathlib.Path) -> tuple[Config, Any, bool]:
    """Returns the configuration of a folder, its tokenizer or None, and whether bitsandbytes packed its weights."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    settings = read_json(folder / "config.json")
    four_bit = is_four_bit(settings)
    if four_bit:
        del settings["quantization_config"]
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    family = settings.get("model_type")
    if family in llama.MODEL_TYPES:
        return llama.config_from_hf(settings), tokenizer, four_bit
    if family in bert.MODEL_TYPES:
        return bert.config_from_hf(settings), tokenizer, four_bit
    supported = ", ".join(llama.MODEL_TYPES + bert.MODEL_TYPES)
    raise ValueError(f"{folder / 'config.json'} has model_type {family!r}; supported: {supported}")


def _open_folder(folder: pathlib.Path) -> Checkpoint:
    config, tokenizer, four_bit = _read_folder(folder)
    stored = read_safetensors(folder)
    tensors: dict[str, Tensor] = dict(join_quantized(stored) if four_bit else stored)
    if isinstance(config, llama.LlamaConfig):
        ignored = llama.HF_IGNORED + (llama.HF_IGNORED_WHEN_TIED if config.tie_embeddings else ())
    else:
        tensors = {bert.plain_name(name): tensor for name, tensor in tensors.items()}
        ignored = bert.HF_IGNORED
    return Checkpoint(config, hf_sources(config), tensors, ignored, tokenizer)


def _open_gguf(path: pathlib.Path) -> Checkpoint:
    gguf = read_gguf(path)
    factors = gguf.tensors["rope_freqs.weight"].decode() if "rope_freqs.weight" in gguf.tensors else None
    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    config = llama.config_from_gguf(gguf.metadata, shapes, factors)
    sources = llama.gguf_sources(config, gguf.metadata["general.architecture"])
    tokenizer = load_tokenizer(gguf) if "tokenizer.ggml.model" in gguf.metadata else None
    return Checkpoint(config, sources, dict(gguf.tensors), llama.GGUF_IGNORED, tokenizer)


def _check(checkpoint: Checkpoint, shapes: Any) -> None:
    """Raises unless the tensors are exactly those that the leaves need, in shape and dtype."""
    unknown = {
        name
        for name in checkpoint.tensors
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in checkpoint.ignored)
    }
    for path, leaf in leaf_paths(shapes):
        source = checkpoint.sources[path]
        stacked = "{}" in source.name
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if source.transpose else shape
        for i in range(leaf.shape[0] if stacked else 1):
            name = source.name.format(i)
            if name not in checkpoint.tensors:
                raise ValueError(f"the checkpoint lacks tensor {name!r} of shape {shape}, which {path} needs")
            tensor = checkpoint.tensors[name]
            unknown.discard(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"tensor {name!r}: expected shape {shape} for {path}, found {tuple(tensor.shape)}")
            if isinstance(tensor, SafeTensor) and tensor.dtype.name not in FLOAT_DTYPES:
                raise ValueError(
                    f"tensor {name!r}: expected dtype {', '.join(FLOAT_DTYPES)}, found {tensor.dtype.name}"
                )
    if unknown:
        listed = ", ".join(sorted(unknown)[:8]) + (", ..." if len(unknown) > 8 else "")
        raise ValueError(f"the checkpoint has {len(unknown)} tensors that the model does not know: {listed}")


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders axis 0 of each head from adjacent rotary pairs (2i, 2i + 1) to halves (i, i + Dh/2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dense(tensor: Tensor, source: Source) -> np.ndarray:
    """Returns the tensor in the layout of its leaf: a view of the file, or float32 decoded from it."""
    values = tensor.read() if isinstance(tensor, SafeTensor) else tensor.decode()
    if source.rotary_heads:
        values = _half_split(values, source.rotary_heads)
    return values.T if source.transpose else values


def _packed(tensor: Tensor, source: Source) -> codecs.Packed:
    """Returns the tensor in the layout of its leaf, still in the file's codes."""
    assert not isinstance(tensor, SafeTensor)  # `_keeps` said so
    if isinstance(tensor, Nf4Tensor):
        packed = tensor.packed()
    else:
        packed = codecs.from_gguf(tensor.kind, tensor.raw(), tensor.shape)
    if source.rotary_heads:
        packed = jax.tree.map(lambda leaf: _half_split(np.asarray(leaf), source.rotary_heads), packed)
    return packed.transpose((1, 0)) if source.transpose else packed


def _keeps(path: str, tensors: list[Tensor]) -> bool:
    """Returns whether a leaf of these tensors can stay packed; warns where a mix of formats forbids it."""
    kinds = {tensor.dtype.name if isinstance(tensor, SafeTensor) else tensor.kind for tensor in tensors}
    packed = {kind for kind in kinds if kind in PACKED_KINDS or kind.startswith("NF4")}
    reason = ""
    if packed and len(kinds) > 1:
        reason = f"mixes the formats {', '.join(sorted(kinds))} over its layers"
    elif any("across rows" in kind for kind in packed):
        reason = f"is stored as {', '.join(packed)}, whose blocks do not end with the rows,"
    if reason:
        warnings.warn(
            f"{path} {reason} and is decoded to a dense leaf; load with weights=<a codec> to pack it", stacklevel=2
        )
    return bool(packed) and not reason


def _encode(codec: codecs.Codec, dense: Any, path: str, tensor: str = "") -> codecs.Packed:
    """Returns one matrix, in the layout of its leaf, packed by ``codec``."""
    try:
        return codec.encode(jnp.asarray(dense, jnp.float32), (-2,))
    except ValueError as problem:
        raise ValueError(f"{path}{tensor and f' (tensor {tensor!r})'}: {problem}") from None


def _fill(part: Callable[[int], Any], count: int, stacked: bool, dtype: Any = None) -> Any:
    """Returns the tree ``part(0)``, or ``part(0) .. part(count - 1)`` stacked, as jax arrays (of ``dtype``)."""
    first = part(0)
    lead = (count,) if stacked else ()
    out = jax.tree.map(lambda leaf: np.empty((*lead, *leaf.shape), dtype or leaf.dtype), first)
    for i in range(count):
        for to, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(part(i) if i else first)):
            to[i if stacked else ...] = leaf
    return jax.tree.map(jnp.asarray, out)
