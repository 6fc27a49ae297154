"""Which axis of every leaf is split over which axis of the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.core import jaxpr_compat
from memjax.core.paths import Patterns, map_with_path, match, path_name
from memjax.core.views import is_view
from memjax.parallel.mesh import axis_size
from memjax.weights import Adapted, Dense, LowRank, PackedWeight
from memjax.weights.lift import check_divisible

COLUMNS = ("**/{q,k,v,gate,up}_proj/{kernel,bias}",)
"""Patterns of weights whose outputs the mesh axis ``model`` splits, in the layers of decoders."""
ROWS = ("**/{o,down}_proj/kernel",)
"""Patterns of weights whose inputs it splits: those that take what the columns gave."""


def specs(
    params: Any, mesh: Mesh, *, layers: str = "layers", columns: Patterns = COLUMNS, rows: Patterns = ROWS
) -> Any:
    """Returns how every leaf of ``params`` is split, the leaves inside of views too.

    - ``model``: matrices of the layers, those of ``columns`` along their outputs and those of ``rows`` along their
      inputs. A view splits its leaves to match: of LoRA's factors, B with the columns and A with the rows.
    - ``fsdp``: every matrix along the first axis that divides and that nothing else splits, the axis of layers apart;
      of views the stored leaves, as they are: codes, scales and factors. Vectors stay whole.

    Args:
      params: a dict with stacked leaves ``[L, ...]`` at ``layers``; arrays, `jax.ShapeDtypeStruct` and views.
      mesh: with some of the axes data, fsdp and model.
      layers: the key of the stacked layers.
      columns, rows: pattern(s) of the layers' weights that ``model`` splits.

    Returns:
      The tree of ``params`` with a `PartitionSpec` for every array.

    Raises:
      ValueError: a matrix that ``model`` does not divide, whose groups it would cut, or that is no sum of a dense or
        packed weight and products of factors: of a part of DoRA's or SNELL's, say, the norms are others.
    """
    by_model, by_fsdp = axis_size(mesh, "model"), axis_size(mesh, "fsdp")

    def place(path: str, leaf: Any) -> Any:
        stacked = path.split("/")[0] == layers
        spec = _by_model(path, leaf, mesh, columns, rows) if by_model > 1 and stacked else None
        if spec is None:
            spec = jax.tree.map(lambda part: PartitionSpec(), leaf)
        return jax.tree.map(lambda part, spec: _by_fsdp(part.shape, spec, by_fsdp, int(stacked)), leaf, spec)

    return map_with_path(place, params)


def _by_model(path: str, leaf: Any, mesh: Mesh, columns: Patterns, rows: Patterns) -> Any:
    """Returns the specs of a layer's weight whose outputs or inputs are split, or None."""
    of_rows = chosen(rows, path, leaf)
    if not of_rows and not chosen(columns, path, leaf):
        return None
    base, deltas = (leaf.base, leaf.deltas) if isinstance(leaf, Adapted) else (leaf, ())
    for part in (*deltas, *([base] if is_view(base) else [])):
        if not isinstance(part, LowRank | Dense | PackedWeight):
            raise ValueError(
                f"{path}: the mesh axis model splits dense and packed weights and the factors of LoRA, not "
                f"{type(part).__name__}"
            )
    inputs, outputs = leaf.axes if is_view(leaf) else ((-2,), (-1,))
    entries: list[str | None] = [None] * leaf.ndim
    entries[(inputs if of_rows else outputs)[0]] = "model"
    spec = leaf.specs(tuple(entries)) if is_view(leaf) else PartitionSpec(*entries)
    check_divisible(leaf, spec, mesh, path)
    return spec


def _by_fsdp(shape: tuple[int, ...], spec: PartitionSpec, parts: int, first: int) -> PartitionSpec:
    if parts == 1 or len(shape) - first < 2:
        return spec
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    for axis in range(first, len(shape)):
        if entries[axis] is None and shape[axis] and shape[axis] % parts == 0:
            entries[axis] = "fsdp"
            return PartitionSpec(*entries)
    return spec


def chosen(where: Patterns, path: str, leaf: Any) -> bool:
    """Returns whether ``where`` selects a leaf."""
    if callable(where):
        return where(path, leaf)
    return any(match(pattern, path) for pattern in ((where,) if isinstance(where, str) else where))


def shardings(tree: Any, mesh: Mesh, *, attach: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Returns where every array of a run lives, so that `on_mesh` finds each part on its device.

        frozen_at, theta_at = shardings((frozen, theta), mesh, attach=adapter.attach)
        frozen, theta = jax.device_put((frozen, theta), (frozen_at, theta_at))

    Args:
      tree: params; or, with ``attach``, the tuple of trees that it makes params of.
      mesh: with some of the axes data, fsdp and model.
      attach: pure function to the params; an array that it hands on is split as `specs` splits it there, others as
        they are by themselves.
      **options: those of `specs`.

    Returns:
      The structure of ``tree`` with a `NamedSharding` for every array; for `jax.device_put`, and for
      `memjax.optim.state_shardings`.

    Raises:
      ValueError: as `specs`.
    """
    if attach is None:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, **options))
    jaxpr, params = jaxpr_compat.trace(attach, *tree)
    table = dict(zip(jaxpr.outvars, jax.tree.leaves(specs(params, mesh, **options))))
    layers, parts = options.get("layers", "layers"), axis_size(mesh, "fsdp")

    def own(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        return _by_fsdp(shape, PartitionSpec(), parts, int(path.split("/")[0] == layers))

    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    found = [
        NamedSharding(mesh, table[var] if var in table else own(path_name(keys[1:]), leaf.shape))
        for var, (keys, leaf) in zip(jaxpr.invars, flat, strict=True)
    ]
    return jax.tree.unflatten(structure, found)
