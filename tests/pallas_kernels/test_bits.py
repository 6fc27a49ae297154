"""Counter-hash random bits against statistics, and planar packing against a loop over elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import _bits


def reference_pack(codes, bits, block):
    """Packs a vector element by element."""
    planes, low = [], 0
    for width in _bits.PLANES[bits]:
        per_byte = 8 // width
        out = np.zeros(len(codes) // per_byte, np.uint8)
        for i, code in enumerate(codes):
            start, j = divmod(i, block)
            byte = start * (block // per_byte) + j % (block // per_byte)
            out[byte] |= ((int(code) >> low) & (2**width - 1)) << (width * (j // (block // per_byte)))
        planes.append(out)
        low += width
    return planes


@pytest.mark.parametrize("bits", sorted(_bits.PLANES))
@pytest.mark.parametrize("block", [8, 32, 256])
def test_pack_matches_loop_and_inverts(bits, block):
    codes = (np.arange(512) * 37 % 2**bits).astype(np.uint8)
    assert set(codes) == set(range(min(2**bits, 256)))
    planes = _bits.pack(jnp.asarray(codes), bits, 0, block)
    for plane, expected in zip(planes, reference_pack(codes, bits, block), strict=True):
        np.testing.assert_array_equal(plane, expected)
    assert sum(plane.size for plane in planes) * 8 == 512 * bits
    np.testing.assert_array_equal(_bits.unpack(planes, bits, 0, block), codes)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_pack_along_any_axis(axis):
    codes = np.random.default_rng(0).integers(0, 16, (16, 32, 48), dtype=np.uint8)
    (plane,) = _bits.pack(jnp.asarray(codes), 4, axis, 16)
    (moved,) = _bits.pack(jnp.asarray(np.moveaxis(codes, axis, 0)), 4, 0, 16)
    np.testing.assert_array_equal(np.moveaxis(plane, axis, 0), moved)
    np.testing.assert_array_equal(_bits.unpack((plane,), 4, axis, 16), codes)


def test_pack_refuses_partial_blocks_and_bytes():
    with pytest.raises(ValueError, match="size 10 does not divide into blocks of 4"):
        _bits.pack(jnp.zeros(10, jnp.uint8), 4, 0, 4)
    with pytest.raises(ValueError, match="multiple of 2"):
        _bits.pack(jnp.zeros(9, jnp.uint8), 4, 0, 3)


def test_uniform_moments_and_histogram():
    n = 1 << 20
    u = np.asarray(_bits.uniform(_bits.random_bits(7, (n,))), np.float64)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    counts = np.bincount((u * 256).astype(int), minlength=256)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 4 * np.sqrt(2 * 255)


def test_uniform_ends():
    ends = _bits.uniform(jnp.array([0, 255, 2**32 - 1], jnp.uint32))
    np.testing.assert_array_equal(ends, np.float32([0, 0, 1 - 2**-24]))


def bit_matrix(words):
    return np.unpackbits(np.asarray(words).astype("<u4").view(np.uint8).reshape(-1, 4), axis=1)


def test_normal_is_finite_and_symmetric_at_its_ends():
    ends = _bits.normal(jnp.asarray([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000], jnp.uint32))
    assert -5.5 < ends[0] == -ends[1] < -5.4
    assert -1e-7 < ends[2] == -ends[3] < 0


@pytest.mark.parametrize("shift", [1, 2, 64, 4096])
def test_neighbouring_counters_are_uncorrelated(shift):
    n = 1 << 16
    bits = bit_matrix(_bits.random_bits(3, (n + shift,)))
    agree = (bits[:n, :, None] == bits[shift:, None, :]).mean(0)
    assert np.abs(agree - 0.5).max() < 5.5 * 0.5 / np.sqrt(n)


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32, 2**63])
def test_seeds_give_unrelated_streams(other):
    n = 1 << 16
    a, b = (_bits.random_bits(seed, (n,)) for seed in (0, other))
    agree = (bit_matrix(a)[:, :, None] == bit_matrix(b)[:, None, :]).mean(0)
    assert np.abs(agree - 0.5).max() < 5.5 * 0.5 / np.sqrt(n)
    assert len(np.intersect1d(a, b)) < 10


@pytest.mark.parametrize("word", [0, 1])
def test_both_seed_words_matter(word):
    n = 1 << 16
    words = [jnp.uint32(1), jnp.uint32(2)]
    counter = jnp.arange(n, dtype=jnp.uint32)
    a = _bits.hash_bits(tuple(words), counter)
    words[word] = words[word] ^ np.uint32(4)
    b = _bits.hash_bits(tuple(words), counter)
    agree = (bit_matrix(a)[:, :, None] == bit_matrix(b)[:, None, :]).mean(0)
    assert np.abs(agree - 0.5).max() < 5.5 * 0.5 / np.sqrt(n)


def test_every_counter_bit_flips_half_of_the_output():
    words = _bits.seed_words(11)
    counter = np.arange(1 << 14, dtype=np.uint32)
    base = bit_matrix(_bits.hash_bits(words, jnp.asarray(counter)))
    for i in range(32):
        flipped = bit_matrix(_bits.hash_bits(words, jnp.asarray(counter ^ np.uint32(1 << i))))
        assert np.abs((base != flipped).mean(0) - 0.5).max() < 6 * 0.5 / np.sqrt(len(counter))


def test_hash_is_a_bijection_of_the_counter():
    bits = np.asarray(_bits.random_bits(5, (1 << 18,)))
    assert len(np.unique(bits)) == len(bits)


def test_bits_are_stateless():
    shape = (3, 5, 7)
    expected = _bits.random_bits(9, shape)
    np.testing.assert_array_equal(expected, _bits.random_bits(9, (105,)).reshape(shape))
    np.testing.assert_array_equal(expected, jax.jit(_bits.random_bits, static_argnums=1)(jnp.uint32(9), shape))
    key = jax.random.key(9)
    np.testing.assert_array_equal(_bits.random_bits(key, shape), _bits.random_bits(jax.random.key_data(key), shape))
    by_row = jax.vmap(lambda seed: _bits.random_bits(seed, (4,)))(jnp.arange(2))
    np.testing.assert_array_equal(by_row[1], _bits.random_bits(jnp.uint32(1), (4,)))


def test_works_inside_a_kernel():
    def kernel(words, out, packed):
        bits = _bits.hash_bits((words[0], words[1]), _bits.flat_counter(out.shape))
        out[...] = _bits.uniform(bits)
        codes = (bits >> np.uint32(28)).astype(jnp.uint8)
        packed[...] = _bits.pack(codes, 4, -1, 32)[0]

    shapes = (jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((8, 32), jnp.uint8))
    out, packed = pl.pallas_call(kernel, shapes, interpret=True)(jnp.stack(_bits.seed_words(4)))
    bits = _bits.random_bits(4, (8, 64))
    np.testing.assert_array_equal(out, _bits.uniform(bits))
    np.testing.assert_array_equal(_bits.unpack((packed,), 4, -1, 32), bits >> np.uint32(28))


def test_bad_seeds():
    with pytest.raises(TypeError, match="got float"):
        _bits.random_bits(0.5, (2,))
    with pytest.raises(ValueError, match=r"keys of shape \(2,\)"):
        _bits.random_bits(jax.random.split(jax.random.key(0)), (2,))
    with pytest.raises(ValueError, match=r"more than 2\*\*32 elements"):
        _bits.random_bits(0, (2**20, 2**13))
