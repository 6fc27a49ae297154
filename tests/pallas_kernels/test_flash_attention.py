"""Block-sparse attention by XLA against S x T scores in float32: values, every gradient, and limit cases."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention as flash
from pallas_kernels.flash_attention import BlockList, Elements, reference
from tests.random_views import array


def lists_of(mask, blocks, by_key=False):
    """Returns the exact lists of a bool table ``[Bm, Hm, S, T]`` and where in ``bits_of`` a partial block lies."""
    batch, heads, *sizes = mask.shape
    counts = [-(-n // block) for n, block in zip(sizes, blocks)]
    whole = np.pad(mask, [(0, 0), (0, 0), *((0, c * b - n) for c, b, n in zip(counts, blocks, sizes))])
    tiles = whole.reshape(batch, heads, counts[0], blocks[0], counts[1], blocks[1])
    some = tiles.any((3, 5))
    beyond = np.arange(whole.shape[2])[:, None] >= np.full(whole.shape[3], sizes[0])
    every = (tiles | beyond.reshape(tiles.shape[2:])).all((3, 5))  # never where keys end within the block
    number = (np.cumsum(some & ~every) - 1).reshape(some.shape)
    if by_key:
        some, every, number = (x.swapaxes(2, 3) for x in (some, every, number))
    order = np.argsort(np.where(every, 0, np.where(some, 1, 2)), axis=-1, kind="stable").astype(np.int32)
    pointer = np.maximum(np.take_along_axis(number, order, -1), 0).astype(np.int32)
    counted = [x.sum(-1).astype(np.int32) for x in (every, some)]
    return BlockList(*map(jnp.asarray, (order, *counted)), pointer=jnp.asarray(pointer)), tiles, some, every


def bits_of(mask, blocks):
    _, tiles, some, every = lists_of(mask, blocks)
    partial = tiles.transpose(0, 1, 2, 4, 3, 5)[some & ~every].reshape(-1, blocks[0] // 32, 32, blocks[1])
    bits = (partial.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(2).astype(np.uint32)
    return Elements(bits=jnp.asarray(bits if len(bits) else np.zeros((1, *bits.shape[1:]), np.uint32)))


def summary(mask, blocks, elements=None):
    """Returns by_query, by_key and the elements of a bool table."""
    by_query, by_key = (lists_of(mask, blocks, by_key)[0] for by_key in (False, True))
    if elements is not None:
        by_query, by_key = (x._replace(pointer=None) for x in (by_query, by_key))
    return by_query, by_key, elements or bits_of(mask, blocks)


def operands(b, s, t, h, hk, d, dv, dtype=jnp.float32):
    shapes = ((b, s, h, d), (b, t, hk, d), (b, t, hk, dv), (b, s, h, dv))
    return tuple(array(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))


def everything(implementation, q, k, v, do, dlse, sink, parts, reduce=(), **settings):
    """Returns the result, lse, every gradient, and the mass per key reduced in some ways."""
    by_query, by_key, elements = parts
    settings["implementation"] = implementation
    out, lse = flash.forward(q, k, v, by_query, elements, sink=sink, **settings)
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    args = q, k, v, do, lse, delta
    dq = flash.query_gradient(*args, by_query, elements, **settings)
    dk, dv = flash.key_value_gradients(*args, by_key, elements, **settings)
    settings = {name: x for name, x in settings.items() if name not in ("dropout", "seed")}
    sums = [flash.column_sums(q, k, lse, by_key, elements, reduce=how, **settings) for how in reduce]
    return out, lse, dq, dk, dv, *sums


def dense(mask, q, k, v, sink, scale, softcap=None, score_mod=None):
    """Returns softmax attention under a bool table, written once more."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, 2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if score_mod is not None:
        s = score_mod(s, *(jnp.asarray(x) for x in np.ix_(*(np.arange(n, dtype=np.int32) for n in s.shape))))
    mask = jnp.repeat(mask, q.shape[2] // mask.shape[1], 1) if mask.shape[1] > 1 else mask
    e = jnp.where(mask, jnp.exp(s), 0)
    total = e.sum(-1, keepdims=True) + (0 if sink is None else jnp.exp(sink)[:, None, None])
    some = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(some))[..., 0]
    return jnp.einsum("bhqk,bkhd->bqhd", e / some, v), jnp.moveaxis(lse, 1, 2)


def assert_close(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance, tolerance)


def alibi(s, b, h, q, k):
    return s * (1 + 0.1 * b) - 0.05 * (h + 1) * jnp.abs(q - k)


def random_mask(b, h, s, t, blocks, seed=0):
    """Returns a table with blocks that are empty, full and mixed, and rows with no keys."""
    rng = np.random.default_rng(seed)
    grid = rng.choice([0.0, 0.5, 1.0], (b, h, -(-s // blocks[0]), -(-t // blocks[1])))
    mask = rng.random((b, h, s, t)) < grid.repeat(blocks[0], 2).repeat(blocks[1], 3)[:, :, :s, :t]
    mask[:, :, :: max(2, s // 3)] = False
    return mask


class Case(NamedTuple):
    """Batches and heads of a mask, heads of queries and keys, and what is done to the scores."""

    mask: tuple[int, int]
    heads: tuple[int, int] = (8, 2)
    sink: bool = False
    softcap: float | None = None
    score_mod: Any = None


CASES = {
    "shared": Case((1, 1)),
    "per batch": Case((2, 1), softcap=2.0),
    "per key head": Case((1, 2), sink=True, softcap=3.0, score_mod=alibi),
    "per head": Case((2, 8), sink=True),
    "multi-query": Case((1, 4), (4, 1), score_mod=alibi),
}
SAMPLE = ("per key head", "per head")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in CASES])
def test_xla_and_the_reference_are_dense_attention(name):
    case = CASES[name]
    heads = case.heads
    b, s, t, blocks = 2, 65, 79, (32, 16)
    mask = random_mask(*case.mask, s, t, blocks)
    q, k, v, do = operands(b, s, t, *heads, 8, 12)
    sink, dlse = (array(9, heads[0]) if case.sink else None), array(8, b, s, heads[0])
    scores = {"scale": 0.3, "softcap": case.softcap, "score_mod": case.score_mod}
    parts, reduce = summary(mask, blocks), ("sum", "max", "max_logit") if name == "per head" else ("sum",)
    extra = scores | {"reduce": reduce, "blocks": blocks}
    run = functools.partial(everything, q=q, k=k, v=v, do=do, dlse=dlse, sink=sink, parts=parts, **extra)
    actual, expected = (jax.jit(functools.partial(run, how))() for how in ("xla", "reference"))
    assert_close(actual, expected)

    some = np.asarray(expected[1] > -np.inf)
    (out, lse), back = jax.vjp(jax.jit(lambda *a: dense(mask, *a, sink, **scores)), q, k, v)
    assert_close(actual[:2], (out, lse))
    assert_close(actual[2:5], back((do, jnp.where(some, dlse, 0))))
    none = ~some
    assert none.any() == (sink is None) and (actual[0][none] == 0).all() and (actual[2][none] == 0).all()


TAILS = list(itertools.product([1, 63, 65, 129], repeat=2))
SAMPLED_TAILS = ((1, 65), (129, 63))


@pytest.mark.parametrize(
    "s, t", [pytest.param(*c, marks=() if c in SAMPLED_TAILS else pytest.mark.slow) for c in TAILS]
)
def test_tails(s, t):
    """A mask by rule, a window that ends 20 keys back; it holds for keys beyond T, which take no part."""
    blocks = (32, 64)
    rule = Elements(test=lambda q, k, rows, columns, flags: k >= q + (t - s - 20))
    mask = (np.arange(t) >= np.arange(s)[:, None] + t - s - 20)[None, None]
    q, k, v, do = operands(1, s, t, 4, 1, 8, 8)
    dlse = array(8, 1, s, 4)
    parts = summary(mask, blocks, rule)
    run = functools.partial(everything, q=q, k=k, v=v, do=do, dlse=dlse, sink=None, parts=parts, blocks=blocks, scale=1)
    assert_close(*(jax.jit(functools.partial(run, how))() for how in ("xla", "reference")))


def test_facts_of_rows_and_columns_and_flags():
    """Documents per batch, heads that look back differently, and a selection of blocks as flags."""
    b, s, hk, g, blocks = 2, 64, 2, 2, (32, 16)
    segments = np.sort(np.random.default_rng(0).integers(0, 3, (b, 1, s)).astype(np.int32), -1)
    back = np.asarray([5, 60, 20, 9], np.int32).reshape(1, 4, 1) + np.zeros((1, 4, s), np.int32)
    selected = np.random.default_rng(1).random((1, hk, 2, 4)) < 0.7

    def test(q, k, rows, columns, flags):
        return (rows[0] == columns[0]) & (q - k < rows[1]) & (flags & 1 == 1)

    chosen = selected.repeat(32, 2).repeat(16, 3).repeat(g, 1)
    q, k = np.ix_(range(s), range(s))
    mask = (segments[..., None] == segments[..., None, :]) & (q - k < back[..., None]) & chosen
    by_query, by_key, elements = summary(mask, blocks, Elements((segments, back), (segments,), None, test))
    grid = selected.repeat(g, 1)[np.zeros((b, 1), int), np.arange(4)[None]].astype(np.int32)
    by_query = by_query._replace(flags=jnp.take_along_axis(grid, by_query.index, -1))
    by_key = by_key._replace(flags=jnp.take_along_axis(grid.swapaxes(2, 3), by_key.index, -1))
    q, k, v, do = operands(b, s, s, 4, hk, 8, 8)
    extra = {"parts": (by_query, by_key, elements), "blocks": blocks, "scale": 0.5}
    run = functools.partial(everything, q=q, k=k, v=v, do=do, dlse=array(8, b, s, 4), sink=None, **extra)
    actual, expected = (jax.jit(functools.partial(run, how))() for how in ("xla", "reference"))
    assert_close(actual, expected)
    assert_close(actual[:2], dense(mask, q, k, v, None, 0.5))


def test_dropout_keeps_the_mean_and_both_directions_agree():
    s, blocks = 48, (32, 16)
    q, k, v, do = operands(2, s, s, 4, 2, 8, 8)
    parts = summary(np.tril(np.ones((1, 1, s, s), bool)), blocks)
    settings = {"blocks": blocks, "scale": 0.3, "dropout": 0.4}
    run = functools.partial(everything, q=q, k=k, v=v, do=do, dlse=array(8, 2, s, 4), sink=None, parts=parts)
    actual, expected = (jax.jit(functools.partial(run, how, seed=7, **settings))() for how in ("xla", "reference"))
    assert_close(actual, expected)
    plain, lse = flash.forward(q, k, v, parts[0], parts[2], blocks=blocks, scale=0.3)
    np.testing.assert_allclose(actual[1], lse, 1e-5)

    def sample(key):
        return flash.forward(q, k, v, parts[0], parts[2], seed=key, **settings)[0]

    found = jax.lax.map(sample, jax.random.split(jax.random.key(0), 400)).mean(0)
    assert jnp.linalg.norm(found - plain) < 0.08 * jnp.linalg.norm(plain)
    weights = flash.forward(q, k, jnp.ones_like(v), parts[0], parts[2], seed=3, **settings)[0]
    assert abs(float(weights.mean()) - 1) < 0.05 and float(weights.std()) > 0.1

    def loss(v):  # linear in v, so its gradient is exact if both directions drop the same weights
        return jnp.vdot(flash.forward(q, k, v, parts[0], parts[2], seed=7, **settings)[0], do)

    assert abs(float(jnp.vdot(actual[4], v) - loss(v))) < 1e-3


def test_pages_are_their_gathered_keys():
    b, s, page, pool = 2, 32, 16, 7
    pages = jnp.asarray([[5, 0, 3], [2, 0, 6]], jnp.int32)  # the two share a page
    q, _, _, do = operands(b, s, 1, 4, 2, 8, 8)
    k, v = array(5, pool, page, 2, 8), array(6, pool, page, 2, 8)
    mask = random_mask(b, 1, s, 48, (32, page), seed=3)
    parts = summary(mask, (32, page))
    extra = {"do": do, "dlse": jnp.zeros((b, s, 4)), "sink": None, "parts": parts, "blocks": (32, page), "scale": 0.4}

    def gather(x):
        return x[pages].reshape(b, -1, *x.shape[2:])

    plain = jax.jit(functools.partial(everything, "xla", **extra))(q, gather(k), gather(v))
    for how in ("xla", "reference"):
        found = jax.jit(functools.partial(everything, how, **extra, pages=pages))(q, k, v)
        back = [jax.vjp(gather, x)[1](dx)[0] for x, dx in zip((k, v), plain[3:5])]
        assert_close(found, (*plain[:3], *back, *plain[5:]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_sixteen_bits_are_as_exact_as_plain_attention_in_them(dtype):
    s, blocks = 64, (32, 32)
    mask = np.tril(np.ones((1, 1, s, s), bool))
    *inputs, do = operands(2, s, s, 4, 4, 32, 32, dtype)

    def plain(q, k, v):
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * 0.2
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, s, -jnp.inf)).astype(dtype), v)

    @jax.jit
    def run(*inputs):
        wide = [x.astype(jnp.float32) for x in (*inputs, do)]
        exact, back = jax.vjp(lambda *a: dense(mask, *a, None, 0.2)[0], *wide[:3])
        other, other_back = jax.vjp(plain, *inputs)
        zero = jnp.zeros((2, s, 4))
        out, _, *gradients = everything("xla", *inputs, do, zero, None, summary(mask, blocks), blocks=blocks, scale=0.2)
        return (out, *gradients), (other, *other_back(do)), (exact, *back(wide[3]))

    for found, other, exact in zip(*run(*inputs), strict=True):
        assert found.dtype == dtype
        assert jnp.linalg.norm(found - exact) <= 1.5 * jnp.linalg.norm(other - exact)


def test_merge_joins_keys_in_any_order():
    q, k, v, _ = operands(1, 32, 96, 2, 2, 8, 8)
    mask = random_mask(1, 1, 32, 96, (32, 32), seed=1)
    mask[:, :, 3] = False
    whole = dense(mask, q, k, v, None, 0.3)
    parts = [dense(mask[..., i : i + 32], q, k[:, i : i + 32], v[:, i : i + 32], None, 0.3) for i in (0, 32, 64)]
    assert_close(flash.merge(flash.merge(*parts[:2]), parts[2]), whole)
    assert_close(flash.merge(parts[2], flash.merge(*parts[1::-1])), whole)
    nothing = jnp.zeros_like(parts[0][0]), jnp.full_like(parts[0][1], -jnp.inf)
    assert_close(flash.merge(nothing, parts[0]), parts[0], 1e-6)
    gradient = jax.grad(lambda out, lse: flash.merge((out, lse), nothing)[0].sum(), (0, 1))(*nothing)
    assert all(jnp.isfinite(x).all() for x in gradient)


def test_the_table_of_the_reference_is_the_mask():
    mask = random_mask(2, 2, 65, 79, (32, 16))
    by_query, by_key, elements = summary(mask, (32, 16))
    for lists, keys in ((by_query, False), (by_key, True)):
        found = reference.table(lists, elements, (32, 16), (65, 79), 4, keys)
        np.testing.assert_array_equal(found, mask.repeat(2, 1))


def test_operands_that_do_not_fit():
    q, k, v, _ = operands(1, 32, 32, 4, 2, 8, 8)
    by_query, _, elements = summary(np.ones((1, 1, 32, 32), bool), (32, 32))
    run = functools.partial(flash.forward, by_query=by_query, elements=elements, blocks=(32, 32), scale=1.0)
    with pytest.raises(ValueError, match="multiple of Hk"):
        run(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="beside k"):
        run(q, k, v[:, :-1])
    with pytest.raises(ValueError, match=r"sink logit per query head, \[4\]"):
        run(q, k, v, sink=jnp.zeros(2))
    with pytest.raises(ValueError, match="lists"):
        run(q, k, v, blocks=(16, 32))
    with pytest.raises(ValueError, match="needs a seed"):
        run(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="keys per block are those of a page"):
        run(q, k, v, pages=jnp.zeros((1, 1), jnp.int32), blocks=(32, 16))
    with pytest.raises(ValueError, match="'reference' or None, got 'triton'"):
        run(q, k, v, implementation="triton")
    with pytest.raises(ValueError, match="expected lse"):
        flash.column_sums(q, k, jnp.zeros((1, 4, 32)), by_query, elements, blocks=(32, 32), scale=1.0)


def test_a_score_mod_is_not_asked_about_positions_that_there_are_not():
    """Where it would be NaN, which no mask takes back."""
    sizes = (17, 21)

    def rule(s, b, h, q, k):
        return s + jnp.log((sizes[0] - q) * (sizes[1] - k).astype(jnp.float32))

    args = operands(1, *sizes, 2, 2, 16, 16)
    blocks = (32, 16)
    mask = random_mask(1, 1, *sizes, blocks)
    dlse = array(9, 1, sizes[0], 2)
    parts = summary(mask, blocks)
    found = everything("xla", *args, dlse, None, parts, ("sum",), blocks=blocks, scale=0.3, score_mod=rule)
    assert all(np.isfinite(np.where(x == -jnp.inf, 0, x)).all() for x in found)
