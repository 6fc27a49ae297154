"""Gradient kernels of attention: in the interpreter on a CPU, lowered for CUDA, and (marked gpu) on a device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._bits import seed_words
from pallas_kernels.flash_attention import BlockList, Elements, backward, key_value_gradients, query_gradient
from pallas_kernels.flash_attention.scores import stays

SEED = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, the mask (a table bool ``[B|1, H|Hk|1, S, T]`` and how a kernel reads it) and options."""

    sizes: tuple[int, ...]  # B, S, T, H, Hk, D, Dv
    mask: str = "causal"
    blocks: tuple[int, int] = (64, 64)
    softcap: float | None = None
    score_mod: object = None
    dropout: float = 0.0
    dtype: object = jnp.bfloat16


def causal(q, k, rows, columns, flags):
    return k <= q


def everything(q, k, rows, columns, flags):
    return q >= 0


def segments(q, k, rows, columns, flags):
    return (rows[0] == columns[0]) & (k <= q)


def chosen(q, k, rows, columns, flags):
    return (flags & 1 > 0) & (k <= q + 40)


def slanted(s, b, h, q, k):
    """A slope per head, then something whose derivative is no constant."""
    s = s + (h + 1) * 0.02 * (k - q).astype(jnp.float32)
    return s + 0.1 * s * s


def infinite(s, b, h, q, k):
    """Divides by zero beyond the last query and the last key of 130."""
    return s / jnp.sqrt(((129 - q) * (129 - k) + 1).astype(jnp.float32))


def table_of(case):
    """Returns the mask's table, and its rows, columns, test and selection."""
    b, s, t, h, hk, _, _ = case.sizes
    rng = np.random.default_rng(1)
    q, k = np.arange(s)[:, None], np.arange(t)[None]
    lower = k <= q
    if case.mask == "full":
        return np.ones((1, 1, s, t), bool), (), (), everything, None
    if case.mask == "causal":
        return lower[None, None], (), (), causal, None
    if case.mask == "window":
        near = functools.partial(_window, 70)
        return near(q, k, (), (), None)[None, None], (), (), near, None
    if case.mask == "segments":
        ids = np.sort(rng.integers(0, 4, (b, 1, s)), -1).astype(np.int32)
        other = np.sort(rng.integers(0, 4, (b, 1, t)), -1).astype(np.int32)
        return (ids[..., None] == other[..., None, :]) & lower, (ids,), (other,), segments, None
    if case.mask == "bits":
        return rng.random((b, h, s, t)) < 0.3, (), (), None, None
    assert case.mask == "selected"  # by key head
    (bq, bk), size = case.blocks, (1, hk, -(-s // case.blocks[0]), -(-t // case.blocks[1]))
    chosen_blocks = rng.random(size) < 0.6
    spread = np.repeat(np.repeat(chosen_blocks, bq, 2), bk, 3)[:, :, :s, :t]
    return spread & (k <= q + 40), (), (), chosen, chosen_blocks


def _window(width, q, k, rows, columns, flags):
    return (k <= q) & (q - k < width)


def lists_of(table, blocks, selected=None, bits=False):
    """Returns the lists by query and by key, and the bits, of a table."""
    b, h, s, t = table.shape
    grid = [-(-n // block) for n, block in zip((s, t), blocks)]
    wide = [np.zeros((b, h, grid[0] * blocks[0], grid[1] * blocks[1]), bool) for _ in range(2)]
    wide[1][:, :, s:] = True  # queries beyond the last make no block partial; keys do
    for x in wide:
        x[:, :, :s, :t] = table
    some, whole = (x.reshape(b, h, grid[0], blocks[0], grid[1], blocks[1]) for x in wide)
    parts = some.transpose(0, 1, 2, 4, 3, 5)
    words, numbers = None, np.zeros((b, h, *grid), np.int32)
    if bits:
        tables = parts.reshape(-1, blocks[0] // 32, 32, blocks[1]).astype(np.uint32)
        words = (tables << np.arange(32, dtype=np.uint32)[:, None]).sum(2, dtype=np.uint32)
        numbers = np.arange(numbers.size, dtype=np.int32).reshape(numbers.shape)
    some, whole = some.any((3, 5)), whole.all((3, 5))
    flags = np.zeros_like(numbers) if selected is None else np.broadcast_to(selected, numbers.shape).astype(np.int32)
    made = []
    for turn in (False, True):
        visit, full, number, flag = (np.swapaxes(x, 2, 3) if turn else x for x in (some, whole & some, numbers, flags))
        shape = visit.shape
        index = np.zeros(shape, np.int32)
        order = np.argsort(np.where(full, 0, np.where(visit, 1, 2)), axis=-1, kind="stable")
        index[:] = order
        total = visit.sum(-1, dtype=np.int32)
        pick = functools.partial(np.take_along_axis, indices=order, axis=-1)
        made.append(
            BlockList(
                index,
                full.sum(-1, dtype=np.int32),
                total,
                None if selected is None else pick(flag),
                pick(number) if bits else None,
            )
        )
    return *made, words


def attention(q, k, v, table, case, kept):
    """Returns the result and the log-sum-exp ``[B, H, S]`` in float32, with S x T scores."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / math.sqrt(q.shape[3])
    if case.softcap is not None:
        s = case.softcap * jnp.tanh(s / case.softcap)
    if case.score_mod is not None:
        b, h, i, j = np.ix_(*(np.arange(n, dtype=np.int32) for n in s.shape))
        s = case.score_mod(s, jnp.asarray(b), jnp.asarray(h), jnp.asarray(i), jnp.asarray(j))
    s = jnp.where(table, s, -jnp.inf)
    none = ~table.any(-1)
    lse = jax.nn.logsumexp(jnp.where(none[..., None], 0, s), -1)
    lse = jnp.where(none, -jnp.inf, lse)
    p = jnp.where(none[..., None], 0, jnp.exp(s - jnp.where(none, 0, lse)[..., None]))
    return jnp.einsum("bhqk,bkhd->bqhd", p * kept, v, precision="highest"), lse


def problem(case):
    """Returns the kernels' operands, lists and elements, and the gradients that a dense float32 attention has."""
    b, s, t, h, hk, d, dv = case.sizes
    rng = np.random.default_rng(0)
    shapes = ((b, s, h, d), (b, t, hk, d), (b, t, hk, dv), (b, s, h, dv))
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes)
    table, rows, columns, test, selected = table_of(case)
    by_query, by_key, words = lists_of(table, case.blocks, selected, case.mask == "bits")
    whole = np.repeat(table, h // table.shape[1] if table.shape[1] > 1 else 1, 1)
    kept = 1.0
    if case.dropout:
        places = (jnp.asarray(x, jnp.int32) for x in np.ix_(range(b), range(h), range(s), range(t)))
        kept = stays(seed_words(SEED), case.dropout, h, t, *places) / (1 - case.dropout)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    (out, lse), pull = jax.vjp(lambda *x: attention(*x, jnp.asarray(whole), case, kept), *wide)
    wanted = pull((do.astype(jnp.float32), jnp.zeros_like(lse)))
    delta = jnp.sum(out * do.astype(jnp.float32), -1)
    lse = jnp.moveaxis(jnp.broadcast_to(lse, (b, h, s)), 1, 2)
    used = jnp.broadcast_to(whole, (b, h, s, t))
    none = ~used.any(3).swapaxes(1, 2), ~used.reshape(b, hk, -1, t).any(2).swapaxes(1, 2)
    return (q, k, v, do, lse, delta), by_query, by_key, Elements(rows, columns, words, test), wanted, none


def options(case):
    made = {"blocks": case.blocks, "scale": 1 / math.sqrt(case.sizes[5])}
    made |= {"softcap": case.softcap, "score_mod": case.score_mod, "dropout": case.dropout}
    return made | {"seed": SEED if case.dropout else None}


def off(actual, wanted):
    return np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)


def check(case, rounding=4e-3, *, configs=(None, None), **how):
    operands, by_query, by_key, elements, wanted, none = problem(case)
    dq = backward.query_gradient(*operands, by_query, elements, config=configs[0], **options(case), **how)
    dk, dv = backward.key_value_gradients(*operands, by_key, elements, config=configs[1], **options(case), **how)
    for found, like, want, alone in zip((dq, dk, dv), operands, wanted, (none[0], none[1], none[1])):
        assert found.shape == like.shape and found.dtype == like.dtype
        assert off(found, np.asarray(want)) < rounding
        np.testing.assert_array_equal(np.asarray(found, np.float32)[np.asarray(alone)], 0)
    return dq, dk, dv


CASES = {
    "causal, two query heads a key head": Case((1, 128, 128, 2, 1, 64, 64)),
    "tails, S != T, D != Dv, two warpgroups": Case((2, 130, 75, 1, 1, 64, 128), "causal", (128, 128)),
    "nothing masked, T no multiple": Case((1, 70, 100, 1, 1, 128, 64), "full", (64, 128), dtype=jnp.float16),
    "documents, lists by batch": Case((2, 100, 128, 1, 1, 64, 64), "segments"),
    "a bit table, lists by query head": Case((1, 100, 80, 2, 1, 64, 64), "bits", (128, 64)),
    "chosen blocks by key head": Case((1, 190, 128, 2, 2, 64, 64), "selected"),
    "soft cap and a bent score": Case((1, 90, 70, 2, 1, 64, 64), softcap=2.0, score_mod=slanted),
    "a score that is infinite beyond the end": Case((1, 130, 130, 1, 1, 64, 64), "window", score_mod=infinite),
    "dropout": Case((1, 70, 128, 2, 1, 64, 64), dropout=0.3),
    "D 96": Case((1, 64, 64, 1, 1, 96, 96)),
    "D 192": Case((1, 128, 128, 1, 1, 192, 128), blocks=(128, 128)),
    "D 256": Case((1, 64, 128, 1, 1, 256, 256)),
}


QUICK = {
    "two query heads a key head, two warpgroups": Case((1, 70, 130, 2, 1, 64, 64), "causal", (128, 128), softcap=2.0),
    "a warpgroup for dK, one for dV": Case((1, 64, 64, 1, 1, 192, 128), dropout=0.2),
}


@pytest.mark.parametrize("name", QUICK)
def test_the_interpreted_gradients_are_those_of_dense_attention(name):
    check(QUICK[name], interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_interpreted_option_gives_the_gradients_of_dense_attention(name):
    check(CASES[name], interpret=True)


def test_what_the_kernels_cannot_take_is_said():
    def said(q=(1, 64, 2, 64), v=(1, 64, 2, 64), dtype=jnp.bfloat16, blocks=(64, 64), **options):
        operands = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q, q, v))
        return backward.backward_unsupported(*operands, blocks=blocks, **options)

    assert said() is None and said(score_mod=slanted, v=(1, 64, 2, 96)) is None
    assert "float32" in said(dtype=jnp.float32)
    assert "D is 320 and Dv 64" in said(q=(1, 64, 2, 320))
    assert "(32, 64)" in said(blocks=(32, 64))
    assert "pages" in said(pages=jnp.zeros((1, 1), jnp.int32))
    slopes = jnp.ones(2)
    assert "score_mod reads arrays" in said(score_mod=lambda s, b, h, q, k: s * slopes[h])
    operands, by_query, by_key, elements, *_ = problem(Case((1, 64, 64, 1, 1, 64, 64), dtype=jnp.float32))
    for run, lists in ((query_gradient, by_query), (key_value_gradients, by_key)):
        with pytest.raises(ValueError, match=r"gradients? kernel cannot run: q, k, v are float32"):
            run(*operands, lists, elements, blocks=(64, 64), scale=1.0, implementation="mosaic_gpu")


# B, S, T, H, Hk, D, Dv
SHAPES = {
    "causal 8k": (1, 8192, 8192, 16, 16, 128, 128),
    "Llama 8B": (1, 4096, 4096, 32, 8, 128, 128),
    "Llama 1B": (2, 2048, 2048, 32, 8, 64, 64),
    "Gemma": (1, 2048, 2048, 8, 4, 256, 256),
    "DeepSeek": (1, 2048, 2048, 16, 16, 192, 128),
    "D 96, odd lengths": (1, 1000, 1101, 4, 2, 96, 96),
}


def lower(sizes, elements, blocks, **options):
    """Lowers both kernels for lists of unknown content."""
    b, s, t, h, hk, d, dv = sizes
    S = jax.ShapeDtypeStruct
    q, k, v, do = (S(x, jnp.bfloat16) for x in ((b, s, h, d), (b, t, hk, d), (b, t, hk, dv), (b, s, h, dv)))
    row = S((b, s, h), jnp.float32)
    for run, n, m in (
        (backward.query_gradient, -(-s // blocks[0]), -(-t // blocks[1])),
        (backward.key_value_gradients, -(-t // blocks[1]), -(-s // blocks[0])),
    ):
        entries = S((1, 1, n, m), jnp.int32)
        lists = BlockList(entries, S((1, 1, n), jnp.int32), S((1, 1, n), jnp.int32), entries, entries)
        fixed = functools.partial(run, blocks=blocks, scale=0.1, **options)
        jax.jit(fixed).trace(q, k, v, do, row, row, lists, elements).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("name", SHAPES)
def test_every_benchmark_shape_lowers_for_cuda(name):
    sizes = SHAPES[name]
    lower(sizes, Elements(test=causal), (128, 128))
    for config, statistics in (
        (backward.query_config(*sizes[5:], 128), False),
        (backward.key_config(*sizes[5:], 128), True),
    ):
        assert config.stages >= 2
        assert backward.smem_bytes(config, *sizes[5:], statistics) <= 227 * 1024 - 1024


@pytest.mark.parametrize("mask", ["segments", "bits", "chosen", "score_mod and dropout", "none"])
def test_every_kind_of_mask_lowers_for_cuda(mask):
    S, options = jax.ShapeDtypeStruct, {}
    elements = Elements(test=causal)
    if mask == "segments":
        ids = S((2, 1, 1000), jnp.int32)
        elements = Elements((ids,), (ids,), test=segments)
    elif mask == "bits":
        elements = Elements(bits=S((9, 2, 128), jnp.uint32))
    elif mask == "chosen":
        elements = Elements(test=chosen)
    elif mask == "none":
        elements = Elements()
    else:
        options = {"softcap": 30.0, "score_mod": slanted, "dropout": 0.1, "seed": SEED}
    lower((2, 1000, 1000, 4, 2, 128, 64), elements, (64, 128), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *QUICK])
def test_every_option_on_a_device(name):
    check((CASES | QUICK)[name])


DEVICE = {
    "causal": Case((1, 1024, 1024, 4, 4, 128, 128), "causal", (128, 128)),
    "odd lengths, four query heads a key head": Case((2, 1001, 777, 8, 2, 128, 128), "causal", (128, 128)),
    "documents": Case((3, 1000, 1000, 4, 1, 128, 64), "segments", (128, 128)),
    "window": Case((1, 1500, 1500, 2, 2, 64, 64), "window", (128, 128), dtype=jnp.float16),
    "bits": Case((2, 500, 600, 4, 2, 128, 128), "bits", (128, 128)),
    "chosen": Case((1, 900, 900, 8, 4, 128, 128), "selected", (64, 64)),
    "all options": Case((1, 700, 700, 4, 2, 128, 128), "causal", (128, 128), 20.0, slanted, 0.2),
    "D 192": Case((1, 700, 700, 4, 4, 192, 128), "causal", (128, 128)),
    "D 256": Case((1, 700, 700, 4, 2, 256, 256), "causal", (128, 128)),
    "one row": Case((1, 1, 129, 2, 1, 128, 128), "full", (128, 128)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE)
def test_long_rows_on_a_device_and_twice_the_same(name):
    first, again = check(DEVICE[name]), check(DEVICE[name])
    for x, y in zip(first, again):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("stages", [2, 3])
def test_every_cut_on_a_device(stages):
    """Many steps through few slots, by one warpgroup and by two."""
    case = DEVICE["odd lengths, four query heads a key head"]
    for ours, theirs in (((1, 1), (1, 1)), ((2, 2), (1, 2)), ((2, 2), (2, 2))):
        check(case, configs=(backward.Config(*ours, stages), backward.Config(*theirs, stages)))
