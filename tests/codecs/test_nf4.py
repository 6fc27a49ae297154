"""NF4 and its nested scales against bitsandbytes' rules written out in numpy."""

import hashlib
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs
from memjax.codecs.nf4 import DYNAMIC_MAP, LEVELS, second_blocks
from tests import bitsandbytes_reference as reference
from tests.random_views import array


def weight(rows, columns, seed=0):
    """A weight [out, in] whose blocks differ in size; one block of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns // 64, 64)) * np.exp(rng.standard_normal((rows, columns // 64, 1)))
    w[0, 0] = 0
    return w.reshape(rows, columns).astype(np.float32)


def random_parts(rows, columns, seed=0):
    """Parts of a bitsandbytes weight with every byte random."""
    rng = np.random.default_rng(seed)
    groups = rows * columns // 64
    return {
        "weight": rng.integers(0, 256, (rows * columns // 2, 1), dtype=np.uint8),
        "absmax": rng.integers(0, 256, groups, dtype=np.uint8),
        "shape": (rows, columns),
        "nested_absmax": rng.random(-(-groups // 256), np.float32),
        "nested_offset": float(np.float32(1.1)),
    }


def assert_parts(found, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_levels_are_normal_quantiles():
    inverse, outer = NormalDist().inv_cdf, 0.9677083
    negative = [inverse(p) for p in np.linspace(outer, 0.5, 8)[:-1]]
    positive = [inverse(p) for p in np.linspace(outer, 0.5, 9)[:-1]]
    levels = np.sort([*positive, 0, *(-p for p in negative)])
    np.testing.assert_allclose(LEVELS, levels / levels.max(), atol=1e-7)


def test_the_dynamic_map_is_that_of_bitsandbytes_to_the_bit():
    values = [0.0, 1.0]
    for i in range(7):
        ends = np.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (ends[1:] + ends[:-1]) / 2
        values += [*middles, *-middles]
    np.testing.assert_allclose(DYNAMIC_MAP, np.sort(values), atol=7e-8)
    # of what create_dynamic_map() of bitsandbytes gives with torch 2.13 on a CPU
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(DYNAMIC_MAP.astype("<f4").tobytes()).hexdigest() == digest


@pytest.mark.parametrize(
    "shape, nested", [((128, 256), True), ((2, 16384), True), ((3, 192), True), ((3, 192), False)], ids=str
)
def test_codes_and_scales_are_those_of_bitsandbytes(shape, nested):
    w = weight(*shape)
    expected = reference.quantize(w, nested)
    packed = codecs.nf4(double=nested).encode(w.T)
    found = codecs.to_bitsandbytes(packed.transpose((1, 0)))._asdict()
    assert_parts(codecs.BitsAndBytes(**found), {name: expected[name] for name in ("weight", "absmax", "shape")})
    if nested:  # the mean's last bit depends on the order of the sum
        np.testing.assert_allclose(found["nested_absmax"], expected["nested_absmax"], rtol=3e-7)
        np.testing.assert_allclose(found["nested_offset"], expected["nested_offset"], rtol=3e-7)
    del found["block"]
    np.testing.assert_array_equal(packed.decode().T, reference.dequantize(**found))


@pytest.mark.parametrize(
    "shape, second", [((128, 256), None), ((100, 192), (1, 1)), ((3, 224 * 64), (32, 1)), ((5, 192), None)], ids=str
)
def test_any_bytes_survive_the_round_trip(shape, second):
    parts = random_parts(*shape)
    packed = codecs.from_bitsandbytes(**parts, dtype="bfloat16")
    assert packed.shape == shape and packed.dtype == jnp.bfloat16 and packed.codec.second == second
    assert all(isinstance(leaf, np.ndarray) and leaf.ndim == 2 for leaf in jax.tree.leaves(packed))
    np.testing.assert_array_equal(packed.decode("float32"), reference.dequantize(**parts))
    assert_parts(codecs.to_bitsandbytes(packed), parts)
    turned = jax.tree.map(jnp.asarray, packed).transpose((1, 0))
    assert_parts(codecs.to_bitsandbytes(turned.transpose((1, 0))), parts)
    again = jax.eval_shape(lambda: packed.codec.encode(jnp.zeros(shape), axes=-1))  # the layout can be encoded into
    assert jax.tree.structure(again) == jax.tree.structure(packed.astype("float32"))
    assert [leaf.shape for leaf in jax.tree.leaves(again)] == [leaf.shape for leaf in jax.tree.leaves(packed)]


def test_blocks_that_bitsandbytes_lacks_leave_with_decoded_scales():
    packed = codecs.nf4().encode(weight(100, 192), axes=-1)  # second-level blocks of 3 x 50 scales
    parts = codecs.to_bitsandbytes(packed)
    assert parts.nested_absmax is None and parts.absmax.dtype == np.float32
    np.testing.assert_array_equal(codecs.from_bitsandbytes(*parts).decode(), packed.decode())


@pytest.mark.parametrize(
    "shape, axes, blocks",
    [
        ((4, 128), (-2,), (4, 64)),
        ((128, 4), (-1,), (64, 4)),
        ((512, 6), (-2,), (256, 1)),
        ((224, 3), (-2,), (224, 1)),
        ((3, 100), (-2,), (3, 50)),
        ((257, 8), (-2,), (1, 8)),
        ((9, 4, 2, 64), (-3, -2), (4, 2, 32)),
        ((9, 8, 4, 4), (-3,), (8, 4, 4)),
        ((7,), (-1,), (7,)),
    ],
)
def test_second_level_blocks_divide_the_axes(shape, axes, blocks):
    assert second_blocks(shape, axes, None) == blocks


def test_errors_are_bounded_by_the_widest_gaps():
    w = weight(64, 512, seed=1)
    plain, nested = (codecs.nf4(double=double).encode(w, axes=-1) for double in (False, True))
    exact = np.asarray(plain.codec.scales(plain.scale))
    np.testing.assert_array_equal(exact, np.abs(w.reshape(64, 8, 64)).max(-1))
    half_gap = np.diff(LEVELS).max() / 2
    assert (np.abs(plain.decode() - w) <= 1.000001 * half_gap * exact.repeat(64, axis=-1)).all()
    found = np.asarray(nested.codec.scales(nested.scale))
    largest = np.asarray(nested.scale.absmax).view(np.float32).repeat(32, 0).repeat(8, 1)
    assert (np.abs(found - exact) <= 1.00001 * np.diff(DYNAMIC_MAP).max() / 2 * largest).all()
    assert (found != exact).any()
    off = np.abs(np.asarray(nested.decode()) - w)
    assert (off <= 1.000001 * half_gap * exact.repeat(64, -1) + np.abs(found - exact).repeat(64, -1) + 1e-6).all()
    assert (np.asarray(nested.decode())[0, :64] == 0).all()  # a block of zeros, though its scale is not zero


def test_bits_per_weight():
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    nested = jax.eval_shape(codecs.nf4().encode, shape)
    assert codecs.nf4().bits_per_element() == 4 + 8 / 64 + 32 / (64 * 256) == pytest.approx(4.127, abs=1e-4)
    assert nested.bits_per_element == codecs.nf4().bits_per_element() + 32 / 4096**2
    assert jax.eval_shape(codecs.nf4(double=False).encode, shape).bits_per_element == 4.5


def test_one_mean_per_matrix():
    def shapes(shape, axes):
        packed = jax.eval_shape(lambda: codecs.nf4().encode(jnp.zeros(shape), axes))
        return [leaf.shape for leaf in packed.scale]

    assert shapes((3, 128, 4), (-2,)) == [(3, 2, 4), (3, 1, 1), (3, 1, 1)]
    assert shapes((2, 64, 3, 8), (-3,)) == [(2, 1, 3, 8), (2, 1, 1, 1), (2, 1, 1, 1)]
    joint = codecs.nf4().encode(array(1, 2, 64, 8), axes=(-3, -2))
    flat = codecs.nf4().encode(array(1, 2, 64, 8).reshape(128, 8))
    for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(flat)):
        np.testing.assert_array_equal(a.reshape(b.shape), b)


def test_the_lookup_of_scales_is_done_once_per_scale():
    packed = codecs.nf4().encode(array(0, 4096, 8))
    text = jax.jit(lambda packed: packed.decode()).lower(packed).compile().as_text()
    gathers = [line.split("=")[1].split("{")[0].strip() for line in text.splitlines() if " gather(" in line]
    assert gathers and all(shape.replace(",1]", "]") in ("f32[64,8]", "f32[512]") for shape in gathers), gathers


def test_bad_input():
    parts = random_parts(4, 128)
    with pytest.raises(ValueError, match=r"whole blocks of 64, got shape \(4, 96\)"):
        codecs.from_bitsandbytes(**{**parts, "shape": (4, 96)})
    with pytest.raises(ValueError, match="expected weight of 128 uint8, got 256 uint8"):
        codecs.from_bitsandbytes(**{**parts, "shape": (2, 128)})
    with pytest.raises(ValueError, match="expected absmax of 8 float32, got 8 uint8"):
        codecs.from_bitsandbytes(parts["weight"], parts["absmax"], (4, 128))
    with pytest.raises(ValueError, match="expected nested_absmax of 1 float32, got 2"):
        codecs.from_bitsandbytes(**{**parts, "nested_absmax": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="need the nested_offset"):
        codecs.from_bitsandbytes(**{**parts, "nested_offset": None})
    with pytest.raises(ValueError, match="expected NF4 codes"):
        codecs.to_bitsandbytes(codecs.int4(64).encode(array(0, 4, 64), -1))
    with pytest.raises(ValueError, match="index the stack or transpose first"):
        codecs.to_bitsandbytes(codecs.nf4().encode(array(0, 64, 4)))
    with pytest.raises(ValueError, match="got a key for stochastic rounding"):
        codecs.nf4().encode(array(0, 64, 4), key=0)
    with pytest.raises(ValueError, match=r"second-level blocks of \(2, 3\) groups do not divide"):
        codecs.Nf4(64, True, (2, 3)).encode(array(0, 128, 4))
    for block in (0, 64.0, True, "channel"):
        with pytest.raises(ValueError, match="block must be a positive integer"):
            codecs.nf4(block)
