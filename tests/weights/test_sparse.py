"""N:M, bitmap and Tiled-CSL storage: what is kept, where, and in how many bytes."""

import dataclasses
import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, weights
from memjax.core.views import Axes, make_axes
from memjax.weights import bitmap, nm_sparse, tiled_csl
from tests.random_views import array

PATTERNS = {
    "random": lambda k, n: np.random.default_rng(0).random((k, n)) < 0.4,
    "banded": lambda k, n: abs(np.arange(k)[:, None] - np.arange(n)) < 3,
    "empty": lambda k, n: np.zeros((k, n), bool),
    "full": lambda k, n: np.ones((k, n), bool),
    "one empty and one full tile": lambda k, n: np.broadcast_to(np.arange(k)[:, None] // 64 == 1, (k, n)),
}


def assert_equal(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual, np.float64), np.asarray(expected, np.float64))


@pytest.mark.parametrize("format", [bitmap, tiled_csl])
def test_what_is_encoded_is_decoded(format):
    w = array(0, len(PATTERNS), 130, 70, dtype=jnp.float16)
    masks = np.stack([pattern(130, 70) for pattern in PATTERNS.values()])
    view = format.encode(w, jnp.asarray(masks), Axes())
    view.check()
    assert (view.shape, view.batch_ndim, view.dtype) == (w.shape, 1, jnp.float16)
    for name, found, dense, mask in zip(PATTERNS, view.materialize(), w, masks):
        np.testing.assert_array_equal(found, np.where(mask, dense, 0), err_msg=name)


@pytest.mark.parametrize("n, m, bits", [(2, 4, 2), (3, 4, 2), (4, 4, 2), (1, 2, 1), (3, 32, 5)])
def test_nm_keeps_the_largest_in_the_stated_bits(n, m, bits):
    w = np.asarray(array(0, 64, 3))
    view = weights.sparsify({"kernel": w}, f"{n}:{m}", storage="indices")["kernel"]
    groups = w.reshape(-1, m, 3)
    largest = np.argsort(np.argsort(-abs(groups), 1), 1) < n
    assert_equal(view.materialize(), np.where(largest, groups, 0).reshape(64, 3))
    assert nm_sparse.index_bits(m) == bits
    stored = 64 // m * n
    assert view.nbytes == 3 * (stored * 4 + -(-stored // 8) * bits)
    if stored % 8 == 0:
        assert view.nbytes * 8 / view.size == nm_sparse.bits_per_weight(n, m, value_bits=32)


def test_two_in_four_of_int4_take_3_125_bits():
    tree = {"kernel": array(0, 256, 4, dtype=jnp.bfloat16)}
    coded = weights.sparsify(tree, "2:4", codec=codecs.int4(group=64))  # 64 kept elements are 128 dense ones
    assert weights.report(tree, coded).leaves[0].bits_per_weight == 3.125
    plain = weights.sparsify(tree, "2:4")["kernel"]
    assert plain.nbytes * 8 / plain.size == 9
    decoded = codecs.int4(group=64).encode(plain.values).decode()
    assert_equal(coded["kernel"].values.decode(), decoded)
    assert_equal(coded["kernel"].materialize(), dataclasses.replace(plain, values=decoded).materialize())


def test_equal_elements_and_emptier_masks_keep_places_apart():
    view = weights.sparsify({"kernel": jnp.ones((16, 2))}, "2:4")["kernel"]
    assert_equal(view.materialize(), np.tile([[1, 1], [1, 1], [0, 0], [0, 0]], (4, 1)))
    mask = np.zeros((16, 2), bool)
    mask[3, 0] = True
    view = weights.sparsify({"kernel": jnp.ones((16, 2))}, "2:4", masks={"kernel": mask})["kernel"]
    assert_equal(view.materialize(), mask)


def test_large_groups_become_bitmaps_and_given_masks_are_stored():
    w = array(0, 128, 6, dtype=jnp.bfloat16)
    view = weights.sparsify({"kernel": w}, "16:64")["kernel"]
    assert isinstance(view, weights.Bitmap)
    assert_equal((view.materialize() != 0).reshape(2, 64, 6).sum(1), np.full((2, 6), 16))
    indices = weights.sparsify({"kernel": w}, "16:64", storage="indices")["kernel"]
    assert_equal(indices.materialize(), view.materialize())


def test_sparsity_drops_the_smallest_of_every_slice():
    w = np.asarray(array(0, 2, 10, 8) * jnp.array([1.0, 100.0])[:, None, None])
    for sparsity, dropped in ((0.3, 24), (1, 80)):
        view = weights.sparsify({"kernel": w}, "bitmap", sparsity=sparsity)["kernel"]
        for dense, stored in zip(w, np.asarray(view.materialize())):
            assert (stored == 0).sum() == dropped
            assert_equal(np.sort(abs(stored).ravel())[dropped:], np.sort(abs(dense).ravel())[dropped:])
        assert view.values.shape == (2, 1, max(1, 80 - dropped))
        pruned = weights.sparsify({"kernel": view.materialize()}, "bitmap")["kernel"]  # nonzero elements, by default
        assert_equal(pruned.materialize(), view.materialize())
    for format in ("bitmap", "tiled_csl"):
        full = weights.sparsify({"kernel": w[0]}, format, sparsity=0)["kernel"]
        np.testing.assert_allclose(full.materialize(), w[0], rtol=0 if format == "bitmap" else 2**-11)


def test_bitmaps_of_several_axes_and_batches():
    axes = make_axes((3, 1), (4, 2), 5)
    w = array(0, 2, 5, 3, 20, 30)
    mask = jnp.abs(w) > 1
    view = bitmap.encode(w, mask, axes)
    assert (view.shape, view.batch_ndim) == (w.shape, 1)
    assert_equal(view.materialize(), jnp.where(mask, w, 0))
    assert view.masks.shape == (2, 4, 90) and view.offsets.shape == (2, 2, 2)
    for words, dense in zip(np.asarray(view.masks), np.asarray(mask)):
        columns = np.pad(dense.transpose(2, 0, 3, 1).reshape(100, 90), ((0, 28), (0, 0)))
        bits = np.packbits(columns, axis=0, bitorder="little").T.copy().view("<u4").T
        np.testing.assert_array_equal(words, bits)


def released_input(keep, m=256, k=192):
    """Returns a float16 matrix, a tile of it empty, whose tiles need at most one padded entry."""
    h = (np.arange(m * k, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)).astype(np.int64)
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    h ^= h >> 13
    a = np.where(h % 100 < keep, ((h >> 8) % 255 - 127) / 8, 0).astype(np.float16).reshape(m, k)
    a[128:, 64:128] = 0
    for row in range(0, m, 128):
        for column in range(0, k, 64):
            tile = a[row : row + 128, column : column + 64]
            found = np.argwhere(tile)
            for place in found[len(found) - {1: 1, 2: 2}.get(len(found) % 4, 0) :]:
                tile[tuple(place)] = 0
    return a


@pytest.mark.parametrize(
    "keep, digest",
    [
        (3, "f09933ac4ef10eb93511583b9666db39b61b289e63bdf4ac0e1ff63e54738bcc"),
        (22, "49caec9ba1ea19d19007add363709311a0be21058f745c6321e548a5ac2fdae0"),
        (95, "c502c11002a553d39f1819b94a8bf89f04d5831b35f4f62065bae6111d68cfc7"),
    ],
)
def test_tiled_csl_is_that_of_the_released_encoder(keep, digest):
    """The digests are of words and offsets that Flash-LLM's InitSparseMatrixA_API gave for these matrices."""
    a = jnp.asarray(released_input(keep).T)
    view = tiled_csl.encode(a, a != 0, Axes())
    assert hashlib.sha256(np.asarray(view.words).tobytes() + np.asarray(view.offsets).tobytes()).hexdigest() == digest


def test_tiled_csl_pads_with_zeros_where_zeros_are_and_spreads_over_banks():
    rng = np.random.default_rng(0)
    for keep in (0.001, 0.3, 0.97, 0.9999):
        w = rng.standard_normal((128, 128)) * (rng.random((128, 128)) < keep)
        w = w.astype(np.float16)
        view = tiled_csl.encode(jnp.asarray(w), jnp.asarray(w != 0), Axes())
        words, offsets = np.asarray(view.words), np.asarray(view.offsets)
        assert offsets[-1] == offsets[-2] == -(-np.count_nonzero(w[:64]) // 4) + -(-np.count_nonzero(w[64:]) // 4)
        for tile, (start, end) in enumerate(itertools.pairwise(offsets[:-1])):
            row, column = np.divmod(words[4 * start : 4 * end] >> 16, 64)
            column ^= (row % 8) << 3
            assert len({*zip(row, column)}) == len(row)
            values = (words[4 * start : 4 * end] & 0xFFFF).astype(np.uint16).view(np.float16)
            assert_equal(values, w[64 * tile + column, row])
        if keep == 0.97:  # the 32 lanes write the first, then the second ... of their four words: to 32 banks
            banks = (words[: 128 * (offsets[1] // 32)] >> 16) % 64 // 2
            distinct = [len(set(load)) for load in banks.reshape(-1, 32, 4).swapaxes(1, 2).reshape(-1, 32)]
            assert np.mean(distinct) > 31 and np.mean(np.array(distinct) == 32) > 0.95


def test_tiled_csl_refuses_what_float16_cannot_hold():
    with pytest.raises(ValueError, match="kernel: Tiled-CSL holds float16 values, got an element of size 7e"):
        weights.sparsify({"kernel": jnp.full((8, 8), 7e4)}, "tiled_csl")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pattern": "4:2"}, r"kernel: expected a pattern n:m with 0 < n <= m <= 256, got 4:2"),
        ({"pattern": "2:5"}, r"kernel: axis -2 of size 16 .* is not a multiple of 5"),
        ({"pattern": "csr"}, "expected a pattern such as '2:4'"),
        ({"pattern": "2:4", "sparsity": 0.5}, "leave out sparsity"),
        ({"pattern": "bitmap", "storage": "bitmap"}, "leave out storage"),
        ({"pattern": "2:4", "storage": "dense"}, "expected storage 'indices' or 'bitmap'"),
        ({"pattern": "bitmap", "codec": codecs.int4()}, "stored by indices only"),
        ({"pattern": "bitmap", "sparsity": 1.5}, "between 0 and 1"),
        ({"pattern": "bitmap", "masks": {}}, r"exactly the selected weights, these differ: \['kernel'\]"),
        ({"pattern": "bitmap", "masks": {"kernel": np.ones((2, 2), bool)}}, "kernel: expected a bool mask of shape"),
        ({"pattern": "2:4", "masks": {"kernel": np.ones((16, 4), bool)}}, "kernel: the mask keeps 4 of 4"),
        ({"pattern": "2:4", "codec": codecs.int4(group=64)}, "kernel: groups of 64 are larger than the group axes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        weights.sparsify({"kernel": array(0, 16, 4)}, **arguments)


def test_an_n_m_weight_with_loose_blocks_is_not_sharded_along_its_inputs():
    view = weights.sparsify({"kernel": array(0, 12, 4)}, "2:4")["kernel"]
    with pytest.raises(ValueError, match="do not fill whole blocks of 4"):
        view.specs(("model", None))
    assert_equal(jax.jit(lambda v: v.materialize())(view), view.materialize())
