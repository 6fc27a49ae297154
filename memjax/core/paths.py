"""Logical paths of pytree leaves, and the patterns that select them.

A logical path is the user's path: dict keys, attribute names and indices joined by ``/``. The trailing ``value``
that Flax NNX variables add is dropped, and a weight view counts as one leaf, so one pattern works on Linen, NNX and
plain dict trees alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from memjax.core.views import is_view

Patterns = str | Sequence[str] | Callable[[str, Any], bool]


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(keys: Sequence[Any]) -> str:
    """Returns the logical path of a jax key path, such as ``layers/mlp/up_proj/kernel``."""
    names = [_key_name(key).lstrip(".") for key in keys]
    if len(names) > 1 and names[-1] in ("value", "raw_value") and hasattr(keys[-1], "name"):
        names = names[:-1]
    return "/".join(names)


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """Returns ``(logical path, leaf)`` for every leaf of ``tree``, weight views counted as leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_view)
    return [(path_name(keys), leaf) for keys, leaf in flat]


def expand_braces(pattern: str) -> list[str]:
    """Returns the patterns that ``{a,b}`` alternatives stand for; braces may nest."""
    depth, start = 0, -1
    parts: list[str] = []
    for i, char in enumerate(pattern):
        if char == "{":
            if depth == 0:
                start = i
                parts, last = [], i + 1
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                parts.append(pattern[last:i])
                head, tail = pattern[:start], pattern[i + 1 :]
                return [full for part in parts for full in expand_braces(head + part + tail)]
        elif char == "," and depth == 1:
            parts.append(pattern[last:i])
            last = i + 1
    if depth:
        raise ValueError(f"pattern {pattern!r} has an unclosed '{{'")
    return [pattern]


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    alternatives = []
    for plain in expand_braces(pattern):
        regex = ""
        for component in plain.split("/"):
            if component == "**":
                regex += "(?:[^/]+/)*"
            else:
                regex += "".join("[^/]*" if c == "*" else "[^/]" if c == "?" else re.escape(c) for c in component)
                regex += "/"
        alternatives.append(regex)
    return re.compile("(?:" + "|".join(alternatives) + ")")


def match(pattern: str, path: str) -> bool:
    """Returns whether ``pattern`` matches the whole logical ``path``.

    ``*`` and ``?`` stay within one component, ``**`` stands for any number of components (also none), and
    ``{a,b}`` lists alternatives.
    """
    return _compiled(pattern).fullmatch(path + "/") is not None


def select(tree: Any, where: Patterns) -> list[str]:
    """Returns the logical paths of the leaves that ``where`` selects, in tree order.

    Args:
      tree: any pytree; weight views are leaves.
      where: a pattern, several patterns (a leaf matches if one does), or a predicate of (path, leaf).

    Raises:
      ValueError: a pattern, or the predicate, that matches no leaf.
    """
    leaves = leaf_paths(tree)
    if callable(where):
        chosen = [path for path, leaf in leaves if where(path, leaf)]
        if not chosen:
            raise ValueError("the predicate given as `where` selects no leaf")
        return chosen
    patterns = [where] if isinstance(where, str) else list(where)
    for pattern in patterns:
        if not any(match(pattern, path) for path, _ in leaves):
            known = ", ".join(path for path, _ in leaves[:12]) + (", ..." if len(leaves) > 12 else "")
            raise ValueError(f"pattern {pattern!r} matches no leaf; the leaves are: {known}")
    return [path for path, _ in leaves if any(match(pattern, path) for pattern in patterns)]


def lookup(table: dict[str, Any], path: str, default: Any = None) -> Any:
    """Returns the value of the first pattern in ``table`` that matches ``path``, else ``default``."""
    for pattern, value in table.items():
        if match(pattern, path):
            return value
    return default


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``fn(path, leaf, *rest_leaves)`` over ``tree`` with logical paths, weight views counted as leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf, *others: fn(path_name(keys), leaf, *others), tree, *rest, is_leaf=is_view
    )
