"""What masks say of elements, against obvious tables; and of blocks, against their elements."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import masks
from memjax.attention.expression import classify, resolve
from memjax.attention.intervals import Interval, Truth

rng = np.random.default_rng(0)


def positions(S, T):
    q, k = np.arange(S)[:, None], np.arange(T)[None]
    return q, k, q + T - S


def tree_table(parents, S):
    T = len(parents)
    table = np.zeros((T, T), bool)
    for token in range(T):
        node = token
        while node >= 0:
            table[token, node] = True
            node = parents[node]
    return table[T - S :]


def neighbors(shape, reach):
    cells = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), -1)
    return (np.abs(cells[:, None] - cells[None]) <= np.array(reach)).all(-1)


PARENTS = np.array([-1, 0, 1, 1, 0, 3, 3, 5, -1, 8, 4, 9, 2])
DOCUMENTS = np.sort(rng.integers(0, 5, (2, 60)), axis=-1)
SELECTED = rng.random((2, 3, 4, 3)) < 0.5
TABLE = rng.random((2, 1, 50, 70)) < 0.5

OBVIOUS = {
    "full": (masks.full(), 5, 7, lambda q, k, d: (k == k) & (q == q)),
    "causal": (masks.causal(), 50, 70, lambda q, k, d: k <= d),
    "causal shifted": (masks.causal(-3), 50, 70, lambda q, k, d: k <= d - 3),
    "causal per example": (
        masks.causal(np.array([0, 5])), 9, 20, lambda q, k, d: k <= d + np.array([0, 5])[:, None, None, None],
    ),
    "window": (masks.window(5, 2), 50, 70, lambda q, k, d: (k >= d - 5) & (k <= d + 2)),
    "band": (masks.window(9, -4), 50, 70, lambda q, k, d: (d - k >= 4) & (d - k <= 9)),
    "window left": (masks.window(5, None), 70, 50, lambda q, k, d: k >= d - 5),
    "sink": (masks.sink(4), 20, 30, lambda q, k, d: (k < 4) & (q == q)),
    "prefix": (
        masks.prefix(np.array([3, 11])), 20, 30,
        lambda q, k, d: (k < np.array([3, 11])[:, None, None, None]) & (q == q),
    ),
    "segments": (
        masks.segments(DOCUMENTS), 60, 60, lambda q, k, d: (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])[:, None],
    ),
    "lengths": (
        masks.lengths(np.array([3, 20]), np.array([30, 7])), 20, 30,
        lambda q, k, d: (q < np.array([3, 20])[:, None, None, None]) & (k < np.array([30, 7])[:, None, None, None]),
    ),
    "key lengths": (masks.lengths(k_lengths=np.array([4])), 6, 9, lambda q, k, d: (k < 4) & (q == q)),
    "query lengths": (masks.lengths(np.array([4])), 6, 9, lambda q, k, d: (q < 4) & (k == k)),
    "chunked": (masks.chunked(8), 50, 70, lambda q, k, d: d // 8 == k // 8),
    "dilated": (masks.dilated(3, 10), 50, 70, lambda q, k, d: (np.abs(d - k) <= 10) & ((d - k) % 3 == 0)),
    "strided": (masks.strided_global(7), 50, 70, lambda q, k, d: (k % 7 == 0) & (q == q)),
    "neighborhood": (
        masks.neighborhood_nd((3, 4, 5), (1, 3, 3)), 60, 60, lambda q, k, d: neighbors((3, 4, 5), (0, 1, 1)),
    ),
    "blocks": (
        masks.blocks(SELECTED, (16, 32)), 64, 80, lambda q, k, d: SELECTED.repeat(16, 2).repeat(32, 3)[..., :64, :80],
    ),
    "array": (masks.array(TABLE), 50, 70, lambda q, k, d: TABLE),
    "columns": (masks.columns([2, 40, -1, 99]), 50, 70, lambda q, k, d: ((k == 2) | (k == 40)) & (q == q)),
    "tree": (masks.tree(PARENTS), 6, 13, lambda q, k, d: tree_table(PARENTS, 6)),
    "predicate": (
        masks.predicate(lambda q, k, a, b: abs(2 * q - k + a) * 3 < 40 + b, [np.arange(50) % 4], [np.arange(70) % 3]),
        50, 70, lambda q, k, d: np.abs(2 * q - k + q % 4) * 3 < 40 + k % 3,
    ),
    "heads": (
        masks.heads([masks.causal(), masks.sink(3)], [1, 0, 1]), 20, 30,
        lambda q, k, d: np.stack([(k < 3) & (q == q), k <= d, (k < 3) & (q == q)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBVIOUS)
def test_elements(name):
    mask, S, T, obvious = OBVIOUS[name]
    table = mask.table(S, T)
    assert isinstance(table, np.ndarray) and table.dtype == bool
    np.testing.assert_array_equal(table, np.broadcast_to(obvious(*positions(S, T)), table.shape))


def block_values(table, blocks):
    """Whether all and any elements of each block are true."""
    S, T = table.shape[2:]
    rest = [(0, 0), (0, 0), (0, -S % blocks[0]), (0, -T % blocks[1])]
    grids = (np.pad(table, rest, constant_values=fill) for fill in (True, False))
    shape = (*table.shape[:2], -(-S // blocks[0]), blocks[0], -(-T // blocks[1]), blocks[1])
    every, some = (grid.reshape(shape) for grid in grids)
    return every.all((3, 5)), some.any((3, 5))


def check_sound(mask, S, T, blocks, exact=False):
    full, visit = classify(resolve(mask, S, T), blocks)
    every, some = block_values(np.asarray(mask.table(S, T)), blocks)
    full, visit = np.asarray(full), np.asarray(visit)
    assert not (full & ~every).any(), f"{mask} {S=} {T=} {blocks=}: full, yet an element is false"
    assert not (some & ~visit).any(), f"{mask} {S=} {T=} {blocks=}: empty, yet an element is true"
    assert not (full & ~visit).any()
    if exact:
        np.testing.assert_array_equal(full, every)
        np.testing.assert_array_equal(visit, some)


INEXACT = {
    "dilated",
    "predicate",
    "tree",
    "neighborhood",
    "segments",
}  # a condition of joined facts is not seen through


@pytest.mark.parametrize("name", OBVIOUS)
def test_blocks_of_one_mask_are_sound_and_standard_ones_exact(name):
    mask, S, T, _ = OBVIOUS[name]
    for blocks in [(16, 16), (32, 16), (16, 32), (7, 5), (1, 1)]:
        check_sound(mask, S, T, blocks, exact=name not in INEXACT)


def random_leaf(rng, S, T, B=2, H=2):
    def facts(n, high):
        return np.sort(rng.integers(0, high, (rng.choice([1, B]), rng.choice([1, H]), n)), axis=-1)

    def selected(bq, bk):
        shape = rng.choice([1, B]), rng.choice([1, H]), -(-S // bq), -(-T // bk)
        return masks.blocks(rng.random(shape) < 0.6, (bq, bk))

    def tree():
        return masks.tree(np.array([rng.integers(-1, i) for i in range(T)]))

    makers = [
        masks.full,
        lambda: masks.causal(int(rng.integers(-20, 20))),
        lambda: masks.window(int(rng.integers(0, 40)), int(rng.integers(0, 20))),
        lambda: masks.window(None, int(rng.integers(-10, 10))),
        lambda: masks.sink(int(rng.integers(0, T))),
        lambda: masks.prefix(rng.integers(0, T, B)),
        lambda: masks.segments(facts(S, 4), facts(T, 4)),
        lambda: masks.lengths(rng.integers(0, S + 1, B), rng.integers(0, T + 1, (B, H))),
        lambda: masks.chunked(int(rng.integers(1, 40))),
        lambda: masks.dilated(int(rng.integers(1, 5)), int(rng.integers(0, 40))),
        lambda: masks.strided_global(int(rng.integers(1, 40))),
        lambda: selected(*rng.choice([8, 16, 24, 32], 2).tolist()),
        lambda: masks.columns(rng.integers(0, T, (B, 3))),
        lambda: masks.heads([masks.causal(), masks.sink(9)]),
        lambda: masks.predicate(lambda q, k, a: (q - k + a) % 24 < 12, [facts(S, 9)]),
        lambda: masks.array(rng.random((S, T)) < rng.choice([0.001, 0.5, 0.999])),
    ]
    if S <= T:
        makers.append(tree)
    if S == T == 60:
        makers.append(lambda: masks.neighborhood_nd((3, 20), (3, 5)))
    return makers[rng.integers(len(makers))]()


def random_mask(rng, S, T, depth=4):
    if depth == 0 or rng.random() < 0.15:
        return random_leaf(rng, S, T)
    kind = rng.integers(4)
    if kind == 0:
        return ~random_mask(rng, S, T, depth - 1)
    left, right = (random_mask(rng, S, T, depth - 1) for _ in range(2))
    return left & right if kind == 1 else left | right if kind == 2 else left ^ right


@pytest.mark.parametrize("seed", range(60))
def test_blocks_of_random_composites_are_sound(seed):
    rng = np.random.default_rng(seed)
    S, T = (60, 60) if seed % 4 == 0 else rng.integers(1, 81, 2).tolist()
    mask = random_mask(rng, S, T)
    for blocks in [(16, 16), (16, 32), (32, 16), (32, 32)]:
        check_sound(mask, S, T, blocks)


def test_soundness_is_checked():
    wrong = masks.Leaf(lambda at: at.k <= at.q + (3 if isinstance(at.q, Interval) else 0))
    with pytest.raises(AssertionError, match="an element is false"):
        check_sound(wrong, 40, 40, (4, 4))


@pytest.mark.parametrize("operation", ["and", "or", "xor", "not"])
def test_operators_join_truths_of_elements(operation):
    a, b = masks.array(TABLE), masks.causal()
    x, y = a.table(50, 70), b.table(50, 70)
    made, expected = {
        "and": (a & b, x & y), "or": (a | b, x | y), "xor": (a ^ b, x ^ y), "not": (~a, ~x),
    }[operation]  # fmt: skip
    np.testing.assert_array_equal(made.table(50, 70), expected)


EQUAL = {
    "window without limits to the left is causal": (masks.window(None, 0), masks.causal()),
    "equal segments are full": (masks.segments(np.full((1, 48), 7)), masks.full()),
    "all blocks are full": (masks.blocks(np.ones((3, 3), bool), 16), masks.full()),
    "and full": (masks.causal() & masks.full(), masks.causal()),
    "not not": (~~masks.causal(), masks.causal()),
    "a prefix of one number is a sink": (masks.prefix(np.array([5])), masks.sink(5)),
    "a chain is causal": (masks.tree(np.arange(48) - 1), masks.causal()),
    "one chunk": (masks.chunked(48), masks.full()),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equivalent_masks_have_equal_elements_and_blocks(name):
    left, right = (resolve(mask, 48, 48) for mask in EQUAL[name])
    np.testing.assert_array_equal(EQUAL[name][0].table(48, 48), EQUAL[name][1].table(48, 48))
    for mine, other in zip(classify(left, (16, 16)), classify(right, (16, 16))):
        np.testing.assert_array_equal(mine, other)


def test_a_traced_mask_is_the_static_one():
    parents, lengths, documents = jnp.array(PARENTS), jnp.array([4, 13]), jnp.array(DOCUMENTS[:, :13])

    @jax.jit
    def made(parents, lengths, documents):
        mask = (masks.tree(parents) | masks.columns(lengths)) & masks.segments(documents) | masks.prefix(lengths)
        return mask.table(13, 13), classify(resolve(mask, 13, 13), (4, 4))

    args = (parents, lengths, documents)
    for x, y in zip(jax.tree.leaves(made(*args)), jax.tree.leaves(made.__wrapped__(*map(np.asarray, args)))):
        assert isinstance(y, np.ndarray)
        np.testing.assert_array_equal(x, y)


def test_intervals_hold_every_value():
    rng = np.random.default_rng(1)
    rules = [
        lambda a, b: a + b, lambda a, b: a - b, lambda a, b: 3 - a, lambda a, b: a * b, lambda a, b: -2 * a,
        lambda a, b: a // 3, lambda a, b: a % 5, lambda a, b: abs(a), lambda a, b: a < b, lambda a, b: a >= b,
        lambda a, b: a == b, lambda a, b: (a != b) ^ (a > 2), lambda a, b: ~(a <= b) | (b == 1),
    ]  # fmt: skip
    for _ in range(50):
        (a0, a1), (b0, b1) = np.sort(rng.integers(-9, 10, (2, 2)), axis=-1)
        a, b = np.meshgrid(np.arange(a0, a1 + 1), np.arange(b0, b1 + 1))
        for rule in rules:
            values, known = rule(a, b), rule(Interval(a0, a1), Interval(b0, b1))
            if isinstance(known, Truth):
                assert bool(known.sure) <= values.all() and values.any() <= bool(known.maybe)
            else:
                assert known.lo <= values.min() and values.max() <= known.hi


def test_density():
    assert masks.causal().density(300, 300) == 301 / 600
    assert masks.array(TABLE).density(50, 70) == TABLE.mean()
    assert masks.full().density(10**4, 10**4) == 1


@pytest.mark.parametrize("sizes", [(50, 70), (150, 150)])
def test_keys_seen_by_each_query(sizes):
    chosen = rng.random((2, 3, 5, 5)) < 0.5
    size = tuple(-(-n // 5) for n in sizes)

    def shown(chosen):
        return masks.blocks(chosen, size) & masks.causal() | masks.columns(np.array([[0, 9], [3, 4]]))

    seen = jax.jit(lambda chosen: shown(chosen).keys_seen(*sizes))(chosen)
    assert seen.dtype == jnp.int32
    np.testing.assert_array_equal(seen, shown(chosen).table(*sizes).sum(-1))
    np.testing.assert_array_equal(masks.causal().keys_seen(5, 7), [[[3, 4, 5, 6, 7]]])


def test_pictures():
    assert masks.causal().show(3, 4) == "██··\n███·\n████"
    assert masks.heads([masks.full(), ~masks.full()]).show(1, 2, head=1) == "··"
    picture = masks.causal().show(1000, 640).split("\n")
    assert len(picture) <= 64 and {len(line) for line in picture} == {64} and set("".join(picture)) == set("·▒█")
    with pytest.raises(ValueError, match="1 heads, got 0, 3"):
        masks.causal().show(3, 4, head=3)


def test_drawing():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = masks.causal().draw(100, 200)
    assert ax.images[0].get_array().shape == (50, 50) and ax.get_xlabel() == "key"


BAD = {
    "an even box": (lambda: masks.neighborhood_nd((4, 4), 2), ValueError, "odd edge"),
    "another grid": (lambda: masks.neighborhood_nd((4, 4), 3).table(8, 8), ValueError, "S = T = 16"),
    "an empty window": (lambda: masks.window(3, -4), ValueError, "no key"),
    "a window that is no limit": (lambda: masks.window(2**31 - 1, 0), ValueError, "int32"),
    "a float": (lambda: masks.sink(2.5), TypeError, "must be an integer"),
    "no chunk": (lambda: masks.chunked(0), ValueError, "at least 1"),
    "float segments": (lambda: masks.segments(np.ones((1, 4))), TypeError, "float64"),
    "facts of another size": (lambda: masks.segments(np.ones((1, 4), int)).table(5, 5), ValueError, "5 queries, got 4"),
    "blocks of another size": (lambda: masks.blocks(np.ones((2, 2), bool), 16).table(64, 64), ValueError, r"\(4, 4\)"),
    "a table of numbers": (lambda: masks.array(np.ones((2, 2))), TypeError, "bool"),
    "a child before its parent": (lambda: masks.tree([1, -1]), ValueError, "before its child"),
    "more queries than tokens": (lambda: masks.tree([-1, 0]).table(3, 2), ValueError, "last tokens"),
    "no lengths": (lambda: masks.lengths(), ValueError, "q_lengths"),
    "no masks": (lambda: masks.heads([]), ValueError, "at least one"),
    "a head's mask unknown": (lambda: masks.heads([masks.full()], [1]), ValueError, "0 to 0"),
    "no mask": (lambda: masks.causal() & True, TypeError, "got bool"),
    "and": (lambda: masks.causal() and masks.full(), TypeError, "& | ~"),
    "not a rule": (lambda: masks.predicate(3), TypeError, "function"),
    "and in a rule": (
        lambda: masks.predicate(lambda q, k: q < k and k < 5).density(9, 9), TypeError, "a rule may use",
    ),
    "another function in a rule": (
        lambda: masks.predicate(lambda q, k: jnp.abs(q - k) < 5).density(9, 9), TypeError, "a rule may use",
    ),
    "a traced divisor": (
        lambda: masks.predicate(lambda q, k: q % jnp.array(3) == k % 3).density(9, 9), ValueError, "constants",
    ),
    "batches that differ": (
        lambda: (masks.prefix(np.ones(2, int)) & masks.prefix(np.ones(3, int))).table(4, 4), ValueError, "batch",
    ),
    "no queries": (lambda: masks.full().table(0, 4), ValueError, "at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_a_mask_says_what_it_is():
    assert repr((masks.sink(4) | masks.window(8, 0)) & ~masks.causal()) == "((sink(4) | window(8, 0)) & ~causal(0))"
    assert masks.causal() == masks.causal() and hash(masks.sink(2)) == hash(masks.sink(2))
    assert functools.reduce(lambda a, b: a | b, [masks.sink(1), masks.sink(2)]) != masks.sink(1)
