"""PartitionSpecs of optimizer state, from those of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec

from memjax.core.paths import leaf_paths, path_name
from memjax.optim.matrices import matrix_shape, matrix_spec

_sliced: set[type] = set()


def register_sliced(state_type: type) -> type:
    """Says of a state's type that its matrices hold slices of the parameter's rows or columns, shard by shard.

    A sliced axis then keeps the sharding of the axis that it was cut from. Usable as a decorator.
    """
    _sliced.add(state_type)
    return state_type


def state_specs(tx: optax.GradientTransformation, params: Any, specs: Any) -> Any:
    """Returns how the state of ``tx`` is sharded so that each device updates its own part of the parameters.

    An array of the state that belongs to a parameter (its path holds the parameter's) and has its shape takes its
    spec; one that is a stack of matrices takes, axis by axis, the spec of the parameter's axes of the same size;
    all others are replicated.

    Args:
      tx: any optax transformation.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      specs: tree of ``params`` with a `PartitionSpec` for every leaf.

    Returns:
      The tree of ``tx.init(params)`` with a `PartitionSpec` for every array.
    """
    state = jax.eval_shape(tx.init, params)
    leaves = leaf_paths(params)
    flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    table = {path: (leaf, spec) for (path, leaf), spec in zip(leaves, flat, strict=True)}
    by_length = sorted(table, key=len, reverse=True)

    def assign(path: str, leaf: Any, sliced: bool) -> PartitionSpec:
        owner = next((name for name in by_length if f"/{name}/" in f"/{path}/"), None)
        if owner is None or not leaf.ndim:
            return PartitionSpec()
        param, spec = table[owner]
        if leaf.shape == param.shape:
            return spec
        if param.ndim < 2 or leaf.ndim != 3:
            return PartitionSpec()
        return _matrix_spec(leaf, param, spec, sliced and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating))

    def under(keys: Any, node: Any) -> Any:
        sliced = type(node) in _sliced
        return jax.tree_util.tree_map_with_path(
            lambda inner, leaf: assign(path_name((*keys, *inner)), leaf, sliced), node
        )

    return jax.tree_util.tree_map_with_path(under, state, is_leaf=lambda x: type(x) in _sliced)


def _matrix_spec(leaf: Any, param: Any, spec: PartitionSpec, sliced: bool) -> PartitionSpec:
    names = [*spec, *[None] * (param.ndim - len(spec))]
    axes = matrix_spec(param)
    batch = names[0] if len(axes.batch) == 1 else None
    sizes = matrix_shape(param.shape, axes)
    wanted = (batch, names[-2], names[-1])
    keeps = [have == full or (sliced and i > 0) for i, (have, full) in enumerate(zip(leaf.shape, sizes))]
    return PartitionSpec(*(name if keep else None for name, keep in zip(wanted, keeps)))
