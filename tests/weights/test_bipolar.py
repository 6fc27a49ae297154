"""Bit planes of bipolar integers: three products that are the same integers, and weights stored so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, weights
from memjax.core.views import Axes
from memjax.weights import lift
from memjax.weights.bipolar import and_product, codes_of, encode, int8_product, planes_of, xor_product
from tests.random_views import array, assert_close

K, T, N = 70, 3, 5  # K fills two words and a part of a third
CODES = np.random.default_rng(0).integers(0, 256, (K, T + N)).astype(np.uint8)


@pytest.mark.parametrize(
    "n, p",
    [
        pytest.param(n, p, marks=[] if (n, p) in {(1, 2), (8, 8), (3, 5)} else [pytest.mark.slow])
        for n in range(1, 9)
        for p in range(1, 9)
    ],
)
def test_every_form_is_the_product_of_the_integers(n, p):
    x, w = CODES[:, :T].T & (2**p - 1), CODES[:, T:] & (2**n - 1)
    odd = [2 * codes.astype(np.int64) - (2**bits - 1) for codes, bits in ((x, p), (w, n))]
    expected = odd[0] @ odd[1]
    xs, ws = planes_of(jnp.asarray(x.T), p), planes_of(jnp.asarray(w), n)
    assert (xs.shape, ws.shape) == ((p, 3, T), (n, 3, N))
    np.testing.assert_array_equal(codes_of(ws, K), w)
    np.testing.assert_array_equal(jax.jit(xor_product, static_argnums=2)(xs, ws, K), expected)
    np.testing.assert_array_equal(jax.jit(and_product, static_argnums=2)(xs, ws, K), expected)
    np.testing.assert_array_equal(int8_product(jnp.asarray(x), jnp.asarray(w), (p, n)), expected)


def test_sums_that_int32_cannot_hold_are_refused():
    ones = jnp.full((8, 1100, 1), 2**32 - 1, jnp.uint32)
    assert int(xor_product(ones, ones, 33024)[0, 0]) == 33024 * 255**2  # all bits of 1032 words count
    with pytest.raises(ValueError, match="33026 products of 8 and 8 bits may exceed int32"):
        xor_product(ones, ones, 33026)
    with pytest.raises(ValueError, match="w: a sum of 40000 products"):
        weights.bipolar({"w": jnp.ones((40000, 1))}, 8, 8, "w")
    assert weights.bipolar({"w": jnp.ones((40000, 1))}, 8, 8, "w", group=20000)["w"].group == 20000


def test_planes_hold_every_bit_of_words():
    codes = np.arange(64, dtype=np.uint8)[:, None] % 8
    planes = np.asarray(planes_of(jnp.asarray(codes), 3))
    bits = [sum(int(code >> plane & 1) << k for k, code in enumerate(codes[:32, 0])) for plane in range(3)]
    assert planes[:, 0, 0].tolist() == bits


@pytest.mark.parametrize("bits, group", [(1, None), (4, 35)])
def test_weights_are_those_of_the_codec(bits, group):
    w = array(0, 2, K, N)
    view = encode(w, Axes(), bits, None, group)
    packed = codecs.bipolar(bits, "channel")
    grouped = w.reshape(2, -1, group or K, N)
    padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, -(group or K) % 8), (0, 0)))  # its codes fill bytes
    if bits > 1:
        expected = packed.encode(padded, -2).decode()[:, :, : group or K].reshape(w.shape)
        assert_close(view.materialize(), expected, 0)
    else:
        assert_close(view.materialize(), jnp.where(w < 0, -1, 1) * jnp.mean(jnp.abs(w), 1, keepdims=True), 2**-8)
    assert view.nbytes == 2 * (K // view.group) * N * (4 * bits * -(-view.group // 32) + 2)


@pytest.mark.parametrize("bits", [1, 8])
def test_inputs_are_quantized_by_row_and_group(bits):
    w, x = array(0, K, N), array(1, T, K).at[1].set(0)
    view = weights.bipolar({"w": w}, 4, bits, "w", group=35)["w"]
    size = np.abs(np.asarray(x, np.float64).reshape(T, 2, 35))
    top = 2**bits - 1
    scale = (size.mean(-1, keepdims=True) if bits == 1 else size.max(-1, keepdims=True) / top) + 1e-30
    codes = np.clip(np.round((np.asarray(x).reshape(T, 2, 35) / scale + top) / 2), 0, top)
    seen = ((2 * codes - top) * scale).reshape(T, K)
    y = jax.jit(lift(lambda w, x: x @ w))(view, x)
    assert_close(y, seen @ np.asarray(view.materialize(), np.float64), 2e-6)
    assert not np.any(y[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, None), "kernel: bits must be 1 to 8, got 0"),
        ((9, None), "kernel: bits must be 1 to 8, got 9"),
        ((4, 9), "kernel: activation_bits must be 1 to 8, got 9"),
        ((4, 8, "**/kernel"), "kernel: groups of 9 do not divide the 32 inputs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        weights.bipolar({"kernel": array(0, 32, 4)}, *arguments, group=9 if len(arguments) == 3 else None)
