"""Packing the weights of a tree, and the tree code that knows views."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from memjax import codecs, weights
from memjax.core.paths import leaf_paths
from memjax.core.views import Axes
from tests.random_views import array, view

CODEC = codecs.int4(group=8)


def params():
    return {
        "embed": {"embedding": array(0, 10, 16)},
        "layers": {"up": {"kernel": array(1, 3, 16, 8), "bias": array(2, 3, 8)}},
        "head": {"kernel": array(3, 16, 10)},
        "step": jnp.arange(4).reshape(2, 2),
    }


def test_quantize_packs_what_is_selected_and_nothing_else():
    dense = params()
    packed = weights.quantize(dense, CODEC)
    assert [path for path, leaf in weights_of(packed)] == ["head/kernel", "layers/up/kernel"]
    assert packed["embed"]["embedding"] is dense["embed"]["embedding"]
    kernel = packed["layers"]["up"]["kernel"]
    assert (kernel.shape, kernel.dtype, kernel.axes, kernel.batch_ndim) == ((3, 16, 8), jnp.float32, Axes(), 1)
    one = weights.quantize({"kernel": dense["layers"]["up"]["kernel"][1]}, CODEC)["kernel"]
    np.testing.assert_array_equal(kernel.materialize()[1], one.materialize())  # groups stay within a slice
    by_predicate = weights.quantize(dense, CODEC, where=lambda path, leaf: leaf.ndim == 3)
    assert [path for path, _ in weights_of(by_predicate)] == ["layers/up/kernel"]


def test_codecs_by_pattern():
    packed = weights.quantize(params(), {"head/*": codecs.nf4(block=8), "**/kernel": codecs.int2(group=8)})
    assert {path: leaf.packed.codec for path, leaf in weights_of(packed)} == {
        "head/kernel": codecs.nf4(block=8),
        "layers/up/kernel": codecs.int2(group=8),
    }
    some = weights.quantize(params(), {"**/kernel": CODEC}, where="head/*")
    assert [path for path, _ in weights_of(some)] == ["head/kernel"]
    for table, where, message in (
        ({"**/kernel": CODEC, "tail/*": CODEC}, None, r"pattern 'tail/\*' matches no leaf"),
        ({"head/*": CODEC}, "**/kernel", "layers/up/kernel: no pattern of the codecs matches"),
        ({"head/*": CODEC, "layers/**": CODEC}, "head/*", r"'layers/\*\*' of the codecs matches no selected leaf"),
        ({}, None, "at least one pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.quantize(params(), table, where)
    with pytest.raises(TypeError, match=r"expected a codec such as .*, got 'int4'"):
        weights.quantize(params(), {"**/kernel": "int4"})


def weights_of(tree):
    return [(path, leaf) for path, leaf in leaf_paths(tree) if weights.is_view(leaf)]


def test_axes_tables_choose_the_group_axes():
    tree = {"q": {"kernel": array(0, 8, 2, 4)}, "o": {"kernel": array(1, 2, 4, 8)}}
    packed = weights.quantize(tree, codecs.int4(group=4), axes={"q/*": (0, (1, 2)), "o/*": ((0, 1), 2)})
    assert packed["q"]["kernel"].axes == Axes((-3,), (-2, -1))
    assert packed["o"]["kernel"].packed.axes == (-3, -2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"where": "**/scale"}, ValueError, r"pattern '\*\*/scale' matches no leaf"),
        ({"codec": codecs.int4(group=10)}, ValueError, "head/kernel: groups of 10 do not divide"),
        ({"where": "step"}, TypeError, "step: expected a floating-point array to encode, got int32"),
        ({"where": "**/bias", "codec": codecs.int8(group="channel")}, None, ""),
        ({"axes": {"nothing": (0, 1)}}, ValueError, "pattern 'nothing' matches no leaf"),
        ({"axes": {"head/kernel": (0, 0)}}, ValueError, "head/kernel: input and output axes must be distinct"),
        ({"axes": {"head/kernel": (0, 5)}}, ValueError, "head/kernel: axis 5 is out of range"),
    ],
)
def test_bad_input_names_the_leaf(change, error, message):
    settings = {"codec": CODEC, **change}
    if error is None:
        with pytest.raises(ValueError, match="layers/up/bias"):
            weights.quantize({"layers": {"up": {"bias": array(0, 8)}}}, **settings)
        return
    with pytest.raises(error, match=message):
        weights.quantize(params(), **settings)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_refused(bad):
    tree = params()
    tree["head"]["kernel"] = tree["head"]["kernel"].at[3, 3].set(bad)
    with pytest.raises(ValueError, match=r"head/kernel: .*cannot encode NaN or infinity"):
        weights.quantize(tree, CODEC)


def test_a_view_is_not_quantized_again():
    packed = weights.quantize(params(), CODEC)
    with pytest.raises(TypeError, match="head/kernel: expected a dense array to quantize, got PackedWeight"):
        weights.quantize(packed, CODEC)


def test_a_flax_state_is_packed_in_place_and_splits_and_merges():
    graph, state = nnx.split(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    packed = weights.quantize(state, CODEC)
    assert weights.is_view(packed["kernel"].get_value())
    again = jax.tree.unflatten(jax.tree.structure(packed), jax.tree.leaves(packed))
    y = weights.lift(lambda state, x: nnx.merge(graph, state)(x))(again, jnp.ones((2, 16)))
    dense = nnx.merge(graph, weights.materialize(packed))(jnp.ones((2, 16)))
    np.testing.assert_allclose(y, dense, rtol=2e-6)


def test_astype_casts_dense_leaves_and_what_views_stand_for_but_no_code():
    packed = weights.quantize(params(), CODEC)
    half = weights.astype(packed, jnp.bfloat16)
    assert half["embed"]["embedding"].dtype == half["head"]["kernel"].dtype == jnp.bfloat16
    assert half["step"].dtype == jnp.int32
    for a, b in zip(jax.tree.leaves(half["head"]), jax.tree.leaves(packed["head"])):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        half["head"]["kernel"].materialize(), packed["head"]["kernel"].materialize().astype(jnp.bfloat16)
    )
    adapted = weights.astype({"kernel": view("lora on dense", array(0, 8, 8))}, jnp.bfloat16)["kernel"]
    assert adapted.dtype == jnp.bfloat16 and adapted.deltas[0].a.dtype == jnp.float32


def test_report():
    dense = params()
    packed = weights.quantize(dense, CODEC)
    report = weights.report(dense, packed)
    assert [row.path for row in report.leaves] == sorted(
        ["head/kernel", "layers/up/kernel"], key=lambda p: -row_of(report, p).relative_frobenius
    )
    row = row_of(report, "layers/up/kernel")
    w, v = np.asarray(dense["layers"]["up"]["kernel"]), np.asarray(packed["layers"]["up"]["kernel"].materialize())
    assert row.max_abs == pytest.approx(np.abs(w - v).max(), rel=1e-5)
    assert row.relative_frobenius == pytest.approx(np.linalg.norm(w - v) / np.linalg.norm(w), rel=1e-5)
    assert row.bits_per_weight == 4 + 16 / 8 and row.nbytes == 3 * 16 * 8 * 6 // 8
    assert (report.dense_bytes, report.packed_bytes) == (weights.nbytes(dense), weights.nbytes(packed))
    assert "layers/up/kernel" in str(report) and f"{report.packed_bytes:,}" in str(report)
    with pytest.raises(ValueError, match="embed/embedding"):
        weights.report({"head": dense["head"]}, packed)


@pytest.mark.parametrize(
    "codec, bits",
    [
        (codecs.nf4(block=8), 4 + 8 / 8 + (32 + 32) / (16 * 8)),
        (codecs.fp8(), 8 + 16 / 16),
        (codecs.bipolar(3, 8), 3 + 16 / 8),
        (codecs.int6(16, symmetric=False), 6 + 32 / 16),
    ],
    ids=str,
)
def test_report_counts_every_bit(codec, bits):
    report = weights.report(params(), weights.quantize(params(), codec))
    assert row_of(report, "layers/up/kernel").bits_per_weight == bits


def row_of(report, path):
    return next(row for row in report.leaves if row.path == path)


# ---- infer_axes ---------------------------------------------------------------------------------------------------


def attention(params, tokens):
    x = params["embed"]["embedding"][tokens]

    def layer(x, p):
        q = jnp.einsum("bsd,dhk->bhsk", x, p["q"]["kernel"]) + p["q"]["bias"][:, None]
        return x + jnp.einsum("bhsk,hkd->bsd", q, p["o"]["kernel"]), None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    image = lax.conv_general_dilated(
        x[:, None], params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return image[:, 0] @ params["embed"]["embedding"].T


def attention_params():
    shapes = {
        "embed": {"embedding": (10, 8)},
        "layers": {"q": {"kernel": (3, 8, 2, 4), "bias": (3, 2, 4)}, "o": {"kernel": (3, 2, 4, 8)}},
        "conv": {"kernel": (1, 3, 8, 8)},
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


@pytest.mark.smoke
def test_infer_axes_reads_products_lookups_and_convolutions():
    assert weights.infer_axes(attention, attention_params(), jnp.zeros((2, 5), jnp.int32)) == {
        "embed/embedding": Axes((-2,), (-1,)),
        "layers/q/kernel": Axes((-3,), (-2, -1)),
        "layers/o/kernel": Axes((-3, -2), (-1,)),
        "conv/kernel": Axes((-4, -3, -2), (-1,)),
    }


def test_infer_axes_of_flax_attention():
    expected = {name: Axes((-3,), (-2, -1)) for name in ("query/kernel", "key/kernel", "value/kernel")}
    expected["out/kernel"] = Axes((-3, -2), (-1,))
    x = jnp.zeros((2, 5, 8))
    linen = nn.MultiHeadDotProductAttention(num_heads=2)
    tree = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    assert weights.infer_axes(lambda p, x: linen.apply({"params": p}, x), tree, x) == expected
    graph, state = nnx.split(nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False))
    assert weights.infer_axes(lambda state, x: nnx.merge(graph, state)(x), state, x) == expected


def test_infer_axes_sees_through_custom_derivatives():
    @jax.custom_vjp
    def product(w, x):
        return x @ w.T

    product.defvjp(lambda w, x: (product(w, x), None), lambda _, g: (g, g))
    assert weights.infer_axes(lambda p, x: product(p["w"], x), {"w": array(0, 8, 4)}, array(1, 2, 4)) == {
        "w": Axes((-1,), (-2,))
    }


def test_infer_axes_refuses_conflicting_use():
    def two_ways(p, x):
        return jnp.einsum("bd,dhk->bhk", x, p["w"]) + jnp.einsum("bdk,dhk->bdh", x[..., None] * x[:, None], p["w"])

    with pytest.raises(ValueError, match="w: the function contracts this weight along different axes"):
        weights.infer_axes(two_ways, {"w": array(0, 2, 2, 2)}, array(2, 2, 2))
    there_and_back = weights.infer_axes(lambda p, x: x @ p["w"] @ p["w"].T, {"w": array(0, 8, 4)}, array(1, 2, 8))
    assert there_and_back == {"w": Axes((-2,), (-1,))}
    tied = {"w": array(0, 8, 4)}
    assert weights.infer_axes(lambda p, i: p["w"][i] @ p["w"].T, tied, jnp.arange(3)) == {"w": Axes((-2,), (-1,))}


def test_views_outside_lift_say_so():
    x = jnp.ones((2, 16))
    for use in (lambda w: x @ w, lambda w: w @ x, lambda w: w[0], lambda w: w * 2, lambda w: x + w):
        with pytest.raises(TypeError, match=r"PackedWeight of shape \(16, 8\) is a weight view.*memjax.lift"):
            use(weights.quantize({"kernel": array(0, 16, 8)}, CODEC)["kernel"])


def test_a_codec_by_name_and_a_function_without_weights_are_refused():
    with pytest.raises(TypeError, match="expected a codec such as"):
        weights.quantize(params(), "int4")
    with pytest.raises(ValueError, match="contracts no leaf of its first argument"):
        weights.infer_axes(lambda params, x: x, params(), jnp.ones(3))
