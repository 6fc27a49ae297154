"""Lists of blocks against what the dense table of a mask says."""

import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import block_mask_in_program, make_block_mask, masks
from tests.attention.test_masks import random_mask

rng = np.random.default_rng(0)


def rebuilt(made, direction="by_query"):
    """The truth of every element, as a kernel reads it from the lists of one direction: bool [Bm, Hm, S, T]."""
    lists, elements = getattr(made, direction), made.elements
    index, full, total = (np.asarray(x) for x in lists[:3])
    (bq, bk), (Bm, Hm) = made.blocks, index.shape[:2]
    Nq, Nk = -(-made.S // bq), -(-made.T // bk)
    table = np.zeros((Bm, Hm, Nq * bq, Nk * bk), bool)
    q_inner, k_inner = np.arange(bq)[:, None], np.arange(bk)[None]

    def fact(x, b, h, positions):
        x = np.asarray(x)
        line = x[b if x.shape[0] > 1 else 0, h * x.shape[1] // Hm]
        return line[np.minimum(positions, len(line) - 1)]

    assert ((index >= 0) & (index < (Nk if direction == "by_query" else Nq))).all()
    for b, h, n in np.ndindex(*index.shape[:3]):
        f, t = full[b, h, n], total[b, h, n]
        assert 0 <= f <= t <= index.shape[3]
        assert (np.diff(index[b, h, n, :f]) > 0).all() and (np.diff(index[b, h, n, f:t]) > 0).all()
        for m in range(t):
            i, j = (n, index[b, h, n, m]) if direction == "by_query" else (index[b, h, n, m], n)
            q, k = i * bq + q_inner, j * bk + k_inner
            if m < f:
                truth = np.True_
                assert (k < made.T).all(), "a block that keys end in must be partial"
            elif elements.bits is not None:
                words = np.asarray(elements.bits)[lists.pointer[b, h, n, m]]
                truth = (words[q_inner // 32, k_inner] >> (q_inner % 32).astype(np.uint32)) & 1 == 1
            else:
                flags = None if lists.flags is None else np.asarray(lists.flags)[b, h, n, m]
                rows = tuple(fact(x, b, h, q) for x in elements.rows)
                columns = tuple(fact(x, b, h, k) for x in elements.columns)
                truth = elements.test(q, k, rows, columns, flags)
            assert not table[b, h, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk].any()
            table[b, h, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk] = truth
    return table[:, :, : made.S, : made.T]


def check(made, table):
    for direction in ("by_query", "by_key"):
        np.testing.assert_array_equal(rebuilt(made, direction), np.broadcast_to(table, rebuilt(made, direction).shape))


def dynamic(mask):
    return jax.tree.map(jnp.asarray, mask)


def assert_same_lists(static, made):
    """Lists agree in what they hold; a dynamic one has more room."""
    for mine, other in ((static.by_query, made.by_query), (static.by_key, made.by_key)):
        np.testing.assert_array_equal(mine.full, other.full)
        np.testing.assert_array_equal(mine.total, other.total)
        used = np.arange(mine.index.shape[-1]) < np.asarray(mine.total)[..., None]
        for x, y in ((mine.index, other.index), (mine.flags, other.flags)):
            assert (x is None) == (y is None)
            if x is not None:
                np.testing.assert_array_equal(x[used], np.asarray(y)[..., : x.shape[-1]][used])


@pytest.mark.parametrize("seed", range(24))
def test_random_composites(seed):
    rng = np.random.default_rng(seed)
    S, T = (60, 60) if seed % 4 == 0 else rng.integers(1, 81, 2).tolist()
    mask = random_mask(rng, S, T)
    blocks = ((32, 16), (32, 32))[seed % 2]
    static = make_block_mask(mask, S, T, blocks=blocks)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(static))
    check(static, mask.table(S, T))


COMPOSITES = {
    "documents": masks.segments(np.sort(rng.integers(0, 4, (2, 70)), -1)) & masks.causal(),
    "blocks": (masks.blocks(rng.random((2, 3, 2, 3)) < 0.5, (64, 32)) | masks.sink(5)) & masks.window(None, 0),
    "fine blocks": masks.blocks(rng.random((1, 2, 5, 5)) < 0.5, 16) ^ masks.causal(),
    "table": masks.array(rng.random((2, 1, 70, 70)) < 0.5) & ~masks.prefix(np.array([30, 40])),
    "heads": masks.heads([masks.causal(), masks.strided_global(9) & masks.window(20, 20)], np.array([1, 0])),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_dynamic_lists_are_the_static_ones(name):
    mask = COMPOSITES[name]
    static = make_block_mask(mask, 70, 70, blocks=(32, 16))
    made = jax.jit(lambda mask: make_block_mask(mask, 70, 70, blocks=(32, 16)))(dynamic(mask))
    assert_same_lists(static, made)
    check(static, mask.table(70, 70))
    check(made, mask.table(70, 70))
    assert static.overflow is None and made.overflow is None


def test_contents_of_lists():
    made = make_block_mask(masks.window(32, 0) | masks.sink(1), 64, 64, blocks=(16, 16))
    for lists, expected, full in (
        (made.by_query, [[0], [0, 1], [1, 0, 2], [2, 0, 1, 3]], [0, 1, 1, 1]),
        (made.by_key, [[1, 0, 2, 3], [2, 1, 3], [3, 2], [3]], [1, 1, 1, 0]),
    ):
        assert [line[:t].tolist() for line, t in zip(lists.index[0, 0], lists.total[0, 0])] == expected
        assert lists.full.tolist() == [[full]] and lists.index.shape == (1, 1, 4, 4)


def test_a_block_that_keys_end_in_is_partial():
    made = make_block_mask(masks.full(), 64, 60, blocks=(16, 16))
    assert (made.by_query.full == 3).all() and (made.by_query.total == 4).all()
    assert made.by_key.full.tolist() == [[[4, 4, 4, 0]]]
    assert (make_block_mask(masks.full(), 60, 64, blocks=(16, 16)).by_query.full == 4).all()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_rows_of_a_subset(kind):
    mask = COMPOSITES["documents"] | masks.blocks(rng.random((2, 1, 3, 5)) < 0.5, (32, 16)) & masks.sink(50)
    rows = np.array([3, 17, 40, 41, 69, 2], np.int32)
    for part in (mask, COMPOSITES["documents"]):

        def build(part, rows):
            return make_block_mask(part, 70, 70, blocks=(32, 16), rows=rows)

        made = build(part, rows) if kind == "static" else jax.jit(build)(dynamic(part), rows)
        assert (made.S, made.T) == (6, 70)
        check(made, part.table(70, 70)[:, :, rows])


def test_capacity_that_is_too_small_raises_where_values_are_known():
    for mask in (masks.causal(), masks.segments(jnp.zeros((1, 64), int))):
        with pytest.raises(ValueError, match="by query and by key, got"):
            make_block_mask(mask, 64, 64, blocks=(16, 16), capacity=2)
    with pytest.raises(ValueError, match="by query and by key, got"):
        make_block_mask(masks.causal(), 64, 64, blocks=(16, 16), capacity=(4, 3))


@pytest.mark.parametrize("capacity", [2, (4, 2), (2, 2)])
def test_queries_that_lost_blocks_are_marked(capacity):
    @jax.jit
    def build(lengths):
        return make_block_mask(masks.prefix(lengths), 64, 64, blocks=(16, 16), capacity=capacity)

    made = build(jnp.array([32, 40]))
    table = np.arange(64) < np.array([32, 40])[:, None]
    some = np.repeat(table.reshape(2, 1, 1, 4, 16).any(-1), 4, 2)
    kept = some.copy()
    by_query, by_key = (capacity, 4) if isinstance(capacity, int) else capacity
    kept &= np.cumsum(kept, 2) <= by_key
    kept &= np.cumsum(kept, 3) <= by_query
    np.testing.assert_array_equal(made.overflow, (some & ~kept).any(-1))
    np.testing.assert_array_equal(made.by_query.total, kept.sum(-1))
    np.testing.assert_array_equal(made.by_key.total, kept.sum(-2))
    assert made.by_query.index.shape[-1] == by_query and made.by_key.index.shape[-1] == by_key


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_blocks_of_highest_scores_are_kept(kind):
    scores = np.random.default_rng(3).normal(size=(2, 2, 4, 4))
    mask = masks.causal() if kind == "static" else masks.causal(jnp.zeros((), int))
    made = make_block_mask(mask, 64, 64, blocks=(16, 16), capacity=2, overflow="drop_lowest", scores=scores)
    assert made.overflow is None
    for b, h, i in np.ndindex(2, 2, 4):
        best = np.sort(np.argsort(-np.where(np.arange(4) <= i, scores[b, h, i], -np.inf))[: min(2, i + 1)])
        kept = np.sort(np.asarray(made.by_query.index)[b, h, i, : made.by_query.total[b, h, i]])
        np.testing.assert_array_equal(kept, best)
    by_query, by_key = rebuilt(made), rebuilt(made, "by_key")
    np.testing.assert_array_equal(by_query, by_key)


def test_dense_overflow_has_room_for_all():
    made = make_block_mask(masks.window(8, 0), 64, 64, blocks=(16, 16), overflow="dense")
    assert made.by_query.index.shape == made.by_key.index.shape == (1, 1, 4, 4) and made.overflow is None
    check(made, masks.window(8, 0).table(64, 64))


def documents(seed, S):
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(0, 2 + 5 * seed, (1, S)), -1))


def test_documents_of_other_lengths_compile_nothing():
    traces = []

    @jax.jit
    def build(ids):
        traces.append("build")
        return make_block_mask(masks.segments(ids) & masks.causal(), 256, 256, blocks=(16, 16), capacity=16)

    @jax.jit
    def use(made):
        traces.append("use")
        return made.by_query.total.sum()

    totals = {int(use(build(documents(seed, 256)))) for seed in range(3)}
    assert traces == ["build", "use"] and len(totals) > 1


@pytest.mark.parametrize("name", ["documents", "heads", "blocks"])
def test_nothing_of_all_elements_is_built(name):
    S = 16384
    ids, selected = jnp.zeros((1, S), jnp.int32), jnp.ones((1, 2, 128, 128), bool)

    def build(ids, selected):
        mask = {
            "documents": masks.segments(ids) & masks.causal(),
            "heads": masks.heads([masks.causal(), masks.window(99, 0)]) & masks.segments(ids),
            "blocks": masks.blocks(selected, 128) & masks.causal() & masks.segments(ids),
        }[name]
        return make_block_mask(mask, S, S)

    compiled = jax.jit(build).lower(ids, selected).compile()
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest < S * S // 1000, largest
    assert compiled.memory_analysis().temp_size_in_bytes < S * S // 64


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(40, 8) | masks.sink(3)], ids=repr)
def test_lists_made_in_the_program_are_the_static_ones(mask):
    static = make_block_mask(mask, 200, 300, blocks=(16, 32))
    build = jax.jit(lambda: block_mask_in_program(mask, 200, 300, blocks=(16, 32)))
    made = build()
    assert_same_lists(static, made)
    assert made.by_query.index.shape == static.by_query.index.shape
    text = build.lower().as_text()
    assert not re.search(r"dense<\[|dense<\"", text), "lists are constants of the program"


def test_masks_that_differ_in_facts_alone_have_equal_tests():
    a, b = (
        make_block_mask(masks.segments(ids) | masks.sink(3), 64, 64, blocks=(16, 16)).elements.test
        for ids in np.arange(128).reshape(2, 1, 64)
    )
    assert a == b and hash(a) == hash(b)


def test_time_of_static_lists():
    for mask in (masks.causal(), masks.window(4095, 0)):
        times = []
        for _ in range(5):
            start = time.thread_time()
            made = make_block_mask(mask, 131072, 131072)
            times.append(time.thread_time() - start)
        print(f"{mask}: {min(times) * 1e3:.1f} ms for {made.by_query.index.shape[2]}**2 blocks")
    assert made.by_query.index.shape == (1, 1, 1024, 33)


def test_density_bytes_and_picture():
    made = make_block_mask(masks.causal(), 64, 64, blocks=(16, 16))
    assert made.density == 10 / 16
    assert made.nbytes == 2 * 4 * (16 + 4 + 4)
    assert made.show() == "▒···\n█▒··\n██▒·\n███▒"
    assert len(make_block_mask(masks.causal(), 2048, 2048, blocks=(16, 16)).show().split("\n")) == 64


BAD = {
    "blocks": (lambda: make_block_mask(masks.full(), 8, 8, blocks=(0, 16)), ValueError, "at least 1"),
    "policy": (lambda: make_block_mask(masks.full(), 8, 8, overflow="drop"), ValueError, "'drop'"),
    "no scores": (lambda: make_block_mask(masks.full(), 8, 8, overflow="drop_lowest"), ValueError, "needs scores"),
    "scores": (lambda: make_block_mask(masks.full(), 8, 8, scores=np.ones((1, 1, 1, 1))), ValueError, "nothing else"),
    "scores of another size": (
        lambda: make_block_mask(
            masks.full(), 32, 32, blocks=(16, 16), capacity=1, overflow="drop_lowest", scores=np.ones((1, 1, 3, 2))
        ), ValueError, "scores: expected",
    ),
    "dense with a capacity": (
        lambda: make_block_mask(masks.full(), 8, 8, overflow="dense", capacity=3), ValueError, "takes no capacity",
    ),
    "capacity": (lambda: make_block_mask(masks.full(), 8, 8, capacity=(1, 2, 3)), ValueError, "capacity"),
    "no mask": (lambda: make_block_mask(None, 8, 8), TypeError, "expected a mask"),
    "rows": (lambda: make_block_mask(masks.full(), 8, 8, rows=np.ones((2, 2), int)), ValueError, "rows"),
    "a row beyond S": (lambda: make_block_mask(masks.full(), 8, 8, rows=[3, 8]), ValueError, "below S=8"),
    "a table in short blocks": (
        lambda: make_block_mask(masks.array(np.eye(32) > 0), 32, 32, blocks=(16, 16)), ValueError, "multiple of 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
