"""Kernels of the attention: in the interpreter on a CPU, lowered for CUDA, and (marked gpu) on a device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._bits import seed_words
from pallas_kernels.flash_attention import BlockList, Elements, kernel
from pallas_kernels.flash_attention import lists as lists_module
from pallas_kernels.flash_attention.scores import stays
from pallas_kernels.flash_attention.shapes import SHAPES

REDUCE = {"sum": lambda p, s: p.sum((2, 3)), "max": lambda p, s: p.max((2, 3)), "max_logit": lambda p, s: s.max((2, 3))}


def lists(dense, blocks, *, of_keys=False, bits=False, flags=None):
    """Returns the lists of a table bool ``[Bm, Hm, S, T]`` (edge blocks are partial) and, asked for, its bit tables."""
    bq, bk = blocks
    n, m = (-(-size // block) for size, block in zip(dense.shape[2:], blocks))
    padded = np.zeros((*dense.shape[:2], n * bq, m * bk), bool)
    padded[:, :, : dense.shape[2], : dense.shape[3]] = dense
    tiles = padded.reshape(*dense.shape[:2], n, bq, m, bk).swapaxes(3, 4)
    some, every = tiles.any((4, 5)), tiles.all((4, 5))
    number = np.cumsum(some & ~every).reshape(some.shape) - 1
    chosen = tiles[some & ~every].reshape(-1, bq // 32, 32, bk).astype(np.uint32)
    words = (chosen << np.arange(32, dtype=np.uint32)[:, None]).sum(2, dtype=np.uint32)
    facts = [some, every, number, np.zeros_like(number) if flags is None else np.broadcast_to(flags, some.shape)]
    if of_keys:
        facts = [x.swapaxes(2, 3) for x in facts]
    some, every, number, flag = facts
    shape = (*some.shape[:3], max(1, some.sum(3).max()))
    index, pointer, flagged = (np.zeros(shape, np.int32) for _ in range(3))
    for place in itertools.product(*map(range, shape[:3])):
        entries = np.concatenate([np.flatnonzero(every[place]), np.flatnonzero(some[place] & ~every[place])])
        index[place][: len(entries)] = entries
        pointer[place][: len(entries)] = np.maximum(number[place][entries], 0)
        flagged[place][: len(entries)] = flag[place][entries]
    made = BlockList(
        index,
        every.sum(3).astype(np.int32),
        some.sum(3).astype(np.int32),
        None if flags is None else flagged,
        pointer if bits else None,
    )
    return jax.tree.map(jnp.asarray, made), jnp.asarray(words)


def operands(batch, queries, keys, heads, key_heads, width, value_width=None, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, queries, heads, width),
        (batch, keys, key_heads, width),
        (batch, keys, key_heads, value_width or width),
    )
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def expected(q, k, v, dense, *, scale, softcap=None, score_mod=None, sink=None, kept=None, dropout=0.0):
    """Returns the result, lse, the weights and the scores ``[B, H, S, T]``, in float64."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    if score_mod is not None:
        places = (np.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(s.shape))
        s = np.asarray(score_mod(s, *places), np.float64)
    s = np.where(np.repeat(dense, s.shape[1] // dense.shape[1], 1), s, -np.inf)
    logits = s if sink is None else np.concatenate([s, np.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))], 3)
    peak = logits.max(3)
    base = np.where(np.isinf(peak), 0, peak)
    with np.errstate(divide="ignore"):
        lse = base + np.log(np.exp(logits - base[..., None]).sum(3))
    p = np.exp(s - np.where(np.isinf(lse), 0, lse)[..., None])
    weights = p if kept is None else p * kept / (1 - dropout)
    return np.einsum("bhqk,bkhd->bqhd", weights, v), lse.swapaxes(1, 2), p, s


def check(
    parts,
    dense,
    elements,
    by_query,
    by_key=None,
    *,
    blocks=(128, 128),
    reduces=REDUCE,
    tolerance=1e-2,
    pages=None,
    **options,
):
    """Compares the kernels, run as ``options`` say, with float64."""
    how = {name: options.pop(name) for name in ("interpret", "multiprocessors", "config") if name in options}
    q, k, v = parts
    options.setdefault("scale", q.shape[-1] ** -0.5)
    seed, rate = options.pop("seed", None), options.get("dropout", 0.0)
    kept = None
    if rate:
        places = np.ix_(*(np.arange(n, dtype=np.int32) for n in (q.shape[0], q.shape[2], q.shape[1], k.shape[1])))
        kept = np.asarray(stays(seed_words(seed), rate, q.shape[2], k.shape[1], *places))
    out, lse, p, s = expected(q, k, v, dense, kept=kept, **options)
    if pages is not None:
        k, v = (paged(x, blocks[1], pages) for x in (k, v))
    call = {"blocks": blocks, "pages": pages, **options, **how}
    made, made_lse = jax.jit(lambda *x: kernel.forward(*x, by_query, elements, seed=seed, **call))(q, k, v)
    assert made.dtype == q.dtype and made.shape == out.shape
    np.testing.assert_allclose(np.asarray(made, np.float64), out, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(made_lse, lse, atol=1e-4, rtol=1e-5)
    assert np.all(np.asarray(made)[~np.isfinite(lse)] == 0)
    if by_key is None:
        return
    call = {name: value for name, value in call.items() if name not in ("sink", "dropout", "config")}
    for reduce in reduces:
        shape = (p.shape[0], p.shape[1] // k.shape[2], k.shape[2], *p.shape[2:])
        grouped = (x.reshape(shape[0], shape[2], shape[1], *shape[3:]) for x in (p, s))
        found = kernel.column_sums(q, k, made_lse, by_key, elements, reduce=reduce, **call)
        np.testing.assert_allclose(found, REDUCE[reduce](*grouped), atol=2e-4, rtol=1e-4)


def paged(x, page, pages):
    """Returns the pool of pages that holds ``[B, T, ...]``; pages that nobody reads are NaN."""
    pool = np.full((int(pages.max()) + 2, page, *x.shape[2:]), np.nan, np.float32)
    pool[np.asarray(pages)] = np.asarray(x, np.float32).reshape(*pages.shape, page, *x.shape[2:])
    return jnp.asarray(pool, x.dtype)


def causal(queries, keys):
    """Returns bottom-right-aligned causal, its test and the table."""
    offset = keys - queries

    def test(q, k, rows, columns, flags):
        return k <= q + offset

    return test, np.tri(queries, keys, offset, dtype=bool)[None, None]


def documents(batch, size, seed=0):
    """Returns a causal mask of packed documents, by vectors that a test compares, and the table."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 4, (batch, 1, size)), axis=2).astype(np.int32)

    def test(q, k, rows, columns, flags):
        return (k <= q) & (rows[0] == columns[0])

    dense = (ids[:, :, :, None] == ids[:, :, None, :]) & np.tri(size, dtype=bool)
    return Elements((jnp.asarray(ids),), (jnp.asarray(ids),), None, test), dense


def alibi(s, b, h, q, k):
    return s - 0.05 * (h + 1) * jnp.abs(q - k)


INTERPRETED = {"interpret": True, "multiprocessors": 2}


@pytest.mark.parametrize("step, stages, turns, reduces", [(128, 2, True, ["sum"]), (64, 3, False, ["max_logit"])])
def test_tails_groups_and_rows_without_keys(step, stages, turns, reduces):
    """The last rows see no keys but those beyond T; neither S nor T is a multiple of a tile."""

    def test(q, k, rows, columns, flags):
        return k >= q - 50

    dense = np.asarray(test(np.arange(197)[:, None], np.arange(140)[None], (), (), None))[None, None]
    parts = operands(1, 197, 140, 2, 1, 64, 32)
    by_query, _ = lists(dense, (128, 128))
    by_key, _ = lists(dense, (128, 128), of_keys=True)
    config = kernel.Config(step, stages, turns)
    check(parts, dense, Elements(test=test), by_query, by_key, config=config, reduces=reduces, **INTERPRETED)


def test_vectors_sinks_softcap_and_score_mod():
    elements, dense = documents(2, 160)
    parts = operands(2, 160, 160, 2, 2, 32)
    by_query, _ = lists(dense, (128, 64))
    sink = jnp.asarray([0.5, -jnp.inf])
    options = {"softcap": 2.0, "score_mod": alibi, "sink": sink, "scale": 0.7}
    check(parts, dense, elements, by_query, blocks=(128, 64), **options, **INTERPRETED)


def test_a_bit_table_per_head_and_dropout():
    dense = np.random.default_rng(1).random((1, 2, 128, 256)) < 0.3
    dense[0, 0, :, 128:], dense[0, 1, :, :128] = True, False
    dense[0, 1, 5] = False
    parts = operands(1, 128, 256, 2, 1, 64)
    by_query, words = lists(dense, (128, 128), bits=True)
    by_key, _ = lists(dense, (128, 128), bits=True, of_keys=True)
    check(parts, dense, Elements(bits=words), by_query, by_key, reduces=["max"], dropout=0.25, seed=7, **INTERPRETED)


def test_pages_and_flags():
    """A page table in disorder; where a flag is set the mask is the window, else all keys."""
    rng = np.random.default_rng(2)
    flags = np.array([[[[1, 0, 0], [0, 1, 1]]]])
    q, k = np.arange(256)[:, None], np.arange(192)[None]
    window = np.abs(q - k) < 40
    spread = np.repeat(np.repeat(flags, 128, 2), 64, 3) == 1
    dense = np.where(spread, window, (q + k) % 3 > 0)

    def test(q, k, rows, columns, flags):
        return ((flags == 1) & (jnp.abs(q - k) < 40)) | ((flags == 0) & ((q + k) % 3 > 0))

    by_query, _ = lists(dense, (128, 64), flags=flags)
    pages = jnp.asarray(rng.permutation(3)[None], jnp.int32)
    parts = operands(1, 256, 192, 1, 1, 64, dtype=jnp.float16)
    check(parts, dense, Elements(test=test), by_query, blocks=(128, 64), pages=pages, **INTERPRETED)


def test_tiles_are_each_computed_once_in_balance():
    for lists_shape, batch, heads, blocks in (((1, 1, 7), 3, 4, 5), ((3, 1, 7), 3, 4, 132), ((1, 2, 5), 2, 4, 3)):
        tiles = batch * heads * lists_shape[2]
        work = kernel._Work(heads, lists_shape[2], tiles, min(blocks, tiles))
        totals = np.random.default_rng(0).integers(0, 9, lists_shape)
        order = kernel.tile_order(jnp.asarray(totals), batch, heads, heads)
        found = []
        for group in range(work.groups):
            group = jnp.int32(group)
            mine = [work.tile(jnp.int32(i), group, order) for i in range(int(work.count(group)))]
            found += [tuple(int(x) for x in tile) for tile in mine]
            assert abs(len(mine) - work.tiles / work.groups) < 1
        assert sorted(found) == list(itertools.product(range(batch), range(heads), range(lists_shape[2])))


@pytest.mark.slow
def test_no_operand_is_fetched_over_while_it_is_read(monkeypatch):
    """The interpreter does not watch what a product reads, so here it reads its operands a second time."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    product, parameters = kernel.plgpu.wgmma, kernel.plgpu.InterpretGPUParams

    def watched(acc, a, b):
        product(acc, a, b)
        a[...], b[...]
        kernel.plgpu.commit_smem()

    monkeypatch.setattr(kernel.plgpu, "wgmma", watched)
    monkeypatch.setattr(kernel.plgpu, "InterpretGPUParams", lambda: parameters(detect_races=True))
    test, dense = causal(200, 500)
    by_query, _ = lists(dense, (128, 128))
    by_key, _ = lists(dense, (128, 128), of_keys=True)
    parts = operands(1, 200, 500, 2, 1, 64)
    check(parts, dense, Elements(test=test), by_query, **INTERPRETED)
    assert not interpret_pallas_call.get_races().races_found
    q, k, _ = parts
    lse = jnp.zeros((1, 200, 2))
    kernel.column_sums(q, k, lse, by_key, Elements(test=test), blocks=(128, 128), scale=0.1, **INTERPRETED)
    assert not interpret_pallas_call.get_races().races_found
    elements, dense = documents(1, 500)
    by_query, _ = lists(dense, (128, 128))
    by_key, _ = lists(dense, (128, 128), of_keys=True)
    check(operands(1, 500, 500, 2, 1, 64), dense, elements, by_query, by_key, **INTERPRETED)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("kind", ["causal", "window", "random"])
@pytest.mark.parametrize("together", [4, 16])
def test_blocks_get_like_amounts(kind, together):
    rows = {
        "causal": np.arange(1, 129),
        "window": np.minimum(np.arange(1, 129), 9),
        "random": np.random.default_rng(0).binomial(256, 0.05, 256),
    }[kind]
    n = len(rows)
    order = np.asarray(kernel.tile_order(jnp.asarray(rows, jnp.int32)[None, None], 1, 16, together))
    np.testing.assert_array_equal(np.sort(order), np.arange(16 * n))
    np.testing.assert_array_equal(np.sort(order[: n * together]), np.arange(together * n))
    work = kernel._Work(16, n, 16 * n, 132)
    steps = np.arange(-(-work.tiles // 132))

    def amount(group):
        mine = int(work.count(jnp.int32(group)))
        _, _, place = work.tile(jnp.asarray(steps[:mine], jnp.int32), jnp.int32(group), jnp.asarray(order))
        return rows[np.asarray(place)].sum()

    amounts = [amount(group) for group in range(132)]
    assert max(amounts) < (1.02 if together == 16 or kind != "window" else 1.08) * np.mean(amounts)


def test_tiles_of_lists_that_differ_by_head_come_by_length():
    totals = np.random.default_rng(0).integers(0, 9, (2, 2, 5)).astype(np.int32)
    order = np.asarray(kernel.tile_order(jnp.asarray(totals), 2, 4, 4))
    lengths = np.repeat(totals, 2, 1).reshape(-1)[order]
    np.testing.assert_array_equal(np.sort(order[:20]), np.arange(20))
    assert (np.diff(lengths[:20]) >= 0).all() and (np.diff(lengths[20:]) <= 0).all()


def test_heads_that_read_the_same_stay_together():
    lists = BlockList(*(np.zeros((1, 1, 4, *tail), np.int32) for tail in ((2,), (), ())), None, None)
    none = Elements()
    assert lists_module.heads_together(lists, none, 32, 4, 2**30) == 32
    lists = lists._replace(flags=np.zeros((1, 1, 4, 2), np.int32))
    assert [lists_module.heads_together(lists, none, 32, 4, lists_module.L2_BYTES // n) for n in (1, 2, 4, 100)] == [
        4,
        8,
        16,
        32,
    ]
    assert lists_module.heads_together(lists, none, 6, 1, lists_module.L2_BYTES // 4) == 3


def test_what_the_kernel_cannot_take_is_said():
    S = jax.ShapeDtypeStruct
    q, k = S((1, 64, 4, 64), jnp.bfloat16), S((1, 64, 2, 64), jnp.bfloat16)
    assert kernel.unsupported(q, k, k, blocks=(128, 64)) is None
    assert "float32" in kernel.unsupported(S(q.shape, jnp.float32), k, k, blocks=(128, 128))
    assert "heads of 64 and 40" in kernel.unsupported(q, k, S((1, 64, 2, 40), jnp.bfloat16), blocks=(128, 128))
    assert "blocks of 64 queries" in kernel.unsupported(q, k, k, blocks=(64, 128))
    assert "blocks of 64 keys" in kernel.unsupported(q, k, blocks=(128, 64), keys_have_lists=True)
    assert kernel.unsupported(q, k, k, blocks=(128, 64), score_mod=alibi) is None
    slope = jnp.float32(0.5)
    reads = kernel.unsupported(q, k, k, blocks=(128, 64), score_mod=lambda s, b, h, q, k: s * slope)
    assert "reads arrays" in reads
    power = kernel.unsupported(q, k, k, blocks=(128, 64), score_mod=lambda s, b, h, q, k: jnp.abs(s) ** 1.5)
    assert "takes pow" in power
    assert "pages of 64" in kernel.unsupported(q, k, k, blocks=(128, 128), pages=S((1, 1), jnp.int32))


def test_every_width_fits_in_shared_memory():
    for width, value_width in itertools.product((32, 64, 96, 128, 192, 256), (0, 32, 64, 96, 128, 192, 256)):
        for block in (64, 128, 256):
            config = kernel.heuristic(width, value_width, block)
            assert config.stages >= 2 and kernel.smem_bytes(config, width, value_width) <= kernel.SHARED_BYTES


def lower(shape, elements, by_query, by_key, *, blocks=(128, 128), value_width=None, pages=None, **options):
    S = jax.ShapeDtypeStruct
    batch, heads, key_heads, length, width, _ = shape
    q = S((batch, length, heads, width), jnp.bfloat16)
    k, v = (S((batch, length, key_heads, w), jnp.bfloat16) for w in (width, value_width or width))
    if pages is not None:
        k, v = (S((8, blocks[1], key_heads, x.shape[3]), jnp.bfloat16) for x in (k, v))
    lse = S((batch, length, heads), jnp.float32)
    options["scale"] = 0.1

    def run(q, k, v, lse, by_query, by_key, elements, pages):
        out = kernel.forward(q, k, v, by_query, elements, blocks=blocks, pages=pages, **options)
        rest = {name: value for name, value in options.items() if name not in ("sink", "dropout", "seed")}
        if blocks[1] != 128:
            return out
        return out, [
            kernel.column_sums(q, k, lse, by_key, elements, blocks=blocks, pages=pages, reduce=reduce, **rest)
            for reduce in (["max_logit"] if options.get("softcap") else ["sum"])
        ]

    traced = jax.jit(run).trace(q, k, v, lse, by_query, by_key, elements, pages)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def spec_lists(shape, batch=1, heads=1, *, block=128, flags=False, pointer=False):
    S, n, m = jax.ShapeDtypeStruct, -(-shape.length // 128), -(-shape.length // block)
    numbers = S((batch, heads, n), jnp.int32)
    index = S((batch, heads, n, m), jnp.int32)
    return BlockList(index, numbers, numbers, index if flags else None, index if pointer else None)


SAME_PROGRAM = ("causal-16k", "window-1024-16k", "blocks-0.05-32k", "blocks-0.1-32k")  # but for sizes, as another one


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SAME_PROGRAM else ()) for name in SHAPES]
)
def test_every_benchmark_shape_lowers_for_cuda(name):
    shape = SHAPES[name]
    kind = shape.mask[0]
    rows = ()
    if kind == "documents":
        rows = (jax.ShapeDtypeStruct((shape.batch, 1, shape.length), jnp.int32),)

    def test(q, k, rows, columns, flags):
        if kind == "window":
            return (k <= q) & (q - k < shape.mask[1])
        if kind == "window and sinks":
            return (k <= q) & ((q - k < shape.mask[1]) | (k < shape.mask[2]))
        return (k <= q) & (rows[0] == columns[0]) if rows else k <= q

    made = spec_lists(shape, shape.batch if rows else 1)
    lower(shape, Elements(rows, rows, None, None if kind == "blocks" else test), made, made)


@pytest.mark.parametrize(
    "width, value_width",
    [(96, 96), (192, 128), *(pytest.param(w, x, marks=pytest.mark.slow) for w, x in ((64, 64), (128, 64), (256, 256)))],
)
def test_every_option_lowers_for_cuda(width, value_width):
    shape = SHAPES["causal-8k"]._replace(batch=2, heads=4, key_heads=2, length=1003, head_dim=width)
    S = jax.ShapeDtypeStruct

    def test(q, k, rows, columns, flags):
        near = (q // 7 == k // 7) | ((q - k) % 5 == 0) ^ (rows[0] < columns[0])
        return near & ~((flags & 1) == 1) | ((q >> 2) <= k)

    facts = (S((2, 2, 1003), jnp.int32),)
    options = {"softcap": 30.0, "score_mod": alibi, "sink": jnp.zeros(4), "dropout": 0.1, "seed": 3}
    made = spec_lists(shape, 2, 4, flags=True)
    lower(shape, Elements(facts, facts, None, test), made, made, value_width=value_width, **options)
    made = spec_lists(shape, 1, 2, pointer=True)
    bits = Elements(bits=S((9, 4, 128), jnp.uint32))
    lower(shape, bits, made, made, value_width=value_width, pages=S((2, 8), jnp.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("width, value_width", [(64, 64), (96, 96), (128, 128), (128, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize("turns", [True, False])
def test_the_kernels_on_a_device(width, value_width, turns):
    config = kernel.heuristic(width, value_width)
    config = kernel.Config(config.step, config.stages, turns)
    for queries, keys, heads, key_heads in ((1, 1, 2, 2), (127, 129, 4, 1), (1000, 1000, 8, 2), (513, 2048, 4, 4)):
        test, dense = causal(queries, keys)
        parts = operands(2, queries, keys, heads, key_heads, width, value_width)
        by_query, _ = lists(dense, (128, 128))
        by_key, _ = lists(dense, (128, 128), of_keys=True)
        for options in ({}, {"softcap": 5.0, "score_mod": alibi, "sink": jnp.linspace(-1, 1, heads)}):
            check(parts, dense, Elements(test=test), by_query, by_key, config=config, tolerance=2e-2, **options)
    elements, dense = documents(2, 1500)
    parts = operands(2, 1500, 1500, 4, 2, width, value_width, jnp.float16)
    by_query, _ = lists(dense, (128, 128))
    by_key, _ = lists(dense, (128, 128), of_keys=True)
    check(parts, dense, elements, by_query, by_key, config=config, tolerance=2e-2)


@pytest.mark.gpu
def test_bits_dropout_and_pages_on_a_device():
    rng = np.random.default_rng(3)
    dense = rng.random((1, 4, 640, 896)) < 0.5
    dense &= np.repeat(np.repeat(rng.random((1, 4, 5, 7)) < 0.4, 128, 2), 128, 3)
    dense |= np.repeat(np.repeat(rng.random((1, 4, 5, 7)) < 0.2, 128, 2), 128, 3)
    parts = operands(1, 640, 896, 4, 2, 128)
    by_query, words = lists(dense, (128, 128), bits=True)
    by_key, _ = lists(dense, (128, 128), bits=True, of_keys=True)
    pages = jnp.asarray(rng.permutation(7)[None], jnp.int32)
    check(parts, dense, Elements(bits=words), by_query, by_key, tolerance=2e-2, pages=pages)
    check(parts, dense, Elements(bits=words), by_query, tolerance=2e-2, dropout=0.25, seed=5)
