"""Every consumer of a weight against the same program on the dense weight: values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memjax import codecs
from memjax.core.views import Axes, make_axes
from memjax.weights import Adapted, LowRank, PackedWeight, lift
from tests.random_views import KINDS, array, assert_close, builder, factors, view

ADAPTED = ("lora on dense", "lora on packed")  # they hold what "packed" would test too


def check(program, kind, w, axes, x, *rest, group=4, low_precision=False):
    """Compares values and gradients of ``program(weight, x, *rest)`` on a view with those on its dense weight."""
    build = builder(kind, w, axes, group)
    theta = factors(7, w.shape, axes)

    def run(fn, weight, rest):
        y, back = jax.vjp(lambda theta, x: fn(weight(build(theta)), x, *rest), theta, x)
        return y, back(array(8, *y.shape, dtype=y.dtype))

    def both(rest):
        return run(lift(program), lambda v: v, rest), run(program, lambda v: v.materialize(), rest)

    actual, expected = jax.jit(both)(rest)
    assert_close(actual, expected, 0.02 if low_precision else 2e-6)


def random_program(seed):
    """Returns (axes, weight, x, program): a dot_general after random splits, transposes and merges of the weight."""
    rng = np.random.default_rng(seed)
    n_batch, n_in, n_out = rng.integers(3), rng.integers(1, 3), rng.integers(1, 3)
    roles = ["in"] * n_in + ["out"] * n_out
    rng.shuffle(roles)
    roles = ["batch"] * n_batch + roles
    ndim = len(roles)
    of = {role: [i - ndim for i, r in enumerate(roles) if r == role] for role in ("batch", "in", "out")}
    axes = make_axes(tuple(rng.permutation(of["in"]).tolist()), tuple(of["out"]), ndim)
    shape = rng.choice([1, 2, 3, 6], size=ndim)
    shape[axes.inputs[-1]] = rng.choice([4, 8])
    w = array(seed, *shape)

    split: list[tuple[int, str]] = []
    for size, role in zip(w.shape, roles):
        if role != "batch" and size in (4, 6, 8) and rng.integers(2):
            split += [(2, role), (size // 2, role)]
        else:
            split.append((size, role))
    permutation = rng.permutation(len(split))
    order = [split[i] for i in permutation]
    merged = [order[0]]
    for size, role in order[1:]:
        if role == merged[-1][1] != "batch" and rng.integers(2):
            merged[-1] = (merged[-1][0] * size, role)
        else:
            merged.append((size, role))

    contracted = rng.choice(["in", "out"])
    contract = [int(i) for i in rng.permutation([i for i, (_, role) in enumerate(merged) if role == contracted])]
    batch = [i for i, (_, role) in enumerate(merged) if role == "batch" and rng.integers(3)]
    batch = [int(i) for i in rng.permutation(batch)]
    dims = [("c", i) for i in contract] + [("b", i) for i in batch] + [("row", 3), ("row", 2)]
    dims = [dims[i] for i in rng.permutation(len(dims))]
    x = array(seed + 1, *(value if kind == "row" else merged[value][0] for kind, value in dims))
    x_contract, x_batch = [dims.index(("c", i)) for i in contract], [dims.index(("b", i)) for i in batch]

    def program(w, x):
        w = w.reshape([size for size, _ in split]).transpose(permutation).reshape([size for size, _ in merged])
        if seed % 2:
            return lax.dot_general(w, x, ((contract, x_contract), (batch, x_batch)))
        return lax.dot_general(x, w, ((x_contract, contract), (x_batch, batch)))

    return axes, w, x, program


@pytest.mark.parametrize("seed", range(24))
def test_dot_general_with_random_dimension_numbers(seed):
    axes, w, x, program = random_program(seed)
    check(program, KINDS[seed // 2 % 3], w, axes, x)


EINSUMS = {
    "heads out": ("bsd,dhk->bhsk", (8, 2, 3), (0, (1, 2)), (2, 3, 8)),
    "heads in": ("bshk,hkd->bsd", (2, 4, 5), ((0, 1), 2), (2, 3, 2, 4)),
    "heads in, x transposed": ("bskh,hkd->bsd", (2, 4, 5), ((0, 1), 2), (2, 3, 4, 2)),
    "experts": ("ebd,edf->ebf", (3, 8, 5), (1, 2), (3, 2, 8)),
    "every expert on every row": ("bd,edf->ebf", (3, 8, 5), (1, 2), (2, 8)),
    "two stacks, one shared": ("ebd,ledf->lebf", (2, 3, 8, 5), (2, 3), (3, 2, 8)),
    "expert outputs contracted": ("ebf,edf->bed", (3, 8, 5), (1, 2), (3, 2, 5)),
}


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("name", EINSUMS)
def test_einsums_of_models(name, kind):
    spec, shape, (inputs, outputs), x_shape = EINSUMS[name]
    axes = make_axes(inputs, outputs, len(shape))
    check(lambda w, x: jnp.einsum(spec, x, w), kind, array(0, *shape), axes, array(1, *x_shape))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_accumulation_dtype_reach_the_product(kind):
    w, x = array(0, 8, 5, dtype=jnp.bfloat16), array(1, 3, 8, dtype=jnp.bfloat16)
    v = view(kind, w)

    def program(w, x):
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)

    y = lift(program)(v, x)
    assert y.dtype == jnp.float32
    assert_close(y, program(v.materialize(), x), 0.02)
    found = [e for e in jaxpr_equations(jax.make_jaxpr(lift(program))(v, x).jaxpr) if e.primitive.name == "dot_general"]
    assert all(e.params["precision"] == (lax.Precision.HIGHEST,) * 2 for e in found)
    assert {e.outvars[0].aval.dtype for e in found} <= {jnp.dtype("float32"), jnp.dtype("bfloat16")}


def jaxpr_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from jaxpr_equations(inner)


@pytest.mark.parametrize("codec", [codecs.nf4(4), codecs.bipolar(3, 8)], ids=str)
def test_every_format_under_scan_and_remat(codec):
    stack, x, theta = array(0, 3, 8, 8) / 3, array(1, 2, 8), factors(5, (3, 8, 8))
    packed = PackedWeight(codec.encode(stack, (-2,)), Axes())

    def program(w, x):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x @ w.T))), x, w)

    def run(fn, weight):
        build = lambda theta: Adapted(packed, (LowRank(theta["a"], theta["b"], 0.05),))  # noqa: E731
        y, back = jax.vjp(lambda theta, x: fn(weight(build(theta)), x), theta, x)
        return y, back(jax.tree.map(jnp.cos, y))

    assert_close(*jax.jit(lambda: (run(lift(program), lambda v: v), run(program, lambda v: v.materialize())))(), 5e-6)


LOOKUPS = {
    "rows": lambda w, i: w[i],
    "rows of the transpose": lambda w, i: w.T[:, i],
    "columns": lambda w, i: jnp.take(w, i, axis=1),
    "columns of the transpose": lambda w, i: w.T[i],
    "one row": lambda w, i: w[i[0, 1]],
    "one column of the transpose": lambda w, i: w.T[:, 3],
    "clip": lambda w, i: jnp.take(w, i * 7, axis=0, mode="clip"),
    "rows, then a cast": lambda w, i: w.astype(jnp.bfloat16)[i].astype(jnp.float32),
}


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name, kind):
    indices = jnp.array([[0, 5, 2], [-1, 3, 3]])
    lookup = LOOKUPS[name]
    check(
        lambda w, x, i: lookup(w, i) * x, kind, array(0, 8, 8), Axes(), array(1), indices, low_precision="cast" in name
    )


@pytest.mark.parametrize("groups_along", [0, 1])
def test_a_lookup_out_of_range_is_filled_as_jax_does(groups_along):
    axes = make_axes(groups_along, 1 - groups_along, 2)
    indices = jnp.array([0, 8, -9, 7])
    for kind in KINDS:
        v = view(kind, array(0, 8, 8), axes)
        for fill in (None, 2.5):

            def program(w, i, fill=fill):
                return jnp.take(w, i, axis=0, mode="fill", fill_value=fill)

            actual, expected = lift(program)(v, indices), program(v.materialize(), indices)
            np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
            assert_close(jnp.nan_to_num(actual), jnp.nan_to_num(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_embedding_is_looked_up_and_multiplied(kind):
    def program(w, x, tokens):
        return (x + w[tokens]) @ w.T

    check(program, kind, array(0, 16, 8), make_axes(1, 0, 2), array(1, 2, 3, 8), jnp.array([[1, 2, 15], [0, 0, 4]]))


CONVOLUTIONS = {
    "3x3": ((3, 3, 8, 6), {}),
    "1x1": ((1, 1, 8, 6), {}),
    "groups": ((3, 3, 4, 6), {"feature_group_count": 2}),
    "depthwise": ((4, 2, 1, 16), {"feature_group_count": 8}),
    "strides and dilation": ((3, 3, 8, 6), {"window_strides": (2, 1), "rhs_dilation": (1, 2)}),
}
LAYOUTS = {"HWIO": (0, 1, 2, 3), "OIHW": (3, 2, 0, 1)}


@pytest.mark.parametrize(
    "kind, name, layout",
    [c for i, c in enumerate(itertools.product(ADAPTED, CONVOLUTIONS, LAYOUTS)) if i % 2 == 0 or c[0] == ADAPTED[1]],
)
def test_convolutions(kind, name, layout):
    shape, settings = CONVOLUTIONS[name]
    order = LAYOUTS[layout]
    inputs, output = tuple(order.index(i) for i in (0, 1, 2)), order.index(3)
    w = array(0, *(shape[i] for i in order))
    group = shape[2] if shape[2] % 2 == 0 else shape[1]
    if name == "depthwise":  # groups run along the last group axis that has more than one element
        inputs, group = (inputs[2], inputs[1], inputs[0]), 4
    axes = make_axes(inputs, output, 4)

    def program(w, x):
        params = {"window_strides": (1, 1), "padding": "SAME", **settings}
        return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", layout, "NHWC"), **params)

    check(program, kind, w, axes, array(1, 2, 5, 5, 8), group=group)


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_with_a_transposed_kernel_and_channels_first(kind):
    axes = make_axes((0, 1, 2), 3, 4)

    def program(w, x):
        w = jnp.transpose(w, (3, 2, 0, 1))
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    check(program, kind, array(0, 3, 3, 8, 6), axes, array(1, 2, 8, 5, 5))


def test_the_default_axes_of_an_attention_kernel_raise():
    v = view("lora on dense", array(0, 8, 2, 4))
    with pytest.raises(TypeError, match=r"neither all of its input axes.*infer_axes"):
        lift(lambda w, x: jnp.einsum("bsd,dhk->bshk", x, w))(v, array(1, 2, 3, 8))


def test_a_lookup_along_one_of_several_output_axes_raises():
    v = view("lora on dense", array(0, 8, 2, 4), make_axes(0, (1, 2), 3))
    with pytest.raises(TypeError, match="one of several input or output axes"):
        lift(lambda w, i: w[:, i])(v, jnp.array([1]))


def test_axes_defaults():
    assert Axes() == ((-2,), (-1,))
    for bad in ((0, 0), (5, 1), ((), 1), (2, 0)):
        with pytest.raises(ValueError):
            make_axes(*bad, 3)
