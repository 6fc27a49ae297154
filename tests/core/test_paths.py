"""Logical paths and patterns."""

import jax.numpy as jnp
import pytest
from flax import nnx

from memjax.core.paths import expand_braces, leaf_paths, lookup, map_with_path, match, select
from tests.random_views import array, view

TREE = {"layers": [{"up": {"kernel": 1, "bias": 2}}, {"up": {"kernel": 3}}], "head": {"kernel": 4}, "value": 5}


@pytest.mark.parametrize(
    "pattern, path, expected",
    [
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/b/kernels", False),
        ("**/kernel", "a/my_kernel", False),
        ("*/kernel", "a/kernel", True),
        ("*/kernel", "a/b/kernel", False),
        ("layers/**", "layers/0/up/kernel", True),
        ("layers/**", "head/kernel", False),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("**", "a/b", True),
        ("layer?/w", "layer3/w", True),
        ("layer?/w", "layer31/w", False),
        ("**/{q,k,v,o}_proj/kernel", "layers/3/q_proj/kernel", True),
        ("**/{q,k,v,o}_proj/kernel", "layers/3/up_proj/kernel", False),
        ("**/{self_attn/{q,v},mlp/{gate,up}}_proj/kernel", "l/mlp/gate_proj/kernel", True),
        ("**/{self_attn/{q,v},mlp/{gate,up}}_proj/kernel", "l/mlp/q_proj/kernel", False),
        ("{a,}b", "b", True),
        ("a.b[0]/w", "a.b[0]/w", True),
        ("a.b", "axb", False),
    ],
)
def test_match(pattern, path, expected):
    assert match(pattern, path) is expected


def test_braces_nest():
    assert expand_braces("a{b,c{d,e}}f") == ["abf", "acdf", "acef"]
    assert expand_braces("{a,b}{c,d}") == ["ac", "ad", "bc", "bd"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ValueError, match="unclosed"):
        expand_braces("a{b,c")


def test_paths_of_dicts_lists_and_attributes():
    paths = dict(leaf_paths(TREE))
    assert paths["layers/0/up/kernel"] == 1
    assert paths["value"] == 5  # a dict's own key named value stays
    assert dict(leaf_paths({"attention": {"value": 6}})) == {"attention/value": 6}


def test_the_value_of_an_nnx_variable_is_not_part_of_its_path():
    _, state = nnx.split(nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False))
    paths = [path for path, _ in leaf_paths(state)]
    assert "value/kernel" in paths and "query/bias" in paths
    assert not any(path.endswith("/value") for path in paths)


def test_a_view_is_one_leaf():
    tree = {"a": {"kernel": view("lora on packed", array(0, 8, 4))}}
    ((path, leaf),) = leaf_paths(tree)
    assert path == "a/kernel" and leaf is tree["a"]["kernel"]
    assert map_with_path(lambda path, leaf: (path, leaf.shape), tree) == {"a": {"kernel": ("a/kernel", (8, 4))}}


def test_select():
    assert select(TREE, "**/kernel") == ["head/kernel", "layers/0/up/kernel", "layers/1/up/kernel"]
    assert select(TREE, ["head/*", "**/bias"]) == ["head/kernel", "layers/0/up/bias"]
    assert select(TREE, lambda path, leaf: leaf > 3) == ["head/kernel", "value"]
    with pytest.raises(ValueError, match=r"pattern '\*\*/scale' matches no leaf; the leaves are: head/kernel"):
        select(TREE, ["**/kernel", "**/scale"])
    with pytest.raises(ValueError, match="selects no leaf"):
        select(TREE, lambda path, leaf: False)


def test_lookup_takes_the_first_pattern_that_matches():
    table = {"**/q_proj/kernel": 4, "**": 8}
    assert (lookup(table, "a/q_proj/kernel"), lookup(table, "b"), lookup({}, "b", 1)) == (4, 8, 1)


def test_map_with_path_passes_the_leaves_of_other_trees():
    doubled = map_with_path(lambda path, x, y: x + y, {"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    assert doubled["a"].tolist() == [2, 2]
