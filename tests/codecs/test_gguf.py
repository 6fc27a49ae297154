"""Q4_0, Q4_1 and Q8_0 bit for bit against the `gguf` package."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs

KINDS = ["Q4_0", "Q4_1", "Q8_0"]


def reference(name):
    return getattr(gguf.GGMLQuantizationType, name)


def codec_of(kind):
    return getattr(codecs, kind.lower())()


def cases():
    """Arrays of one shape, so that each format compiles once."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 64)).astype(np.float32)
    rows, columns = np.indices(x.shape)
    made = {
        "normal": x,
        "scales": np.clip(x * np.exp(rng.standard_normal((256, 1)) * 3), -3e4, 3e4),
        "zeros": np.zeros_like(x),
        "negative zeros": -np.zeros_like(x),
        "constants": np.float32([3.3, -3.3, 1e-3, 7])[rows % 4],
        "outliers": np.where(rows % 64 == columns, 1e4, x),
        "ties": rng.integers(-20, 21, x.shape) / 2,
        "half steps": rng.integers(-16, 17, x.shape) / 16 * x[:, :1],
        "opposite extremes": np.where(columns % 2, 1, -1) * np.where(rows % 2, 2.7, -2.7),
        "subnormal float16 scales": x * 1e-5,
        "scales that round to zero": x * 1e-9,
        "positive": np.abs(x) + 5,
        "integers": rng.integers(-128, 128, x.shape),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


@functools.cache
def traced_encode(kind):
    return jax.jit(lambda x: codec_of(kind).encode(x * 1, axes=-1))


@functools.cache
def traced_decode(_):
    return jax.jit(lambda packed: packed.decode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", cases())
def test_encode_is_bit_exact(kind, name):
    x = cases()[name]
    packed = codec_of(kind).encode(x, axes=-1)
    np.testing.assert_array_equal(codecs.to_gguf(packed), gguf.quants.quantize(x, reference(kind)))
    assert_same(packed, traced_encode(kind)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_encode_is_bit_exact_on_many_blocks(kind):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((4096, 256)) * np.exp(rng.standard_normal((4096, 1)))).astype(np.float32)
    packed = codec_of(kind).encode(x, axes=-1)
    np.testing.assert_array_equal(codecs.to_gguf(packed), gguf.quants.quantize(x, reference(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", cases())
def test_decode_is_bit_exact(kind, name):
    x = cases()[name]
    raw = gguf.quants.quantize(x, reference(kind))
    packed = codecs.from_gguf(kind, raw, x.shape)
    expected = gguf.quants.dequantize(raw, reference(kind))
    for decoded in (packed.decode(), traced_decode(kind)(packed)):
        np.testing.assert_array_equal(np.asarray(decoded).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_survive_the_round_trip(kind):
    codec = codec_of(kind)
    row = 64 // 32 * int(codec.bits_per_element() * 4)
    raw = np.random.default_rng(2).integers(0, 256, (12, row), dtype=np.uint8)
    packed = codecs.from_gguf(kind.lower(), raw, (3, 4, 64), dtype="bfloat16")
    assert packed.shape == (3, 4, 64) and packed.dtype == jnp.bfloat16
    assert all(isinstance(leaf, np.ndarray) and leaf.ndim == 3 for leaf in jax.tree.leaves(packed))
    assert packed.nbytes == raw.nbytes
    np.testing.assert_array_equal(codecs.to_gguf(packed), raw)
    np.testing.assert_array_equal(codecs.to_gguf(jax.tree.map(jnp.asarray, packed)), raw)


@pytest.mark.parametrize("kind", KINDS)
def test_other_group_axes_hold_the_same_blocks(kind):
    x = cases()["scales"]
    along_rows = codec_of(kind).encode(x.T, axes=-2)
    assert along_rows.shape == (64, 256)
    assert_same(along_rows.transpose((1, 0)), codec_of(kind).encode(x, axes=-1))
    split = codec_of(kind).encode(x.reshape(256, 4, 16), axes=(-2, -1))
    np.testing.assert_array_equal(split.scale.reshape(256, 2), codec_of(kind).encode(x, axes=-1).scale)
    np.testing.assert_array_equal(split.decode().reshape(256, 64), codec_of(kind).encode(x, axes=-1).decode())


@pytest.mark.parametrize("kind, bits", [("Q4_0", 4.5), ("Q4_1", 5.0), ("Q8_0", 8.5)])
def test_bits_per_element(kind, bits):
    packed = codec_of(kind).encode(cases()["normal"], axes=-1)
    assert packed.bits_per_element == packed.codec.bits_per_element() == bits


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_the_decoded_gives_the_same_codes(kind):
    packed = codec_of(kind).encode(cases()["normal"], axes=-1)
    assert_same(packed, packed.codec.encode(packed.decode(), axes=-1))


def test_bad_input():
    raw = np.zeros((4, 36), np.uint8)
    with pytest.raises(ValueError, match="among Q4_0, Q4_1, Q8_0, got 'Q5_K'"):
        codecs.from_gguf("Q5_K", raw, (4, 64))
    with pytest.raises(ValueError, match=r"expected uint8 bytes of shape \(4, 40\) for a Q4_1 array"):
        codecs.from_gguf("Q4_1", raw, (4, 64))
    with pytest.raises(ValueError, match=r"got int8"):
        codecs.from_gguf("Q4_0", raw.view(np.int8), (4, 64))
    with pytest.raises(ValueError, match="got rows of 60"):
        codecs.from_gguf("Q4_0", raw, (4, 60))
    with pytest.raises(ValueError, match="expected Q4_0, Q4_1 or Q8_0 codes"):
        codecs.to_gguf(codecs.int4(32).encode(np.zeros((4, 32), np.float32), -1))
    with pytest.raises(ValueError, match="transpose first"):
        codecs.to_gguf(codecs.q4_0().encode(np.zeros((32, 4), np.float32)))
    with pytest.raises(ValueError, match="its own rounding"):
        codecs.q4_0().encode(np.zeros((32, 4), np.float32), key=0)
    with pytest.raises(ValueError, match="cannot encode an element of size 7e"):
        codecs.q4_1().encode(np.full((32, 1), 7e4, np.float32))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
