"""Roles of leaves: what is trained and what is frozen are two trees, and gradients see only the first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from memjax.core.paths import Patterns, leaf_paths, map_with_path, path_name, select
from memjax.core.views import is_view


def partition(tree: Any, where: Patterns) -> tuple[Any, Any]:
    """Splits ``tree`` by logical path into the leaves that ``where`` selects and the rest.

    Args:
      tree: any pytree; weight views are leaves.
      where: pattern(s) or predicate of (path, leaf), as in `memjax.core.select`.

    Returns:
      (selected, rest): two trees of the same structure, with None where the leaf is in the other.

    Raises:
      ValueError: a pattern that matches nothing.
    """
    chosen = set(select(tree, where))
    return (
        map_with_path(lambda path, leaf: leaf if path in chosen else None, tree),
        map_with_path(lambda path, leaf: None if path in chosen else leaf, tree),
    )


def combine(*trees: Any) -> Any:
    """Merges trees of one structure that `partition` split: each leaf comes from the tree where it is not None.

    Raises:
      ValueError: a leaf that more than one tree, or none, holds.
    """

    def pick(path: str, *leaves: Any) -> Any:
        present = [leaf for leaf in leaves if leaf is not None]
        if len(present) != 1:
            raise ValueError(f"{path}: expected the leaf in exactly one tree, found it in {len(present)}")
        return present[0]

    def is_leaf(x: Any) -> bool:
        return x is None or is_view(x)

    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: pick(path_name(keys), *leaves), *trees, is_leaf=is_leaf
    )


def check_trained(tree: Any, *, floats: bool = True) -> None:
    """Raises unless the leaves of ``tree`` can be trained.

    Args:
      tree: any pytree.
      floats: whether leaves must be arrays of floats too.

    Raises:
      TypeError: a weight view, or with ``floats`` anything but an array of floats; names its path.
    """
    for path, leaf in leaf_paths(tree):
        if is_view(leaf):
            raise TypeError(f"{path}: a weight view ({type(leaf).__name__}) cannot be trained; train an adapter on it")
        if floats and not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise TypeError(f"{path}: trained leaves must be floats, got {getattr(leaf, 'dtype', type(leaf).__name__)}")
