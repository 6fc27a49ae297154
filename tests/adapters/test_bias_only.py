"""Bias-only training: which leaves move, and that no input of a frozen product is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memjax import adapters, codecs, weights
from memjax.weights import lift
from tests.random_views import array, assert_close

T, D, F = 5, 8, 12


def params():
    return {
        "up": {"kernel": array(0, D, F), "bias": array(1, F)},
        "norm": {"scale": array(2, F)},
        "down": {"kernel": array(3, F, D)},
    }


def model(p, x):
    h = (x @ p["up"]["kernel"] + p["up"]["bias"]) * p["norm"]["scale"]
    return h @ p["down"]["kernel"]


def test_vectors_are_shifted_and_kernels_get_a_bias():
    adapter = adapters.bias_only(targets=["**/bias", "norm/scale"], kernels="down/kernel")
    theta = adapter.init(jax.random.key(0), params())
    shapes = {path: {n: v.shape for n, v in factors.items()} for path, factors in theta.items()}
    assert shapes == {
        "up/bias": {"shift": (F,)},
        "norm/scale": {"shift": (F,)},
        "down/kernel": {"bias": (D,)},
    }
    theta = {path: {n: array(9, *v.shape) for n, v in factors.items()} for path, factors in theta.items()}
    x = array(4, T, D)
    bias, scale = (params()[a][b] + theta[f"{a}/{b}"]["shift"] for a, b in (("up", "bias"), ("norm", "scale")))
    expected = (x @ params()["up"]["kernel"] + bias) * scale @ params()["down"]["kernel"] + theta["down/kernel"]["bias"]
    assert_close(lift(model)(adapter.attach(params(), theta), x), expected)
    del theta["down/kernel"]
    merged, report = adapter.merge(params(), theta)
    assert report == {}
    np.testing.assert_array_equal(merged["up"]["bias"], bias)


@pytest.mark.parametrize("packed", [False, True])
def test_no_input_of_a_frozen_product_is_kept(packed):
    frozen = weights.quantize(params(), codecs.int4(group=4)) if packed else params()
    adapter = adapters.bias_only(kernels="down/kernel")
    theta = adapter.init(jax.random.key(0), frozen)
    x = array(4, T, D)

    def kept(adapter, theta):
        back = jax.vjp(lambda theta: lift(model)(adapter.attach(frozen, theta), 2 * x), theta)[1]
        return [leaf.shape for leaf in jax.tree.leaves(back)]

    assert not {(T, D), (T, F)} & set(kept(adapter, theta))
    lora = adapters.lora(rank=2)
    assert {(T, D), (T, F)} <= set(kept(lora, lora.init(jax.random.key(0), frozen)))


def test_lookups_convolutions_and_heads():
    adapter = adapters.bias_only(targets=(), kernels="w", axes={"w": (0, (2, 1))})
    frozen, theta = {"w": array(0, 8, 2, 3)}, {"w": {"bias": array(1, 3, 2)}}
    view, x = adapter.attach(frozen, theta), array(2, 4, 8)
    y = lift(lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]))(view, x)
    assert_close(y, jnp.einsum("bd,dhk->bhk", x, frozen["w"]) + theta["w"]["bias"].T)
    rows = lift(lambda p, i: p["w"][i])(view, jnp.array([1, 7]))
    assert_close(rows, frozen["w"][jnp.array([1, 7])] + theta["w"]["bias"].T)
    with pytest.raises(ValueError, match="multiplied along its outputs, which has no meaning"):
        lift(lambda p, x: jnp.einsum("bhk,dhk->bd", x, p["w"]))(view, array(3, 4, 2, 3))

    conv = adapters.bias_only(targets=(), kernels="w", axes={"w": ((0, 1, 2), 3)})
    frozen, theta = {"w": array(0, 3, 3, 2, 5)}, {"w": {"bias": array(1, 5)}}

    def convolve(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = array(2, 1, 4, 4, 2)
    assert_close(lift(convolve)(conv.attach(frozen, theta), x), convolve(frozen, x) + theta["w"]["bias"])


def test_settings_that_do_not_fit_raise():
    def init(**settings):
        return adapters.bias_only(**settings).init(jax.random.key(0), weights.quantize(params(), codecs.int4(group=4)))

    with pytest.raises(ValueError, match="there is nothing to train"):
        init(targets=())
    with pytest.raises(ValueError, match="up/kernel: the kernel has a bias, up/bias; name it in targets"):
        init(targets="norm/scale", kernels="**/kernel")
    assert set(init(kernels="**/kernel")) == {"up/bias", "down/kernel"}
    with pytest.raises(ValueError, match="up/kernel: expected an array to add to, got PackedWeight; see kernels="):
        init(targets="up/kernel")
    adapter = adapters.bias_only()
    with pytest.raises(ValueError, match=r"up/bias: expected a shift of shape \(12,\), got \(3,\)"):
        adapter.attach(params(), {"up/bias": {"shift": jnp.zeros(3)}})
