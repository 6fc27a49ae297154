"""Splitting a tree into trained and frozen leaves."""

import jax
import pytest

from memjax.core.roles import combine, partition
from tests.random_views import array, view


def tree():
    return {"a": {"kernel": view("packed", array(0, 8, 4)), "bias": array(1, 4)}, "b": [array(2, 3), array(3, 3)]}


def test_partition_and_combine_are_inverse():
    params = tree()
    selected, rest = partition(params, ["**/kernel", "b/1"])
    assert selected["a"]["bias"] is None and rest["a"]["kernel"] is None
    assert selected["a"]["kernel"] is params["a"]["kernel"] and rest["b"][0] is params["b"][0]
    whole = combine(selected, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(x is y for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(params)))


def test_gradients_see_only_what_is_selected():
    selected, rest = partition({"a": array(0, 3), "b": array(1, 3)}, "a")
    grads = jax.grad(lambda s: (combine(s, rest)["a"] * combine(s, rest)["b"]).sum())(selected)
    assert grads["b"] is None
    assert grads["a"].tolist() == rest["b"].tolist()


def test_leaves_in_two_trees_or_none_raise():
    selected, rest = partition(tree(), "b/0")
    with pytest.raises(ValueError, match="b/0: expected the leaf in exactly one tree, found it in 2"):
        combine(selected, {**rest, "b": [array(2, 3), rest["b"][1]]})
    with pytest.raises(ValueError, match=r"a/bias: .*found it in 0"):
        combine(selected, {**rest, "a": {**rest["a"], "bias": None}})
    with pytest.raises(ValueError, match="matches no leaf"):
        partition(tree(), "**/scale")
