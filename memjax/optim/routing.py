"""Which leaves an optimizer treats as matrices with a subspace, and which it treats whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from memjax.core.paths import leaf_paths, lookup, map_with_path, match, select
from memjax.core.roles import check_trained

Label = Literal["subspace", "full"]

EMBEDDINGS_AND_HEADS = (
    "**/*embed*/**",
    "**/{wte,wpe,lm_head,output_head,head,classifier,score}/**",
)
"""Leaves that are kept whole: what looks tokens up and what scores them."""

VECTORS = ("**/{bias,scale,shift}",)
"""Leaves that are one vector per layer, whatever axes a stack of layers puts in front."""


def label(params: Any, rules: Mapping[str, Label] | None = None, *, density: float | None = None) -> Any:
    """Labels every leaf ``"subspace"`` or ``"full"``, for `optax.partition` too.

    A leaf is ``"subspace"`` if it has two or more axes, unless it is an embedding, an output head, or a vector per
    layer (a bias, a scale, DoRA's magnitude ``m`` beside ``a`` and ``b``).

    Args:
      params: pytree of arrays or abstract arrays; None and `optax.MaskedNode` have no leaves.
      rules: pattern of logical paths -> label; the first that matches wins over the default.
      density: of the subspace; strictly between 0 and 1 it needs a leaf to act on.

    Returns:
      The tree of ``params`` with labels for leaves.

    Raises:
      TypeError: a weight view among the leaves.
      ValueError: an unknown label, a pattern that matches nothing, ``"subspace"`` for a leaf of fewer than two axes,
        a density out of [0, 1], or one between 0 and 1 where leaves exist and none is ``"subspace"``.
    """
    rules = {} if rules is None else dict(rules)
    leaves = leaf_paths(params)
    paths = {path for path, _ in leaves}
    check_trained(params, floats=False)
    for pattern, name in rules.items():
        if name not in ("subspace", "full"):
            raise ValueError(f"rule {pattern!r}: expected 'subspace' or 'full', got {name!r}")
        select(params, pattern)

    def assign(path: str, leaf: Any) -> Label:
        chosen: Label | None = lookup(rules, path)
        if chosen == "subspace" and leaf.ndim < 2:
            raise ValueError(f"{path}: a leaf of shape {tuple(leaf.shape)} has no matrix; 'subspace' needs two axes")
        if chosen is not None:
            return chosen
        parent = path.rpartition("/")[0]
        magnitude = path.rpartition("/")[2] == "m" and {f"{parent}/a", f"{parent}/b"} <= paths
        whole = magnitude or any(match(pattern, path) for pattern in (*EMBEDDINGS_AND_HEADS, *VECTORS))
        return "full" if leaf.ndim < 2 or whole else "subspace"

    labels = map_with_path(assign, params)
    if density is not None:
        check_density(density)
        if 0 < density < 1 and leaves and not any(name == "subspace" for _, name in leaf_paths(labels)):
            shapes = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in leaves[:8])
            raise ValueError(f"density={density} acts on no leaf, for none is a matrix of a subspace: {shapes}")
    return labels


def check_density(density: float) -> None:
    """Raises ValueError unless ``density`` is in [0, 1]."""
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
