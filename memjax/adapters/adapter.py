"""What every adapter is: a few trained factors per weight, put in front of a frozen tree as views."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs import Codec
from memjax.core.bytes import nbytes
from memjax.core.files import replacing
from memjax.core.paths import expand_braces, leaf_paths, map_with_path, select
from memjax.core.views import Axes, WeightView, is_view
from memjax.weights import Adapted, Anchored, BitPlanes, Dense, PackedWeight, axes_of
from memjax.weights.bipolar import encode as encode_bit_planes

Theta = dict[str, dict[str, jax.Array]]
Constants = dict[str, dict[str, jax.Array]]
FORMAT = "memjax-adapter-1"


class MergeError(NamedTuple):
    """What storing one merged weight lost against the exact float32 sum."""

    max_abs: float
    relative_frobenius: float


class AdapterBytes(NamedTuple):
    """Bytes of the arrays that an adapter trains, and of those that it keeps frozen beside the weights."""

    trained: int
    constants: int


class Weight(NamedTuple):
    """A weight that an adapter targets, and its shape by the kind of axis."""

    path: str
    leaf: Any
    axes: Axes
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def d_in(self) -> int:
        return math.prod(self.inputs)

    @property
    def d_out(self) -> int:
        return math.prod(self.outputs)


class Adapter(abc.ABC):
    """A method's settings and the functions that use them; every method is a frozen dataclass made by its factory.

    A method gives `start` and `view`, and where it moves a part of the weight into its factors, `rebase`. `load` finds
    it once its factory is entered in `METHODS`.

    Attributes:
      method: name of the factory.
      anchored: whether the method keeps constants in the frozen tree, so that `prepare` must come before `attach`.
      targets: pattern(s) of the weights that are adapted.
      axes: pattern -> `Axes` of weights that are not ``[*batch, in, out]``.
      dtype: of the factors.
    """

    method: ClassVar[str]
    anchored: ClassVar[bool] = False
    targets: str | Sequence[str]
    axes: Mapping[str, Any]
    dtype: Any

    @abc.abstractmethod
    def start(self, key: jax.Array, params: Any) -> tuple[Theta, Constants]:
        """Returns the trained factors at their start, and what stays frozen beside the weights.

        Args:
          key: random key.
          params: the frozen tree as it was before the adapter, dense arrays or views.
        """

    @abc.abstractmethod
    def view(
        self,
        path: str,
        base: WeightView,
        factors: dict[str, jax.Array],
        constants: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> WeightView:
        """Returns what stands at ``path`` while the adapter is attached.

        Args:
          base: the frozen weight, or what other adapters made of it.
          factors, constants: those of `start` at this path.
          key: uint32 ``[*batch, 2]`` key words for what is random in training, or None.
        """

    def rebase(self, path: str, base: WeightView, constants: dict[str, jax.Array]) -> WeightView:
        """Returns the frozen weight that is left when the factors at their start have taken their part."""
        return base

    def prepare(self, key: jax.Array, params: Any) -> tuple[Any, Theta]:
        """Returns ``(frozen, theta)``: the tree to attach to, and the trained factors.

        The frozen tree is ``params`` itself for methods without constants; else the adapted weights carry them.

        Raises:
          ValueError: a pattern that matches nothing, settings that do not fit a leaf.
        """
        theta, constants = self.start(key, params)
        return self.anchor(params, constants), theta

    def init(self, key: jax.Array, params: Any) -> Theta:
        """Returns the trained factors at their start; with `prepare` for methods that keep constants.

        Args:
          key: random key.
          params: the frozen tree, dense arrays or views.

        Returns:
          Logical path -> factor name -> array.

        Raises:
          ValueError: a pattern that matches nothing, settings that do not fit a leaf.
        """
        return self.start(key, params)[0]

    def anchor(self, params: Any, constants: Constants) -> Any:
        """Returns the frozen tree that carries ``constants``, rebased where the method does so."""
        if not constants:
            return params
        check_known(constants, params)

        def carry(path: str, leaf: Any) -> Any:
            if path not in constants:
                return leaf
            base = self.rebase(path, self._as_view(path, leaf), constants[path])
            return Anchored(base, constants[path], self.method)

        return map_with_path(carry, params)

    def attach(self, frozen: Any, theta: Theta, key: jax.Array | None = None) -> Any:
        """Returns ``frozen`` with an adapted view at every path of ``theta``; nothing is copied.

        Args:
          frozen: the tree of `prepare`; what other adapters attached to it stays.
          theta: trained factors.
          key: random key for dropout and the like; None (as in evaluation) for none. Under shard_map or pmap fold the
            device's index into it, or every shard draws alike.

        Raises:
          ValueError: a path that ``frozen`` does not have, factors that do not fit the leaf, a tree not prepared.
        """
        check_known(theta, frozen)

        def adapt(path: str, leaf: Any) -> Any:
            if path not in theta:
                return leaf
            constants: dict[str, jax.Array] = {}
            if isinstance(leaf, Anchored) and leaf.method == self.method:
                base, constants = leaf.base, leaf.constants
            elif isinstance(leaf, Anchored):
                raise ValueError(f"{path}: prepared for {leaf.method}; attach that adapter before {self.method}")
            elif self.anchored:
                raise ValueError(
                    f"{path}: {self.method} keeps constants in the frozen tree; attach to the tree that "
                    "frozen, theta = adapter.prepare(key, params) returns"
                )
            else:
                base = self._as_view(path, leaf)
            words = None
            if key is not None:
                leaf_key = jax.random.fold_in(key, path_seed(path))
                words = jax.random.bits(leaf_key, (*base.shape[: base.batch_ndim], 2), jnp.uint32)
            return self.view(path, base, theta[path], constants, words)

        return map_with_path(adapt, frozen)

    def merge(self, frozen: Any, theta: Theta, to: str | Codec = "same") -> tuple[Any, dict[str, MergeError]]:
        """Makes the adapted weights plain weights, one leaf at a time.

        Args:
          frozen: the tree of `prepare`; what other adapters attached to the same leaves is merged too.
          theta: trained factors.
          to: ``"same"`` keeps each leaf's format (packed weights and bit planes are encoded again, sparse and
            factored weights have no place for the sum), ``"dense"`` makes dense arrays, a codec encodes every merged
            leaf.

        Returns:
          (merged tree, path -> `MergeError` against the exact float32 sum).

        Raises:
          ValueError: an unknown ``to``, a merged weight that is not finite, or ``"same"`` for a sparse or factored one.
        """
        if not isinstance(to, Codec) and to not in ("same", "dense"):
            raise ValueError(f"expected to='same', to='dense' or a codec, got {to!r}")
        report: dict[str, MergeError] = {}
        attached = self.attach(frozen, theta)
        before = dict(leaf_paths(frozen))

        def fold(path: str, leaf: Any) -> Any:
            if not is_view(leaf) or leaf is before[path]:
                return leaf
            merged, report[path] = stored_like(path, _exact(leaf), leaf, to)
            return merged

        return map_with_path(fold, attached), report

    def nbytes(self, params: Any) -> AdapterBytes:
        """Returns the exact bytes of trained factors and constants for ``params`` (arrays or ShapeDtypeStructs)."""
        theta, constants = jax.eval_shape(self.start, jax.random.key(0), params)
        return AdapterBytes(nbytes(theta), nbytes(constants))

    def settings(self) -> dict[str, Any]:
        """Returns the arguments of the method's factory that make this adapter, as JSON values."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}

    def save(self, folder: str | os.PathLike[str], theta: Theta, frozen: Any = None) -> None:
        """Writes the trained factors, the constants that ``frozen`` carries, and the settings.

        The files ``adapter.safetensors``, ``constants.safetensors`` (where there are any) and ``adapter.json`` are each
        replaced atomically.

        Args:
          folder: made if missing.
          theta: trained factors.
          frozen: the tree of `prepare`; needed for methods that keep constants.

        Raises:
          ValueError: a method with constants and no ``frozen``.
        """
        from safetensors.numpy import save_file

        constants = {
            path: leaf.constants
            for path, leaf in (() if frozen is None else leaf_paths(frozen))
            if isinstance(leaf, Anchored) and leaf.method == self.method
        }
        if self.anchored and not constants:
            raise ValueError(f"{self.method} keeps constants in the frozen tree: save(folder, theta, frozen)")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, tree in (("constants", constants), ("adapter", theta)):
            if tree or name == "adapter":
                with replacing(folder / f"{name}.safetensors") as file:
                    save_file(_flat(tree), file, metadata={"format": FORMAT})
        with replacing(folder / "adapter.json") as file:
            file.write_text(json.dumps({"format": FORMAT, "method": self.method} | self.settings(), indent=2))

    def restored(self, folder: Path) -> Adapter:
        """Returns the adapter with what its own `save` wrote beside the settings; most write nothing."""
        return self

    def _targets(self, params: Any) -> list[str]:
        """Returns the paths that the method adapts; checks that every pattern of its settings matches something."""
        patterns = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        for pattern in self.axes:
            select(params, pattern)
        return select(params, [plain for pattern in patterns for plain in expand_braces(pattern)])

    def weights(self, params: Any) -> list[Weight]:
        """Returns the weights that the method adapts.

        Raises:
          ValueError: a pattern that matches nothing, a leaf of fewer than two axes.
        """
        leaves = dict(leaf_paths(params))
        weights = []
        for path in self._targets(params):
            leaf = leaves[path]
            axes = self._axes(path, leaf)
            batch = tuple(leaf.shape[: leaf.ndim - axes.ndim])
            inputs, outputs = (tuple(leaf.shape[axis] for axis in group) for group in axes)
            weights.append(Weight(path, leaf, axes, batch, inputs, outputs))
        return weights

    def _axes(self, path: str, leaf: Any) -> Axes:
        return leaf.axes if is_view(leaf) else axes_of(path, leaf.shape, self.axes)

    def _as_view(self, path: str, leaf: Any) -> WeightView:
        return leaf if is_view(leaf) else Dense(leaf, self._axes(path, leaf))


METHODS: dict[str, Callable[..., Adapter]] = {}
"""Method name -> factory, for `load`; a method's module enters its own."""


def load(folder: str | os.PathLike[str], params: Any) -> tuple[Adapter, Any, Theta]:
    """Reads what `Adapter.save` wrote, for the tree that the adapter was made for.

    Args:
      folder: holds ``adapter.json`` and ``adapter.safetensors``.
      params: the frozen tree as it was before the adapter.

    Returns:
      (adapter, frozen, theta): attach ``theta`` to ``frozen``, which is ``params`` for methods without constants.

    Raises:
      FileNotFoundError: no adapter in the folder.
      ValueError: files that are not an adapter of this format, or one for other weights.
    """
    from safetensors import SafetensorError

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
        method = settings.pop("method")
        if method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(sorted(METHODS))}")
        adapter = METHODS[method](**settings).restored(folder)
        theta = _read(folder / "adapter.safetensors")
        constants = {}
        if adapter.anchored:
            constants = _read(folder / "constants.safetensors")
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as problem:
        raise ValueError(f"{folder} is not a readable adapter: {problem}") from None
    frozen = adapter.anchor(params, constants)
    jax.eval_shape(adapter.attach, frozen, theta)  # raises for factors that do not fit the weights
    return adapter, frozen, theta


def _flat(tree: Theta) -> dict[str, np.ndarray]:
    return {
        f"{path}#{name}": np.asarray(factor, order="C")
        for path, factors in tree.items()
        for name, factor in factors.items()
    }


def _read(file: Path) -> Theta:
    from safetensors.numpy import load_file

    tree: Theta = {}
    for name, tensor in load_file(file).items():
        path, _, factor = name.rpartition("#")
        tree.setdefault(path, {})[factor] = jnp.asarray(tensor)
    return tree


def _plain(value: Any) -> Any:
    """Returns a setting as a JSON value that the factory takes again."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if callable(value) and not isinstance(value, type):
        return "callable"
    return jnp.dtype(value).name


def path_seed(path: str) -> int:
    """Returns the number under which a path's randomness is drawn from the adapter's key."""
    return zlib.crc32(path.encode())


def check_known(tree: Mapping[str, Any], params: Any) -> None:
    """Raises a ValueError for a path of ``tree`` that is no leaf of ``params``."""
    missing = set(tree) - {path for path, _ in leaf_paths(params)}
    if missing:
        raise ValueError(f"the adapter has factors for {sorted(missing)}, which are no leaves of the params")


@jax.jit
def _exact(view: WeightView) -> jax.Array:
    """Returns the dense weight, float32 or wider."""
    return view.astype(jnp.promote_types(view.dtype, jnp.float32)).materialize()


def stored_like(path: str, exact: jax.Array, like: WeightView, to: str | Codec = "same") -> tuple[Any, MergeError]:
    """Stores a weight in the format of the one that it replaces.

    Args:
      path: for messages.
      exact: the weight, float32 or wider.
      like: the view that it replaces; its innermost base says the format.
      to: ``"same"``, ``"dense"`` or a codec.

    Returns:
      (array or view, error of storing it).

    Raises:
      ValueError: a weight that is not finite, or ``"same"`` for a sparse or factored weight.
    """
    if not bool(jnp.isfinite(exact).all()):
        raise ValueError(f"{path}: the merged weight is not finite")
    base: Any = like
    while hasattr(base, "base"):
        base = base.base
    if isinstance(to, Codec):
        stored: Any = PackedWeight(to.encode(exact, like.axes.inputs).astype(like.dtype), like.axes)
    elif to == "same" and isinstance(base, PackedWeight):
        packed = base.packed.codec.encode(exact, base.packed.axes).astype(like.dtype)
        stored = dataclasses.replace(base, packed=packed)
    elif to == "same" and isinstance(base, BitPlanes):
        planes = encode_bit_planes(exact, base.axes, base.bits, base.activation_bits, base.group)
        stored = planes.astype(like.dtype)
    elif to == "dense" or isinstance(base, Dense):
        stored = exact.astype(like.dtype)
    else:
        raise ValueError(
            f"{path}: what an adapter makes of a {type(base).__name__} weight does not fit its format; merge with "
            "to='dense' or to=a codec"
        )
    off = jnp.abs(exact - (stored.astype(exact.dtype).materialize() if is_view(stored) else stored))
    norm = jnp.linalg.norm(exact)
    return stored, MergeError(float(jnp.max(off)), float(jnp.where(norm == 0, 0.0, jnp.linalg.norm(off) / norm)))


def adapted(base: WeightView, *deltas: Any) -> Adapted:
    """Returns ``base`` with deltas added to those that it has."""
    return Adapted(base.base, (*base.deltas, *deltas)) if isinstance(base, Adapted) else Adapted(base, deltas)


def axes_table(axes: Mapping[str, Any] | None) -> dict[str, Axes]:
    """Returns the ``axes=`` argument of a factory as pattern -> `Axes`."""
    return {pattern: Axes(*map(_group, entry)) for pattern, entry in (axes or {}).items()}


def _group(group: Any) -> tuple[int, ...]:
    return (group,) if isinstance(group, int) else tuple(group)


def float_dtype(dtype: Any) -> Any:
    """Returns ``dtype`` as a dtype.

    Raises:
      ValueError: one that is not floating point.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype must be floating point, got {dtype}")
    return jnp.dtype(dtype)


def bias_of(path: str) -> str:
    """Returns the path of the bias that lies beside a weight, if the model has it."""
    return (path.rpartition("/")[0] + "/bias").lstrip("/")


def check_vector(path: str, base: WeightView, name: str, vector: jax.Array, group: tuple[int, ...]) -> None:
    """Raises a ValueError unless ``vector`` has the batch axes and the axes ``group`` of ``base``."""
    wanted = (*base.shape[: base.batch_ndim], *(base.shape[axis] for axis in group))
    if tuple(vector.shape) != wanted:
        raise ValueError(
            f"{path}: expected {name} of shape {wanted} for a weight of shape {base.shape}, got {tuple(vector.shape)}"
        )
