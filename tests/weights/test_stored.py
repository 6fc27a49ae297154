"""The laws of views, for every way of storing a weight: products, lookups, convolutions, gradients, bytes, files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from memjax import codecs, weights
from memjax.core.views import Axes, make_axes
from memjax.weights import Adapted, LowRank, lift
from tests.random_views import array, assert_close, factors
from tests.weights.test_io import assert_same

W = "w"  # the name under which every weight of these tests stands in its tree


def stored(build):
    """Returns the function of (weight, axes) that stores one weight with a function of (tree, axes table)."""
    return lambda w, axes=((-2,), (-1,)): build({W: w}, {W: axes})[W]


def integer(tree, axes):
    plan = {W: weights.ActivationQuant(8, 8)}
    return weights.integer_activations(weights.quantize(tree, codecs.int6(group=8), W, axes), plan)


FORMATS = {
    "2:4": stored(lambda t, a: weights.sparsify(t, "2:4", W, axes=a)),
    "2:4 int4": stored(lambda t, a: weights.sparsify(t, "2:4", W, codec=codecs.int4(group=4), axes=a)),
    "bitmap": stored(lambda t, a: weights.sparsify(t, "bitmap", W, sparsity=0.7, axes=a)),
    "tiled csl": stored(lambda t, a: weights.sparsify(t, "tiled_csl", W, sparsity=0.7, axes=a)),
    "factored": stored(lambda t, a: weights.factorize(t, 2, where=W, axes=a)),
    "bit planes": stored(lambda t, a: weights.bipolar(t, 3, None, W, group=8, axes=a)),
}
INTEGER = {
    "integer": stored(integer),
    "bit planes, integer": stored(lambda t, a: weights.bipolar(t, 3, 8, W, group=8, axes=a)),
}


def sampled(names, *left_out):
    """Returns parameters for pytest; those left out share their code with others and run with the slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in left_out else []) for name in names]


@functools.cache
def stack(name):
    """Returns a stored stack of three matrices."""
    return (FORMATS | INTEGER)[name](array(0, 3, 16, 8) / 3)


def compare(program, view, *x, tolerance=2e-6):
    """Compares values and gradients of ``program(weight, *x)`` on a view with those on its dense weight."""

    def run(fn, weight, *x):
        y, back = jax.vjp(functools.partial(fn, weight), *x)
        return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))

    def both(*x):
        return run(lift(program), view, *x), run(program, view.materialize(), *x)

    assert_close(*jax.jit(both)(*x), tolerance)


@pytest.mark.parametrize("name", sampled(FORMATS, "2:4", "tiled csl"))
def test_a_stack_in_a_scan_both_ways(name):
    view = stack(name)
    assert (view.shape, view.batch_ndim, view.dtype) == ((3, 16, 8), 1, jnp.float32)

    def program(w, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    compare(program, view, array(1, 2, 16))


@pytest.mark.parametrize("name", sampled([*FORMATS, *INTEGER], "2:4", "bitmap", "tiled csl", "bit planes"))
def test_under_an_adapter_with_several_input_axes(name):
    axes = make_axes((2, 0), 1, 3)
    w, theta, x = array(0, 8, 6, 2), factors(3, (8, 6, 2), axes), array(1, 5, 2, 8)
    view = (FORMATS | INTEGER)[name](w, axes)

    def run(fn, base, theta, x):
        def apply(theta, x):
            adapted = Adapted(base, (LowRank(theta["a"], theta["b"], 0.5),))
            return fn(adapted.materialize() if fn is program else adapted, x)

        y, back = jax.vjp(apply, theta, x)
        return y, back(jnp.cos(jnp.arange(30.0).reshape(5, 6)))

    def program(w, x):
        return jnp.einsum("thk,knh->tn", x, w)

    actual, expected = jax.jit(lambda *a: (run(lift(program), view, *a), run(program, view, *a)))(theta, x)
    assert_close(actual[1], expected[1])  # integer products have the gradients of the decoded weight
    assert_close(actual[0], expected[0], 2e-2 if name in INTEGER else 2e-6)


@pytest.mark.parametrize("name", sampled([*FORMATS, *INTEGER], "2:4", "tiled csl", "integer", "bit planes, integer"))
def test_lookups(name):
    axes = make_axes(1, 0, 2)
    view = (FORMATS | INTEGER)[name](array(0, 70, 72, dtype=jnp.bfloat16), axes)
    indices = jnp.array([[0, 69, 63], [64, 30, 30]])

    def program(w, i):
        return w[i], jnp.take(w, i, axis=1)

    actual, expected = jax.jit(lambda i: (lift(program)(view, i), program(view.materialize(), i)))(indices)
    assert_close(actual, expected, 0.0 if name != "factored" else 0.02)


@pytest.mark.parametrize("name", sampled(FORMATS, "2:4 int4", "bitmap", "tiled csl", "bit planes"))
def test_convolutions(name):
    axes = make_axes((0, 1, 2), 3, 4)

    def program(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2)

    compare(program, FORMATS[name](array(0, 3, 3, 8, 6), axes), array(1, 1, 4, 4, 16), tolerance=5e-6)


def dense_residuals(fn, view):
    """Returns the shapes of the floating arrays as large as the weight that ``fn(x, view)`` keeps for its gradient."""

    def residuals(x, view):
        return jax.vjp(lambda x: fn(x, view), x)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, array(1, 4, view.shape[0]), view))
    return [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= view.size]


@pytest.mark.parametrize("name", [*FORMATS, *INTEGER])
def test_no_dense_residual(name):
    view = jax.tree.map(lambda leaf: leaf[0], stack(name))

    def train(x, view):
        return lift(lambda w, x: jnp.tanh(x @ w) @ w.T)(view, x)

    assert dense_residuals(train, view) == []
    assert dense_residuals(train, weights.Dense(array(0, 16, 8), Axes())) == [(16, 8)]  # the check can fail


SHARDED = {
    "2:4": (P("model", None), P(None, "model"), P()),
    "bitmap": (P(None, "model"), P(), P(None, "model")),
    "factored": (P("model", None), P(None, "model"), P()),
    "bit planes, integer": (P(None, "model"), P(), P(None, "model")),
    "integer": (P("model", None), P(None, "model"), P()),
}


@pytest.mark.parametrize("name", sampled(SHARDED, "2:4"))
def test_shards(name):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    w_spec, x_spec, y_spec = SHARDED[name]
    view = (FORMATS | INTEGER)[name](array(0, 32, 128))
    x = array(1, 3, 32)

    def local(w, x):
        y = x @ w
        return lax.psum(y, "model") if w_spec[0] else y

    def program(w, x):
        return jax.shard_map(local, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=y_spec)(w, x)

    def run(fn, x):
        y, back = jax.vjp(lambda x: lift(fn)(view, x), x)
        return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))

    assert_close(*jax.jit(lambda x: (run(program, x), run(lambda w, x: x @ w, x)))(x), 5e-6)


@pytest.mark.parametrize(
    "name, spec, message",
    [
        ("bitmap", P("model", None), "keeps its inputs together"),
        ("bit planes", P("model", None), "keeps its inputs together"),
        ("bitmap", P(None, "model"), "not whole tiles of 64"),
        ("tiled csl", P(None, "model"), "batch axes only"),
    ],
)
def test_a_shard_that_a_format_cannot_cut_is_refused(name, spec, message):
    with pytest.raises(ValueError, match=message):
        FORMATS[name](array(0, 32, 72)).specs(tuple(spec))


def test_batch_axes_can_be_sharded():
    mesh = jax.make_mesh((3,), ("layer",), axis_types=(AxisType.Auto,))
    tree = {name: stack(name) for name in (*FORMATS, *INTEGER)}
    placed = jax.device_put(tree, weights.sharding(tree, mesh, {"**": P("layer")}))
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 1 for leaf in jax.tree.leaves(placed))


BYTES = {  # of a [2, 128, 96] weight in bfloat16, t = 2 by s = 2 tiles
    "2:4": 2 * 128 * 96 * 9 / 8,
    "2:4 int4": 2 * 128 * 96 * (2 + 1 + 16 / 8) / 8,
    "factored": 2 * 2 * (128 + 96) * 2,
    "bit planes": 2 * 16 * 96 * (4 * 3 * 1 + 2),
    "integer": 2 * 128 * 96 * (6 + 16 / 8) / 8,
    "bit planes, integer": 2 * 16 * 96 * (4 * 3 * 1 + 2),
}


def test_bytes_report_dtypes_and_files(tmp_path):
    w = array(0, 2, 128, 96, dtype=jnp.bfloat16)
    tree = {name: build(w) for name, build in (FORMATS | INTEGER).items()}
    for name, nbytes in BYTES.items():
        assert tree[name].nbytes == nbytes, name
    kept = np.asarray(tree["bitmap"].materialize() != 0).reshape(2, 2, 64, 96)
    capacity = max(kept[..., :64].sum((1, 2, 3)).max(), kept[..., 64:].sum((1, 2, 3)).max())
    assert tree["bitmap"].nbytes == 2 * (8 * 2 * 96 + 4 * 2 * 2 + 2 * capacity * 2)
    words = tree["tiled csl"].words.shape[-1]  # tiles of 128 outputs by 64 inputs
    tiles = np.pad(kept, ((0, 0), (0, 0), (0, 0), (0, 32))).sum((2, 3))
    assert words == (-(-tiles // 4) * 4).sum(-1).max() and tree["tiled csl"].nbytes == 2 * 4 * (words + 2 + 2)

    some = {name: tree[name] for name in ("factored", "bitmap", "integer")}
    report = weights.report(dict.fromkeys(some, w), some)
    errors = [row.relative_frobenius for row in report.leaves]
    assert len(errors) == 3 and errors == sorted(errors, reverse=True) and min(errors) > 0
    for row in report.leaves:
        assert (row.nbytes, row.bits_per_weight) == (tree[row.path].nbytes, tree[row.path].nbytes * 8 / w.size)
    cast = weights.astype(tree, jnp.float32)
    dense = [jax.eval_shape(view.materialize).dtype for view in cast.values()]
    assert {*dense, *(view.dtype for view in cast.values())} == {jnp.dtype("float32")}
    assert cast["2:4"].values.dtype == jnp.bfloat16

    weights.save(tmp_path / "w.safetensors", {"a": tree, "b": cast})
    assert_same(weights.load(tmp_path / "w.safetensors"), {"a": tree, "b": cast})


def test_bad_weights_are_refused_by_path():
    for store in (
        lambda tree: weights.sparsify(tree, "2:4"),
        lambda tree: weights.factorize(tree, 2),
        lambda tree: weights.bipolar(tree, 2),
    ):
        with pytest.raises(ValueError, match="a/kernel: the weight is not finite"):
            store({"a": {"kernel": array(0, 8, 8).at[1, 1].set(jnp.nan)}})
        with pytest.raises(TypeError, match="a/kernel: expected a dense floating-point array, got int32"):
            store({"a": {"kernel": jnp.ones((8, 8), jnp.int32)}})
        with pytest.raises(TypeError, match="a/kernel: expected a dense floating-point array, got NMSparse"):
            store(weights.sparsify({"a": {"kernel": array(0, 8, 8)}}, "1:4"))
        with pytest.raises(ValueError, match="matches no leaf"):
            store({"a": {"bias": array(0, 8, 8)}})


@pytest.mark.parametrize(
    "change",
    [
        lambda record, tensors: record.update(view="csr"),
        lambda record, tensors: record.update(outputs=[-2]),
        lambda record, tensors: record["settings"].update(input_sizes=[500]),
        lambda record, tensors: record["settings"].update(input_sizes=[8, 2]),
        lambda record, tensors: record["settings"].update(dense_dtype="int8"),
        lambda record, tensors: record["settings"].pop("inner_sizes"),
        lambda record, tensors: record["leaves"].pop("masks"),
        lambda record, tensors: record["leaves"].update(masks=2),
        lambda record, tensors: tensors.pop("w#masks"),
        lambda record, tensors: tensors.update({"w#masks": tensors["w#masks"].astype(np.int32)}),
        lambda record, tensors: tensors.update({"w#offsets": tensors["w#offsets"][:, :0]}),
        lambda record, tensors: tensors.update({"w#more": tensors["w#offsets"]}),
    ],
)
def test_a_tampered_file_is_refused(tmp_path, change):
    path = tmp_path / "w.safetensors"
    weights.save(path, {W: stack("bitmap")})
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors, formats = load_file(path), json.loads(metadata["packed"])
    change(formats[W], tensors)
    save_file(tensors, path, metadata={**metadata, "packed": json.dumps(formats)})
    with pytest.raises(ValueError, match=r"w\.safetensors: w does not fit its recorded format"):
        weights.load(path)
