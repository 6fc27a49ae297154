"""RMSNorm and LayerNorm from their output: gradients, gains that are zero, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, ops
from memjax.core.views import Axes
from memjax.weights import Dense, lift
from tests.ops.checks import assert_matches, kept_beside, total_bytes, value_and_gradients
from tests.random_views import array

D, ROWS = 64, 12
BFLOAT16 = {"output": 8e-3, "input": 3e-3}


def plain_rms(x, scale, eps=1e-6, offset=0.0):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * (offset + scale)


def plain_layer(x, scale, bias, eps=1e-5):
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered**2, -1, keepdims=True) + eps) * scale + bias


def inputs(dtype=jnp.float32, bias=True):
    x = array(0, 3, ROWS // 3, D) * 2 + 0.5
    vectors = (1 + 0.3 * array(1, D), 0.3 * array(2, D))
    return (x.astype(dtype), *(v.astype(dtype) for v in vectors[: 1 + bias]))


@pytest.mark.parametrize("residual", ["output", "input", None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_and_gradients(dtype, residual):
    if dtype == jnp.float16 and residual == "output":
        with pytest.raises(ValueError, match="float16"):
            ops.rms_norm(*inputs(dtype, bias=False), residual="output")
        return
    tolerance = 2e-6 if dtype == jnp.float32 else BFLOAT16[residual or "output"]
    assert_matches(lambda x, s: ops.rms_norm(x, s, residual=residual), plain_rms, inputs(dtype, bias=False), tolerance)
    assert_matches(lambda x, s, b: ops.layer_norm(x, s, b, residual=residual), plain_layer, inputs(dtype), tolerance)


def test_eps_that_matters_and_scales_stored_from_one():
    x, scale, bias = inputs()
    x = 0.01 * x
    assert_matches(
        lambda x, s: ops.rms_norm(x, s, eps=1e-3, offset=1.0), lambda x, s: plain_rms(x, s, 1e-3, 1.0), (x, scale), 2e-6
    )
    assert_matches(
        lambda x, s, b: ops.layer_norm(x, s, b, eps=1e-3), lambda *a: plain_layer(*a, 1e-3), (x, scale, bias), 2e-5
    )


@pytest.mark.parametrize(
    "gain, dtype, tolerance",
    [(0.0, jnp.float32, 2e-6), (0.0, jnp.bfloat16, 8e-3), (1e-30, jnp.float32, 2e-6), (-1e-5, jnp.bfloat16, 8e-3)],
)
def test_gains_that_are_zero_or_nearly_so(gain, dtype, tolerance):
    x, scale, bias = inputs(dtype)
    some, every = scale.at[::5].set(gain), jnp.full_like(scale, gain)
    for small in (some, every):
        assert_matches(ops.rms_norm, plain_rms, (x, small), tolerance)
        y = ops.rms_norm(x, small)
        assert jnp.max(jnp.abs(y - plain_rms(x.astype(jnp.float32), small.astype(jnp.float32)))) < 2e-2
        assert gain or jnp.max(jnp.abs(y[..., 0])) < 1e-18
        no_bias = jnp.where(small == jnp.asarray(gain, dtype), 0, bias).astype(dtype)
        assert_matches(ops.layer_norm, plain_layer, (x, small, no_bias), tolerance)
    few = scale.at[jnp.asarray([0, 7, 63])].set(gain)  # their bias hides what the output knew
    assert_matches(ops.layer_norm, plain_layer, (x, few, bias), tolerance)


def test_lost_channels_make_gradients_nan_unless_there_is_room_for_them():
    x, scale, bias = inputs()
    lost = scale.at[:9].set(0)

    def gradients(**settings):
        y = array(3, *x.shape)
        return value_and_gradients(lambda *a: ops.layer_norm(*a, **settings), (x, lost, bias), y)[1:]

    dx, d_scale, d_bias = gradients()
    assert jnp.isnan(dx).all() and jnp.isnan(d_scale).all() and jnp.isfinite(d_bias).all()
    for settings in ({"spare": 9}, {"spare": D + 5}, {"residual": "input"}):
        assert_matches(lambda *a, s=settings: ops.layer_norm(*a, **s), plain_layer, (x, lost, bias), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_shares_the_output_with_the_product_that_follows(dtype):
    x, scale, bias = inputs(dtype)
    w = array(4, D, 8, dtype=dtype)
    for norm, vectors, extra in (
        (ops.rms_norm, (scale,), 0),
        (ops.layer_norm, (scale, bias), 8 * ROWS * x.dtype.itemsize + 8 * 4 + 4),
    ):
        args = (x, *vectors)
        y, kept = kept_beside(norm, args)
        assert sum(leaf is y for leaf in kept) == 1
        assert total_bytes(kept) == y.nbytes + 4 * ROWS + extra
        _, with_product = kept_beside(lambda x, w, *v, norm=norm: norm(x, *v) @ w, (x, w, *vectors))
        assert total_bytes(with_product) == total_bytes(kept)
        _, from_input = kept_beside(lambda *a, norm=norm: norm(*a, residual="input"), args)
        assert total_bytes(from_input) == 4 * ROWS * (1 + bool(extra))


def test_codes_of_the_normalised_value():
    x, scale, bias = inputs()
    exact = value_and_gradients(ops.layer_norm, (x, scale, bias), x)
    errors = []
    for codec in (codecs.int8(group=32), codecs.int4(group=32), codecs.int2(group=32)):
        for norm, vectors in ((ops.rms_norm, (scale,)), (ops.layer_norm, (scale, bias))):
            fn = lambda *a, norm=norm, codec=codec: norm(*a, residual=codec)  # noqa: E731
            y, kept = kept_beside(fn, (x, *vectors))
            assert (y == norm(x, *vectors)).all()
            assert total_bytes(kept) == ROWS * 4 + x.size * codec.bits_per_element() / 8
        found = value_and_gradients(fn, (x, scale, bias), x)
        np.testing.assert_array_equal(found[3], exact[3])
        errors.append([float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found[1:3], exact[1:3])])
    assert max(errors[0]) < 0.03 and max(errors[1]) < 0.4 and errors[0] < errors[1] < errors[2]


def test_gains_that_are_weight_views():
    x, scale, bias = inputs()

    def norms(params, x):
        y = ops.layer_norm(x, params["scale"].reshape(-1), params["bias"].reshape(-1))
        return ops.rms_norm(y, params["scale"].reshape(-1))

    dense = {"scale": scale[None], "bias": bias[None]}

    def through_views(params, x):
        return lift(norms)({name: Dense(w, Axes()) for name, w in params.items()}, x)

    expected = jax.vjp(norms, dense, x)
    actual = jax.jit(lambda p, x, dy: (through_views(p, x), jax.vjp(through_views, p, x)[1](dy)))(dense, x, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), actual, (expected[0], expected[1](x)))


def test_arguments_that_do_not_fit():
    x, scale, bias = inputs()
    with pytest.raises(ValueError, match=r"scale must be \[D\]"):
        ops.rms_norm(x, scale[:-1])
    with pytest.raises(ValueError, match=r"bias must be \[D\]"):
        ops.layer_norm(x, scale, bias[None])
    with pytest.raises(ValueError, match="residual must be"):
        ops.rms_norm(x, scale, residual="none")
    with pytest.raises(ValueError, match="spare=-1"):
        ops.layer_norm(x, scale, bias, spare=-1)
    with pytest.raises(ValueError, match="groups of 48 do not divide"):
        jax.grad(lambda x: ops.rms_norm(x, scale, residual=codecs.int4(group=48)).sum())(x)
