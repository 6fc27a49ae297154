"""Shardings of optimizer state, from those of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from memjax.core.paths import leaf_paths, path_name
from memjax.optim.matrices import matrix_shape, matrix_spec

_sliced: dict[type, str] = {}


def sliced(field: str) -> Callable[[type], type]:
    """Says of a state's type that the matrices ``[B, ., .]`` of a field hold rows or columns of the parameter.

    A sliced axis then keeps the sharding of the axis that it was cut from, where its size allows. A decorator.
    """

    def register(state_type: type) -> type:
        _sliced[state_type] = field
        return state_type

    return register


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Returns how the state of ``tx`` is sharded so that each device updates its own part of the parameters.

    An array of the state that belongs to a parameter (its path holds the parameter's) and has its shape is sharded as
    the parameter; one that is a stack of matrices takes, axis by axis, what the parameter's axes of the same size have;
    all others are replicated.

    Args:
      tx: any optax transformation.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      shardings: tree of ``params`` with a `NamedSharding` for every leaf.

    Returns:
      The tree of ``tx.init(params)`` with a `NamedSharding` for every array.

    Raises:
      ValueError: no sharding at all, from which to take the mesh.
    """
    flat = jax.tree.leaves(shardings)
    if not flat:
        raise ValueError("params without leaves have no mesh to shard state over")
    table = {path: (leaf, sharding.spec) for (path, leaf), sharding in zip(leaf_paths(params), flat, strict=True)}
    by_length, mesh = sorted(table, key=len, reverse=True), flat[0].mesh

    def assign(path: str, leaf: Any, sliced: bool) -> NamedSharding:
        owner = next((name for name in by_length if f"/{name}/" in f"/{path}/"), None)
        spec = PartitionSpec()
        if owner is not None:
            param, given = table[owner]
            if leaf.shape == param.shape:
                spec = given
            elif param.ndim >= 2 and leaf.ndim == 3:
                spec = _matrix_spec(leaf, param, given, mesh, sliced)
        return NamedSharding(mesh, spec)

    def under(keys: Any, node: Any) -> Any:
        field = _sliced.get(type(node))
        return jax.tree_util.tree_map_with_path(
            lambda inner, leaf: assign(
                path_name((*keys, *inner)), leaf, field is not None and path_name(inner[:1]) == field
            ),
            node,
        )

    state = jax.eval_shape(tx.init, params)
    return jax.tree_util.tree_map_with_path(under, state, is_leaf=lambda x: type(x) in _sliced)


def _matrix_spec(leaf: Any, param: Any, given: PartitionSpec, mesh: Any, sliced: bool) -> PartitionSpec:
    """Returns the spec of a stack of matrices ``[B, ., .]`` that belongs to a parameter."""
    axes = [*given, *[None] * (param.ndim - len(given))]
    names = (axes[0] if param.ndim == 3 else None, axes[-2], axes[-1])
    found = []
    for name, size, whole in zip(names, leaf.shape, matrix_shape(param.shape, matrix_spec(param))):
        parts = math.prod(mesh.shape[n] for n in ((name,) if isinstance(name, str) else name or ()))
        found.append(name if size == whole or (sliced and size % parts == 0) else None)
    return PartitionSpec(*found)
