"""Integer products: exact sums, quantized activations, and the plan of which inputs need 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, weights
from memjax.core.views import Axes, make_axes
from memjax.weights import IntegerWeight, lift
from memjax.weights.integer import quantize_rows
from tests.random_views import array, assert_close


def integers(seed, low, high, *shape):
    return np.random.default_rng(seed).integers(low, high + 1, shape)


product = jax.jit(lift(lambda w, x: x @ w))


@pytest.mark.parametrize("bits, top", [(8, 127), (6, 31)])
def test_integers_multiply_exactly(bits, top):
    w, x = integers(0, -31, 31, 2, 256, 5), integers(1, -top, top, 2, 3, 256)
    w[:, ::128], x[..., ::128] = -32, top  # every group's scale is 1, for weights and inputs
    packed = codecs.int6(group=128).encode(jnp.asarray(w, jnp.float32), -2)
    view = IntegerWeight(packed, Axes(), bits)
    expected = x.astype(np.int64) @ w.astype(np.int64)
    np.testing.assert_array_equal(product(view, jnp.asarray(x, jnp.float32)), expected)


@pytest.mark.parametrize("codec", [codecs.int6(group=8), codecs.q8_0()])
def test_it_is_the_sum_over_groups_of_scaled_integer_sums(codec):
    axes = make_axes((2, 0), 1, 3)
    w, x = array(0, 32, 5, 2), array(1, 3, 2, 32) * jnp.exp(array(2, 3, 1, 1))
    group = 32
    view = IntegerWeight(codec.encode(w, axes.inputs), axes, 6, group)
    codes, scale = quantize_rows(x.reshape(3, 64), 6, group)
    assert codes.shape == (3, 2, group) and scale.shape == (3, 2)
    assert int(codes.min()) >= -31 and int(codes.max()) <= 32
    seen = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)[..., None]
    assert np.abs(seen.reshape(x.shape) - x).max() <= np.asarray(scale).max() / 2 * 1.001
    dense = np.asarray(view.materialize(), np.float64).transpose(2, 0, 1).reshape(64, 5)
    y = jax.jit(lift(lambda w, x: jnp.einsum("thk,knh->tn", x, w)))(view, x)
    assert_close(y, seen.reshape(3, 64) @ dense)


def test_rows_are_quantized_alone_and_zeros_stay_zero():
    w, x = array(0, 16, 4), array(1, 3, 16).at[1].set(0)
    view = IntegerWeight(codecs.int8(group=16).encode(w), Axes(), 8, 16)
    together = product(view, x)
    assert_close(together[:2], product(view, x.at[2].mul(100))[:2], 0)
    assert not np.any(together[1])
    assert_close(together, x @ w, 0.02)


def test_dtypes_and_the_transpose():
    w = array(0, 16, 16, dtype=jnp.bfloat16)
    view = IntegerWeight(codecs.int8(group=8).encode(w), Axes(), 8, 8)
    x = array(1, 3, 16, dtype=jnp.bfloat16)

    def program(w, x):
        into = jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return into, x @ w, x.astype(jnp.float32) @ w.astype(jnp.float32), x @ w.T

    found, dense = jax.jit(lift(program))(view, x), jax.jit(program)(view.materialize(), x)
    assert [y.dtype for y in found] == [y.dtype for y in dense]
    assert_close(found[:3], dense[:3], 0.02)
    assert_close(found[3], dense[3], 0.01)


def test_no_product_of_all_groups_is_alive_at_once():
    view = IntegerWeight(codecs.int4(group=8).encode(array(0, 64, 16)), Axes(), 8, 64)
    jaxpr = str(jax.make_jaxpr(lift(lambda w, x: x @ w))(view, array(1, 32, 64)))
    assert "i32[32,16]" in jaxpr and "i32[8,32,16]" not in jaxpr and "f32[64,16]" not in jaxpr


@pytest.mark.parametrize(
    "settings, message",
    [
        ((codecs.int8(group=8, symmetric=False), -2, 8, 8), "symmetric integer codes"),
        ((codecs.nf4(block=8), -2, 8, 8), "symmetric integer codes"),
        ((codecs.int8(group=8), -1, 8, 8), "do not run along the inputs"),
        ((codecs.int8(group=8), -2, 9, 8), "activation_bits must be 2 to 8, got 9"),
        ((codecs.int8(group=8), -2, 8, 4), "activation groups of 4 must divide"),
        ((codecs.int8(group=8), -2, 8, 128), "activation groups of 128 must divide"),
    ],
)
def test_codes_and_groups_that_do_not_fit_are_refused(settings, message):
    codec, group_axis, bits, group = settings
    view = IntegerWeight(codec.encode(array(0, 16, 16), group_axis), Axes(), bits, group)
    with pytest.raises(ValueError, match=message):
        lift(lambda w, x: x @ w)(view, array(1, 2, 16))


def model():
    names = ("q_proj", "up_proj", "down_proj")
    return {name: {"kernel": array(i, 32, 32)} for i, name in enumerate(names)}


def test_the_plan_as_released_and_its_use():
    tree = model()
    plan = weights.flexq(tree, group=16)
    assert {path: (p.bits, p.group) for path, p in plan.items()} == {
        "q_proj/kernel": (6, 16),
        "up_proj/kernel": (6, 16),
        "down_proj/kernel": (8, 16),
    }
    other = weights.flexq(tree, "{q,up}_proj/kernel", wide="q_proj/**", group=16)
    assert {path: p.bits for path, p in other.items()} == {"q_proj/kernel": 8, "up_proj/kernel": 6}
    used = weights.integer_activations(weights.quantize(tree, codecs.int6(group=16)), plan)
    assert used["down_proj"]["kernel"].activation_bits == 8
    assert used["q_proj"]["kernel"].nbytes * 8 / 1024 == 7
    x = array(9, 64, 32)
    errors = [float(jnp.linalg.norm(product(used[name]["kernel"], x) - x @ tree[name]["kernel"])) for name in tree]
    assert errors[2] < 0.9 * min(errors[:2])


def test_the_measured_plans():
    tree = model()
    tree["up_proj"]["kernel"] = tree["up_proj"]["kernel"].at[::8].mul(20.0)  # outliers coarsen the scales of a group
    x = array(9, 64, 32)
    by_weight = weights.flexq(tree, tolerance=0.03, group=16)
    assert max(by_weight, key=lambda path: by_weight[path].error) == "up_proj/kernel"
    inputs = {path: x for path in by_weight} | {"q_proj/kernel": x.at[:, 3].mul(50.0)}
    measured = weights.flexq(tree, tolerance=0.05, inputs=inputs, group=16)
    view = IntegerWeight(codecs.int6(group=16).encode(tree["down_proj"]["kernel"]), Axes(), 6, 16)
    exact = x @ tree["down_proj"]["kernel"]
    expected = jnp.linalg.norm(product(view, x) - exact) / jnp.linalg.norm(exact)
    assert measured["down_proj/kernel"].error == pytest.approx(float(expected), rel=1e-3)
    for plan in (by_weight, measured):
        assert all((p.bits == 8) == (p.error > (0.03 if plan is by_weight else 0.05)) for p in plan.values())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: weights.flexq(t, "nothing"), "matches no leaf"),
        (lambda t: weights.flexq(t, wide="nothing"), "matches no leaf"),
        (lambda t: weights.flexq(t, inputs={}), "without the tolerance"),
        (lambda t: weights.flexq(t, inputs={}, tolerance=0.1, group=16), "down_proj/kernel: no calibration inputs"),
        (lambda t: weights.flexq(t, wide="**", tolerance=0.1), "either wide= or tolerance="),
        (
            lambda t: weights.integer_activations(t, {"x": weights.ActivationQuant(8, 16)}),
            r"\['x'\], which are no leaves",
        ),
    ],
)
def test_plans_that_cannot_be_made_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(model())


def test_a_plan_needs_packed_weights_whose_groups_fit():
    tree, plan = model(), {"q_proj/kernel": weights.ActivationQuant(8, 12)}
    with pytest.raises(TypeError, match="q_proj/kernel: expected a packed weight"):
        weights.integer_activations(tree, plan)
    with pytest.raises(ValueError, match="q_proj/kernel: activation groups of 12"):
        weights.integer_activations(weights.quantize(tree, codecs.int6(group=16)), plan)
