"""Packing the weights of a params tree, and what such a tree costs and loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.codecs import Codec
from memjax.core.bytes import nbytes
from memjax.core.paths import Patterns, leaf_paths, lookup, map_with_path, match, select
from memjax.core.views import Axes, WeightView, is_view, make_axes
from memjax.weights.dense import Dense
from memjax.weights.lift import Usage, check_divisible, lift_and_record
from memjax.weights.packed import PackedWeight

AxesTable = Mapping[str, Axes | tuple[Any, Any]]


def axes_of(path: str, shape: tuple[int, ...], table: AxesTable | None) -> Axes:
    """Returns the input and output axes of a weight: from the first pattern that matches, else (-2,), (-1,).

    Args:
      path: logical path of the leaf.
      shape: its shape.
      table: pattern -> `Axes`, or a pair (input axes, output axes) of axis numbers.

    Raises:
      ValueError: a leaf of fewer than two axes, or axes that do not fit its shape.
    """
    if len(shape) < 2:
        raise ValueError(f"{path}: expected a weight of two or more axes, got shape {tuple(shape)}")
    entry = lookup(dict(table or {}), path)
    if entry is None:
        return Axes()
    try:
        return make_axes(entry[0], entry[1], len(shape))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def check_table(tree: Any, table: AxesTable | None) -> None:
    """Raises a ValueError for a pattern of ``table`` that matches no leaf of ``tree``."""
    for pattern in table or {}:
        select(tree, pattern)


def check_dense(path: str, leaf: Any) -> None:
    """Raises unless a leaf is a finite floating-point array, as a weight that is to be stored otherwise must be."""
    if is_view(leaf) or not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = leaf.dtype if hasattr(leaf, "dtype") and not is_view(leaf) else type(leaf).__name__
        raise TypeError(f"{path}: expected a dense floating-point array, got {found}")
    if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.isfinite(leaf).all()):
        raise ValueError(f"{path}: the weight is not finite")


def quantize(
    params: Any, codec: Codec | Mapping[str, Codec], where: Patterns | None = None, axes: AxesTable | None = None
) -> Any:
    """Returns ``params`` with the selected weights stored as codes.

    Args:
      params: any pytree of arrays; leaves that are not selected stay as they are.
      codec: the format, such as ``memjax.codecs.int4(group=64)``; groups run along the input axes of a weight. Or
        pattern -> format, of which the first that matches a weight is taken.
      where: pattern(s) over logical paths, or a predicate of (path, leaf). None: ``"**/kernel"``, or all weights
        that the patterns of ``codec`` match.
      axes: pattern -> input and output axes, for weights that are not ``[*batch, in, out]``; see `infer_axes`.

    Raises:
      ValueError: a pattern that matches nothing, a selected weight that no pattern of ``codec`` matches, groups that
        do not divide, non-finite weights; names the leaf.
      TypeError: a selected leaf that is a view already or not floating point.
    """
    table = dict(codec) if isinstance(codec, Mapping) else {"**": codec}
    for entry in table.values():
        if not isinstance(entry, Codec):
            raise TypeError(f"expected a codec such as memjax.codecs.int4(), got {entry!r}")
    if not table:
        raise ValueError("expected a codec, or at least one pattern -> codec, got an empty mapping")
    if where is None:
        where = list(table) if isinstance(codec, Mapping) else "**/kernel"
    chosen = set(select(params, where))
    for pattern in table:
        if not any(match(pattern, path) for path in chosen):
            raise ValueError(f"pattern {pattern!r} of the codecs matches no selected leaf")
    check_table(params, axes)

    def pack(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        if is_view(leaf):
            raise TypeError(f"{path}: expected a dense array to quantize, got {type(leaf).__name__}")
        leaf_codec, leaf_axes = lookup(table, path), axes_of(path, leaf.shape, axes)
        if leaf_codec is None:
            raise ValueError(f"{path}: no pattern of the codecs matches this leaf, which `where` selects")
        try:
            return PackedWeight(leaf_codec.encode(leaf, leaf_axes.inputs), leaf_axes)
        except (ValueError, TypeError) as problem:
            raise type(problem)(f"{path}: {problem}") from None

    return map_with_path(pack, params)


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, Axes]:
    """Reads the input and output axes of every weight from how ``fn(params, *args, **kwargs)`` contracts it.

    A weight that is looked up has the lookup axis as input; otherwise the first product or convolution decides.

    Args:
      fn: a pure function; it is traced, not run.
      params: its first argument, of arrays or ShapeDtypeStructs.

    Returns:
      Logical path -> `Axes`, for every leaf with two or more axes that is contracted; pass it as ``axes=``.

    Raises:
      ValueError: a weight that the function contracts along different axes in different places, or no weight at all.
    """
    usage: dict[str, Usage] = {}

    def traced(params: Any, args: Any, kwargs: Any) -> Any:
        probes = jax.tree.map(lambda x: Dense(x, Axes()) if x.ndim > 1 else x, params)
        return lift_and_record(fn, usage)(probes, *args, **kwargs)

    jax.eval_shape(traced, params, args, kwargs)
    if not usage:
        raise ValueError(
            "the function contracts no leaf of its first argument; pass it as infer_axes(fn, params, *args)"
        )
    shapes = {path: leaf.shape for path, leaf in leaf_paths(params)}
    return {path: _axes_from(path, use, len(shapes[path])) for path, use in usage.items()}


def _axes_from(path: str, use: Usage, ndim: int) -> Axes:
    products = use.dots or use.convs
    seen = {frozenset((frozenset(a), frozenset(b))) for a, b in products}
    if len(seen) > 1:
        raise ValueError(f"{path}: the function contracts this weight along different axes: {products}; give axes=")
    if use.lookups:
        inputs: tuple[int, ...] = (use.lookups[0],)
        others = {axis for pair in products[:1] for group in pair for axis in group} or set(range(-ndim, 0))
        outputs = tuple(sorted(others - set(inputs)))
    else:
        inputs, outputs = products[0]
    try:
        return make_axes(inputs, outputs, ndim)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def astype(tree: Any, dtype: Any) -> Any:
    """Returns ``tree`` with floating-point leaves cast and views standing for weights of ``dtype``; codes stay."""

    def cast(leaf: Any) -> Any:
        if is_view(leaf):
            return leaf.astype(dtype)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree, is_leaf=is_view)


def sharding(params: Any, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """Returns a NamedSharding for every leaf, also for the leaves inside views.

    Args:
      params: a tree of arrays and views.
      mesh: the device mesh.
      specs: pattern -> PartitionSpec of the dense weight; leaves that no pattern matches are replicated.

    Returns:
      A tree of the structure of ``params`` for `jax.device_put` or ``in_shardings=``.

    Raises:
      ValueError: a pattern that matches nothing, or a shard that would cut a quantization group.
    """
    for pattern in specs:
        select(params, pattern)

    def place(path: str, leaf: Any) -> Any:
        spec = next((spec for pattern, spec in specs.items() if match(pattern, path)), PartitionSpec())
        if len(spec) > leaf.ndim:
            raise ValueError(f"{path}: {spec} has more entries than the weight's {leaf.ndim} axes")
        if not is_view(leaf):
            return NamedSharding(mesh, spec)
        leaf_specs = leaf.specs((*spec, *([None] * (leaf.ndim - len(spec)))))
        check_divisible(leaf, leaf_specs, mesh, path)
        return jax.tree.map(lambda s: NamedSharding(mesh, s), leaf_specs)

    return map_with_path(place, params)


class LeafReport(NamedTuple):
    """What storing one weight as a view saved and lost."""

    path: str
    shape: tuple[int, ...]
    nbytes: int
    bits_per_weight: float
    max_abs: float
    relative_frobenius: float


class Report(NamedTuple):
    """Per-leaf reports, worst relative error first, and the bytes of both trees; prints as a table.

    Of weights that were packed before, ``dense_bytes`` are of what they decode to, and ``stored_bytes`` their own.
    """

    leaves: list[LeafReport]
    dense_bytes: int
    packed_bytes: int
    stored_bytes: int | None = None

    def __str__(self) -> str:
        width = max([len("weight"), *(len(row.path) for row in self.leaves)])
        lines = [f"{'weight':<{width}}  {'bytes':>12}  {'bits':>6}  {'max abs':>9}  {'rel. err':>9}"]
        lines += [
            f"{row.path:<{width}}  {row.nbytes:>12,}  {row.bits_per_weight:>6.3f}  {row.max_abs:>9.3g}  "
            f"{row.relative_frobenius:>9.3g}"
            for row in self.leaves
        ]
        stored = "" if self.stored_bytes is None else f" dense, {self.stored_bytes:,} as stored"
        lines.append(f"all leaves: {self.dense_bytes:,}{stored} -> {self.packed_bytes:,} bytes")
        return "\n".join(lines)


def report(params: Any, packed: Any) -> Report:
    """Compares a tree with one in which views stand for weights.

    Args:
      params: the dense tree.
      packed: what `quantize`, `sparsify`, `factorize` or `bipolar` made of it.

    Returns:
      Bytes and bits per weight with all metadata, largest absolute and relative Frobenius error of every view.

    Raises:
      ValueError: trees whose leaves differ in path or shape.
    """
    dense = dict(leaf_paths(params))
    rows = []
    for path, leaf in leaf_paths(packed):
        if path not in dense or tuple(dense[path].shape) != tuple(leaf.shape):
            raise ValueError(f"{path}: not in the dense tree, or there with another shape than {tuple(leaf.shape)}")
        if is_view(leaf):
            max_abs, relative = _error(jnp.asarray(dense[path]), leaf)
            bits = leaf.nbytes * 8 / leaf.size
            rows.append(LeafReport(path, leaf.shape, leaf.nbytes, bits, float(max_abs), float(relative)))
    rows.sort(key=lambda row: -row.relative_frobenius)
    return Report(rows, nbytes(params), nbytes(packed))


@jax.jit
def _error(dense: jax.Array, view: WeightView) -> tuple[jax.Array, jax.Array]:
    dense = dense.astype(jnp.float32)
    off = jnp.abs(dense - view.astype(jnp.float32).materialize())
    norm = jnp.linalg.norm(off.ravel())
    relative = jnp.where(norm == 0, 0.0, norm / jnp.linalg.norm(dense.ravel()))
    return jnp.max(off, initial=0.0), relative
