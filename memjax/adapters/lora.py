"""LoRA: a trained low-rank delta on frozen weights.

y = x W + s (dropout(x) A) B with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
Sources: LoRA: Low-Rank Adaptation of Large Language Models, 2021; A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA, 2023.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs import Codec, error
from memjax.core.files import replacing
from memjax.core.paths import expand_braces, leaf_paths, lookup, map_with_path, select
from memjax.core.views import Axes, WeightView, is_view
from memjax.weights import Adapted, Dense, LowRank, PackedWeight, axes_of

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Theta = dict[str, dict[str, jax.Array]]
FORMAT = "memjax-lora-1"


class MergeError(NamedTuple):
    """What storing one merged weight lost against the exact float32 sum."""

    max_abs: float
    relative_frobenius: float


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter: settings and the functions that use them. `lora` makes one and describes the fields."""

    rank: int | Mapping[str, int]
    alpha: float | Mapping[str, float] | None
    targets: str | Sequence[str]
    dropout: float
    initializer: str | Initializer
    scaling: str
    axes: Mapping[str, Any]
    dtype: Any

    def init(self, key: jax.Array, params: Any) -> Theta:
        """Returns the trained factors, such that the adapted weights equal the frozen ones.

        Args:
          key: random key.
          params: the frozen tree, dense arrays or views.

        Returns:
          Logical path -> ``{"a": [*batch, *inputs, r], "b": [*batch, r, *outputs]}`` in the adapter's dtype. ``b``
          is zero; for embeddings (leaves named ``embedding``), ``a`` is zero and ``b`` normal.

        Raises:
          ValueError: a pattern that matches nothing, a leaf of fewer than two axes, a rank above the matrix's.
        """
        theta: Theta = {}
        leaves = dict(leaf_paths(params))
        for path in self._targets(params):
            leaf = leaves[path]
            axes = self._axes(path, leaf)
            batch = tuple(leaf.shape[: leaf.ndim - axes.ndim])
            inputs = tuple(leaf.shape[axis] for axis in axes.inputs)
            outputs = tuple(leaf.shape[axis] for axis in axes.outputs)
            rank = self._rank(path)
            if rank > min(math.prod(inputs), math.prod(outputs)):
                raise ValueError(
                    f"{path}: rank {rank} is larger than the matrix, which is {math.prod(inputs)} x "
                    f"{math.prod(outputs)}"
                )
            a_shape, b_shape = (*batch, *inputs, rank), (*batch, rank, *outputs)
            leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            if path.rpartition("/")[2] == "embedding":
                a, b = jnp.zeros(a_shape, self.dtype), jax.random.normal(leaf_key, b_shape, self.dtype)
            else:
                a, b = self._init_a(leaf_key, a_shape, math.prod(inputs)), jnp.zeros(b_shape, self.dtype)
            theta[path] = {"a": a, "b": b}
        return theta

    def attach(self, params: Any, theta: Theta, key: jax.Array | None = None) -> Any:
        """Returns ``params`` with an adapted view at every path of ``theta``; nothing is copied.

        Args:
          params: the frozen tree; deltas that other adapters attached to it stay.
          theta: trained factors of `init`.
          key: random key for dropout; None (as in evaluation) drops nothing. Under shard_map or pmap fold the
            device's index into it, or every shard drops alike.

        Raises:
          ValueError: a path that ``params`` does not have, or factors that do not fit the leaf.
        """
        missing = set(theta) - {path for path, _ in leaf_paths(params)}
        if missing:
            raise ValueError(f"the adapter has factors for {sorted(missing)}, which are no leaves of the params")

        def adapt(path: str, leaf: Any) -> Any:
            if path not in theta:
                return leaf
            a, b = theta[path]["a"], theta[path]["b"]
            base, others = (leaf.base, leaf.deltas) if isinstance(leaf, Adapted) else (leaf, ())
            if not is_view(base):
                base = Dense(leaf, self._axes(path, leaf))
            check_factors(path, base, a, b)
            words = None
            if key is not None and self.dropout:
                leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                words = jax.random.bits(leaf_key, (*base.shape[: base.batch_ndim], 2), jnp.uint32)
            return Adapted(base, (*others, LowRank(a, b, self.scale(path, a.shape[-1]), self.dropout, words)))

        return map_with_path(adapt, params)

    def merge(self, params: Any, theta: Theta, to: str | Codec = "same") -> tuple[Any, dict[str, MergeError]]:
        """Adds the delta into the weights, one leaf at a time.

        Args:
          params: the frozen tree; deltas that are attached to the same leaves are added too.
          theta: trained factors.
          to: ``"same"`` keeps each leaf's format (packed weights are encoded again), ``"dense"`` makes dense arrays,
            a codec encodes every merged leaf.

        Returns:
          (merged tree, path -> `MergeError` against the exact float32 sum).

        Raises:
          ValueError: an unknown ``to``, or a merged weight that is not finite.
        """
        if not isinstance(to, Codec) and to not in ("same", "dense"):
            raise ValueError(f"expected to='same', to='dense' or a codec, got {to!r}")
        report: dict[str, MergeError] = {}

        def fold(path: str, leaf: Any) -> Any:
            if not (isinstance(leaf, Adapted) and path in theta):
                return leaf
            exact = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).materialize()
            if not bool(jnp.isfinite(exact).all()):
                raise ValueError(f"{path}: the merged weight is not finite")
            codec, group_axes = to, leaf.axes.inputs
            if to == "same" and isinstance(leaf.base, PackedWeight):
                codec, group_axes = leaf.base.packed.codec, leaf.base.packed.axes
            if isinstance(codec, Codec):
                packed = codec.encode(exact, group_axes).astype(leaf.dtype)
                report[path] = MergeError(*map(float, error(exact, packed)))
                return PackedWeight(packed, leaf.axes)
            merged = exact.astype(leaf.dtype)
            off = jnp.abs(exact - merged.astype(exact.dtype))
            norm = jnp.linalg.norm(exact)
            report[path] = MergeError(
                float(jnp.max(off)), float(jnp.where(norm == 0, 0.0, jnp.linalg.norm(off) / norm))
            )
            return merged

        return map_with_path(fold, self.attach(params, theta)), report

    def scale(self, path: str, rank: int) -> float:
        """Returns the factor of the low-rank product at ``path``."""
        alpha = lookup(dict(self.alpha), path) if isinstance(self.alpha, Mapping) else self.alpha
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def save(self, folder: str | os.PathLike[str], theta: Theta) -> None:
        """Writes ``adapter.safetensors`` and ``adapter.json`` (the settings), each replaced atomically.

        Args:
          folder: made if missing.
          theta: trained factors.
        """
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{path}#{name}": np.ascontiguousarray(factor)
            for path, factors in theta.items()
            for name, factor in factors.items()
        }
        settings = {
            "format": FORMAT,
            "rank": dict(self.rank) if isinstance(self.rank, Mapping) else self.rank,
            "alpha": dict(self.alpha) if isinstance(self.alpha, Mapping) else self.alpha,
            "targets": self.targets if isinstance(self.targets, str) else list(self.targets),
            "dropout": self.dropout,
            "init": self.initializer if isinstance(self.initializer, str) else "callable",
            "scaling": self.scaling,
            "axes": {pattern: [list(group) for group in _pair(entry)] for pattern, entry in self.axes.items()},
            "dtype": jnp.dtype(self.dtype).name,
        }
        with replacing(folder / "adapter.safetensors") as file:
            save_file(tensors, file, metadata={"format": FORMAT})
        with replacing(folder / "adapter.json") as file:
            file.write_text(json.dumps(settings, indent=2))

    def _targets(self, params: Any) -> list[str]:
        patterns = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        for table in (self.rank, self.alpha, self.axes):
            for pattern in table if isinstance(table, Mapping) else ():
                select(params, pattern)
        return select(params, [plain for pattern in patterns for plain in expand_braces(pattern)])

    def _axes(self, path: str, leaf: Any) -> Axes:
        return leaf.axes if is_view(leaf) else axes_of(path, leaf.shape, self.axes)

    def _rank(self, path: str) -> int:
        if isinstance(self.rank, int):
            return self.rank
        rank = lookup(dict(self.rank), path)
        if rank is None:
            raise ValueError(f"{path}: no pattern of rank={dict(self.rank)} matches it; add '**': <rank> as a default")
        return rank

    def _init_a(self, key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
        if callable(self.initializer):
            return self.initializer(key, shape, self.dtype)
        if self.initializer == "gaussian":
            return jax.random.normal(key, shape, self.dtype) / shape[-1]
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, self.dtype, -bound, bound)


def lora(
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    *,
    targets: str | Sequence[str] = "**/kernel",
    dropout: float = 0.0,
    init: str | Initializer = "kaiming",
    scaling: str = "alpha_over_r",
    axes: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> Lora:
    """Returns a LoRA adapter.

    Args:
      rank: r, or pattern -> r (the first pattern that matches a path counts).
      alpha: numerator of the scale, or pattern -> alpha; None means the rank, that is a scale of 1.
      targets: pattern(s) of the weights to adapt: matrices, stacks of matrices, embeddings, convolution kernels.
      dropout: probability with which an input element of the delta is dropped, where `Lora.attach` gets a key.
      init: of A. ``"kaiming"``: uniform within 1 / sqrt(inputs); ``"gaussian"``: normal with deviation 1 / r; or a
        function of (key, shape, dtype). B starts at zero.
      scaling: ``"alpha_over_r"`` or ``"rslora"`` (alpha / sqrt(r)).
      axes: pattern -> (input axes, output axes) for weights that are not ``[*batch, in, out]``, such as
        `memjax.weights.infer_axes` returns.
      dtype: of the factors; they are cast to the weight's dtype in products.

    Raises:
      ValueError: settings out of range; names the setting.
    """
    ranks = rank.values() if isinstance(rank, Mapping) else [rank]
    if any(not isinstance(r, int) or r < 1 for r in ranks):
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not callable(init) and init not in ("kaiming", "gaussian"):
        raise ValueError(f"init must be 'kaiming', 'gaussian' or a function, got {init!r}")
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype must be floating point, got {dtype}")
    if scaling not in ("alpha_over_r", "rslora"):
        raise ValueError(f"scaling must be 'alpha_over_r' or 'rslora', got {scaling!r}")
    table = {pattern: Axes(*_pair(entry)) for pattern, entry in (axes or {}).items()}
    return Lora(rank, alpha, targets, dropout, init, scaling, table, jnp.dtype(dtype))


def load(folder: str | os.PathLike[str]) -> tuple[Lora, Theta]:
    """Reads what `Lora.save` wrote.

    Returns:
      (adapter, theta).

    Raises:
      FileNotFoundError: no adapter in the folder.
      ValueError: files that are not a LoRA adapter of this format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    for name in ("adapter.json", "adapter.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no adapter: {name} is missing (a run writes its adapter when it ends; resume it)"
            )
    try:
        settings = json.loads((folder / "adapter.json").read_text())
        if settings.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}")
        init = settings.pop("init")
        settings["axes"] = {pattern: tuple(map(tuple, pair)) for pattern, pair in settings["axes"].items()}
        adapter = lora(init="kaiming" if init == "callable" else init, **settings)
        tensors = load_file(folder / "adapter.safetensors")
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ValueError(f"{folder} is not a readable LoRA adapter: {problem}") from None
    theta: Theta = {}
    for name, tensor in tensors.items():
        path, _, factor = name.rpartition("#")
        theta.setdefault(path, {})[factor] = jnp.asarray(tensor)
    for path, factors in theta.items():
        if set(factors) != {"a", "b"}:
            raise ValueError(f"{folder}: expected the factors a and b of {path}, found {sorted(factors)}")
    return adapter, theta


def check_factors(path: str, base: WeightView, a: jax.Array, b: jax.Array) -> None:
    """Raises a ValueError unless ``a`` and ``b`` are low-rank factors for ``base``."""
    batch = base.shape[: base.batch_ndim]
    rank = a.shape[-1]
    wanted = (
        (*batch, *(base.shape[axis] for axis in base.axes.inputs), rank),
        (*batch, rank, *(base.shape[axis] for axis in base.axes.outputs)),
    )
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise ValueError(
            f"{path}: expected factors of shapes {wanted[0]} and {wanted[1]} for a weight of shape {base.shape}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )


def _pair(entry: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inputs, outputs = ((group,) if isinstance(group, int) else tuple(group) for group in entry)
    return inputs, outputs
