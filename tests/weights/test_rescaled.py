"""A rescaled weight against ``diag(row) W diag(column)``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import codecs
from memjax.core.views import Axes, make_axes
from memjax.weights import Adapted, Dense, LowRank, PackedWeight, Rescaled, lift
from tests.random_views import array, assert_close, factors


def vectors(w, axes, which=("column", "row")):
    batch = w.shape[: w.ndim - axes.ndim]
    sizes = {"column": axes.outputs, "row": axes.inputs}
    return {name: array(i, *batch, *(w.shape[a] for a in sizes[name])) for i, name in enumerate(which)}


def dense(w, axes, column=None, row=None):
    """Multiplies a weight of three or fewer axes by its vectors, one index at a time."""
    w = np.array(w, np.float32)
    batch = w.ndim - axes.ndim
    for index in np.ndindex(w.shape):
        for vector, group in ((column, axes.outputs), (row, axes.inputs)):
            if vector is not None:
                w[index] *= vector[(*index[:batch], *(index[a] for a in group))]
    return w


PROGRAMS = {
    "matrix": (lambda w, x: x @ w, (8, 6), (-2, -1), (3, 8)),
    "transposed": (lambda w, x: x @ w.T, (8, 6), (-2, -1), (3, 6)),
    "heads out": (lambda w, x: jnp.einsum("sd,dhk->hsk", x, w), (8, 2, 3), (0, (1, 2)), (3, 8)),
    "heads in, outputs first": (lambda w, x: jnp.einsum("shk,dhk->sd", x, w), (5, 2, 4), ((1, 2), 0), (3, 2, 4)),
    "output axes swapped": (lambda w, x: jnp.einsum("sd,dhk->shk", x, w), (8, 2, 3), (0, (2, 1)), (3, 8)),
    "experts": (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 8, 5), (-2, -1), (3, 2, 8)),
    "scan": (lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (2, 8, 8), (-2, -1), (3, 8)),
    "rows": (lambda w, x: w[jnp.array([[1, 7], [0, 1]])] * x, (8, 6), (-2, -1), (6,)),
    "columns": (lambda w, x: w[:, jnp.array([1, 5])] * x, (8, 6), (-2, -1), (2,)),
    "tied": (lambda w, x: (x + w[jnp.array([1, 7])]) @ w.T, (8, 6), (-2, -1), (2, 6)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_and_lookups(name):
    program, shape, axes, x_shape = PROGRAMS[name]
    axes = make_axes(*axes, len(shape))
    w, x = array(5, *shape), array(6, *x_shape)
    trained = vectors(w, axes)
    base: Dense | PackedWeight | Adapted = Dense(w, axes)
    if name in ("matrix", "scan", "rows"):
        base = PackedWeight(codecs.int4(group=4).encode(w, axes.inputs), axes)
    elif name == "heads out":
        base = Adapted(base, (LowRank(**factors(9, shape, axes), scale=0.5),))
    exact = base.materialize()
    assert_close(Rescaled(base, **trained).materialize(), dense(exact, axes, **trained))

    def run(weight, program):
        y, back = jax.vjp(lambda v, x: program(weight(v), x), trained, x)
        return y, back(array(8, *y.shape))

    def spread(v):
        ones = [1 if a not in axes.outputs else exact.shape[a] for a in range(-axes.ndim, 0)]
        column = v["column"].transpose(_order(axes.outputs, exact.ndim - axes.ndim))
        row = v["row"].transpose(_order(axes.inputs, exact.ndim - axes.ndim))
        rest = [1 if a not in axes.inputs else exact.shape[a] for a in range(-axes.ndim, 0)]
        batch = exact.shape[: exact.ndim - axes.ndim]
        return exact * column.reshape(*batch, *ones) * row.reshape(*batch, *rest)

    actual, expected = jax.jit(lambda: (run(lambda v: Rescaled(base, **v), lift(program)), run(spread, program)))()
    assert_close(actual, expected, 3e-6)


def _order(group, batch):
    return [*range(batch), *(batch + int(i) for i in np.argsort(group))]


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    axes = make_axes((0, 1, 2), 3, 4)
    w, x = array(0, 3, 3, 4 // groups, 6), array(1, 2, 5, 5, 4)
    column, row = array(2, 6), array(3, 1, 1, 4 // groups)

    def program(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    def run(make, program):
        y, back = jax.vjp(lambda column, row, x: program(make(column, row), x), column, row, x)
        return y, back(array(8, *y.shape))

    base = Dense(w, axes)
    actual = run(lambda c, r: Rescaled(base, c, r), lift(program))
    assert_close(actual, run(lambda c, r: w * c * r[..., None], program), 5e-6)
    assert_close(Rescaled(base, column, row).materialize(), w * column * row[..., None])
    with pytest.raises(ValueError, match=r"expected a row of size 1 along the axes of the window, got shape \(3, 3, "):
        lift(program)(Rescaled(base, row=jnp.ones(w.shape[:3])), x)


def test_low_precision_products_are_scaled_in_float32():
    w, x = array(0, 16, 8, dtype=jnp.bfloat16), array(1, 32, 16, dtype=jnp.bfloat16)
    column = jnp.full(8, 1 + 2.0**-8, jnp.float32)  # rounds to 1 in bfloat16
    y = lift(lambda w, x: x @ w)(Rescaled(Dense(w, Axes()), column), x)
    plain = x @ w
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, (plain.astype(jnp.float32) * column).astype(jnp.bfloat16))
    assert np.mean(np.asarray(y != plain)) > 0.2
    assert Rescaled(Dense(w, Axes()), column).astype(jnp.float32).dtype == jnp.float32


def kept(fn, *trained):
    """Returns the (dtype, shape) of what reverse mode of ``fn`` keeps."""
    return sorted((leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(jax.vjp(fn, *trained)[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_a_trained_vector_needs_is_kept(dtype):
    base = PackedWeight(codecs.int4(group=4).encode(array(0, 8, 6).astype(dtype), (-2,)), Axes())
    x, v = array(1, 5, 8).astype(dtype), vectors(base, Axes())

    def apply(v, x):
        return lift(lambda w, x: x @ w)(Rescaled(base, **v), x)

    unscaled_output, unscaled_input = (dtype, (5, 6)), (dtype, (5, 8))
    neither = kept(lambda x: apply(v, x), x)
    assert unscaled_output not in neither and unscaled_input not in neither
    column = kept(lambda c: apply(v | {"column": c}, x), v["column"])
    assert column.count(unscaled_output) == 1 and unscaled_input not in column
    row = kept(lambda r: apply(v | {"row": r}, x), v["row"])
    assert row.count(unscaled_input) == 1 and unscaled_output not in row
    for residuals in (neither, column, row):
        assert not any(name.startswith(("float", "bfloat")) and shape == (8, 6) for name, shape in residuals)


def test_shards_of_both_vectors():
    w, x = array(0, 8, 8), array(1, 3, 8)
    view = Rescaled(Dense(w, Axes()), **vectors(w, Axes()))
    specs = view.specs(("a", "b"))
    assert (specs.base.array, specs.column, specs.row) == (P("a", "b"), P("b"), P("a"))
    assert Rescaled(Dense(w, Axes()), row=jnp.ones(1)).specs(("a", None)).row == P(None)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def program(w, x):
        def local(w, x):
            return lax.psum(x @ w, "a")

        return jax.shard_map(local, mesh=mesh, in_specs=(P("a", "b"), P(None, "a")), out_specs=P(None, "b"))(w, x)

    assert_close(jax.jit(lift(program))(view, x), x @ view.materialize())
