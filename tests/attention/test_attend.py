"""attend: every input's gradient against S x T scores, what is kept, transforms, bytes, and what cannot run."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import remat
from memjax.attention import attend, column_sums, default_blocks, make_block_mask, masks, merge, online_softmax
from memjax.attention.choice import CudnnForm, cudnn_attention, cudnn_form, cudnn_is_taken
from memjax.attention.online import join
from memjax.core import compiled_bytes
from tests.attention.test_masks import random_mask
from tests.random_views import array

B, S, H, HK, D, DV = 2, 40, 4, 2, 8, 12
BLOCKS = (32, 16)


def operands(s=S, t=S, dtype=jnp.float32, h=H, hk=HK, b=B):
    return tuple(array(i, b, *shape, dtype=dtype) for i, shape in enumerate(((s, h, D), (t, hk, D), (t, hk, DV))))


def value_and_gradients(fn, *args):
    """Returns ``fn(*args)`` and the gradients for a cotangent that differs from element to element."""
    y, back = jax.vjp(fn, *args)
    return y, back(jax.tree.map(lambda x: jnp.cos(jnp.where(jnp.isfinite(x), x, 0)), y))


def assert_close(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, tolerance, tolerance)


def both(fn, *args):
    """Asserts that values and gradients of ``fn(implementation, *args)`` are those of the reference."""
    found = jax.jit(lambda *a: [value_and_gradients(functools.partial(fn, how), *a) for how in ("xla", "reference")])
    actual, expected = found(*args)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(actual[1]))
    assert_close(actual, expected)
    return actual


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))])
def test_random_composites_of_masks(seed):
    rng = np.random.default_rng(seed)
    s, t = (65, 79) if seed % 2 else (48, 48)
    mask = random_mask(rng, s, t)
    made = make_block_mask(mask, s, t, blocks=BLOCKS)
    q, k, v = operands(s, t)
    (out, lse), gradients = both(
        lambda how, *a: attend(*a, block_mask=made, return_lse=True, implementation=how), q, k, v
    )
    table = np.asarray(mask.table(s, t))
    table = np.broadcast_to(table.repeat(H // table.shape[1], 1), (B, H, s, t))
    scores = jnp.where(table, jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, 2)) / D**0.5, -jnp.inf)
    none = ~table.any(-1)
    weights = jnp.where(none[..., None], 0, jax.nn.softmax(jnp.where(none[..., None], 0, scores)))
    assert_close(out, jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, 2, 2)))
    empty = none.swapaxes(1, 2)
    assert (np.asarray(lse) == -np.inf).tolist() == empty.tolist()
    assert (np.asarray(out)[empty] == 0).all() and (np.asarray(gradients[0])[empty] == 0).all()
    unseen = ~table.reshape(B, HK, -1, s, t).any((2, 3)).swapaxes(1, 2)
    assert all((np.asarray(g)[unseen] == 0).all() for g in gradients[1:])


def test_sinks_caps_modified_scores_dropout_and_the_gradient_of_lse():
    q, k, v = operands()
    slopes = jnp.asarray([0.1, 0.2, 0.3, 0.4])

    def fn(how, q, k, v, sink):
        options = {"sink_logits": sink, "softcap": 3.0, "dropout": 0.3, "dropout_key": jax.random.key(1), "scale": 0.7}
        mod = lambda s, b, h, q, k: s - slopes[h] * jnp.abs(q - k)  # noqa: E731
        mask = masks.window(9, 0) | masks.sink(2)
        return attend(q, k, v, mask=mask, score_mod=mod, blocks=BLOCKS, return_lse=True, implementation=how, **options)

    both(fn, q, k, v, array(7, H))


def test_a_sink_of_no_weight_is_none_and_mass_adds_up_to_one():
    q, k, v = operands(16, 16)
    run = jax.jit(
        functools.partial(attend, mask=masks.causal(), return_lse=True, return_column_sums=True, blocks=(16, 16))
    )
    plain, lse, sums = run(q, k, v)
    assert_close(run(q, k, v, sink_logits=jnp.full(H, -jnp.inf)), (plain, lse, sums))
    _, lse, sums = run(q, k, v, sink_logits=jnp.ones(H))
    mass = sums.sum(-1).sum() + jnp.exp(1 - lse).sum()
    np.testing.assert_allclose(mass, B * 16 * H, 1e-5)


def test_a_segment_does_not_read_another():
    q, k, v = operands()
    ids = jnp.asarray(np.repeat([[0, 1], [0, 1]], S // 2, 1))

    @jax.jit
    def first(q, k, v, ids):
        fn = lambda *a: attend(*a, mask=masks.causal(), segment_ids=ids, blocks=(16, 16))[:, : S // 2]  # noqa: E731
        return value_and_gradients(fn, q, k, v)

    y, gradients = first(q, k, v, ids)
    for g in gradients:
        assert (g[:, S // 2 :] == 0).all() and (g[:, : S // 2] != 0).any()
    other = [jnp.concatenate([x[:, : S // 2], 100 * x[:, S // 2 :]], 1) for x in (q, k, v)]
    y_other, gradients_other = first(*other, ids)
    for a, b in zip((y, *gradients), (y_other, *gradients_other)):
        np.testing.assert_array_equal(a, b)


def test_what_is_kept():
    q, k, v = operands()
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (B, S))), jnp.int32)

    def kept(**options):
        back = jax.eval_shape(lambda *a: jax.vjp(lambda *a: attend(*a, blocks=BLOCKS, **options), *a)[1], q, k, v)
        return sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(back) if x.dtype == jnp.float32), back

    expected = sorted((x, "float32") for x in (q.shape, k.shape, v.shape, (B, S, H, DV), (B, S, H)))
    floats, back = kept(mask=masks.causal())
    assert floats == expected and len(jax.tree.leaves(back)) == 5
    floats, back = kept(mask=masks.causal() & masks.segments(ids))
    assert floats == expected
    assert max(x.size for x in jax.tree.leaves(back) if x.dtype != jnp.float32) <= B * S


def test_packed_residuals_are_those_of_the_arguments():
    q, k, v = operands(32, 32)
    f = lambda q, k, v: jnp.sin(attend(jnp.sin(q), jnp.sin(k), jnp.sin(v), mask=masks.causal(), blocks=(32, 32)))  # noqa: E731
    packed = remat.compress_residuals(f, remat.ResidualPolicy(bits=8, min_size=1), params=())
    exact, found = (jax.jit(functools.partial(value_and_gradients, g))(q, k, v) for g in (f, packed))
    assert_close(found[0], exact[0], 1e-6)
    for a, b in zip(found[1], exact[1]):
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


# ---- transforms -----------------------------------------------------------------------------------------------------


def cases():
    ids = jnp.asarray(np.repeat([[0, 0, 1, 1], [0, 1, 1, 2]], 4, 1), jnp.int32)[jnp.asarray([0, 1, 1, 0])]
    return {
        "window": lambda q, k, v, w, ids: attend(q, k, v * w, mask=masks.window(5, 0), blocks=(8, 8)),
        "documents": lambda q, k, v, w, ids: attend(q * w, k, v, segment_ids=ids, softcap=2.0, blocks=(8, 8)),
        "sink": lambda q, k, v, w, ids: attend(q, k, v, mask=masks.causal(), sink_logits=w[:1] + jnp.zeros(q.shape[2])),
    }, ids


CASES, IDS = cases()


def plain(name, q, k, v, w, ids):
    i = jnp.arange(16)
    distance = i[:, None] - i
    mask = {"window": (distance >= 0) & (distance <= 5), "documents": None, "sink": distance >= 0}[name]
    if mask is None:
        mask = (ids[:, :, None] == ids[:, None])[:, None]
        q = q * w
    v = v * w if name == "window" else v
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / D**0.5
    s = jnp.where(mask, 2 * jnp.tanh(s / 2) if name == "documents" else s, -jnp.inf)
    if name == "sink":
        s = jnp.concatenate([s, jnp.broadcast_to(w[0], (*s.shape[:3], 1))], -1)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s)[..., :16], v)


def mesh(name):
    return jax.make_mesh((2,), (name,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def t_vmap(fn, q, k, v, w, ids):
    return jax.vmap(lambda q, k, v, ids: fn(q[None], k[None], v[None], w, ids[None])[0])(q, k, v, ids)


def t_scan(fn, q, k, v, w, ids):
    def body(q, w):
        return q + jnp.tanh(fn(q, k, v[..., :D], w, ids)), None

    return lax.scan(body, q, jnp.stack([w, 2 * w]))[0]


def t_scan_checkpoint(fn, *args):
    return t_scan(jax.checkpoint(fn, prevent_cse=False), *args)


def t_batch(fn, *args):
    specs = (P("data"), P("data"), P("data"), P(), P("data"))
    return jax.shard_map(fn, mesh=mesh("data"), in_specs=specs, out_specs=P("data"))(*args)


def t_heads(fn, *args):
    spec = P(None, None, "heads")
    return jax.shard_map(fn, mesh=mesh("heads"), in_specs=(spec, spec, spec, P(), P()), out_specs=spec)(*args)


def t_pmap(fn, q, k, v, w, ids):
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    run = jax.pmap(fn, in_axes=(0, 0, 0, None, 0), devices=jax.devices()[:2])
    return run(*split, w, ids.reshape(2, 2, -1)).reshape(*q.shape[:3], -1)


TRANSFORMS = {
    "vmap": t_vmap,
    "scan": t_scan,
    "scan of checkpoint": t_scan_checkpoint,
    "shard_map over batch": t_batch,
    "shard_map over heads": t_heads,
    "pmap": t_pmap,
}
PRODUCT = list(itertools.product(TRANSFORMS, CASES))
COVERING = {
    ("vmap", "documents"),
    ("scan of checkpoint", "window"),
    ("shard_map over batch", "documents"),
    ("shard_map over heads", "sink"),
    ("pmap", "window"),
}


@pytest.mark.parametrize(
    "transform, name",
    [pytest.param(*c, marks=() if c in COVERING else pytest.mark.slow, id="-".join(c)) for c in PRODUCT],
)
def test_transforms(transform, name):
    q, k, v = operands(16, 16, b=4)
    w = 1 + 0.2 * array(5, D if "scan" in transform or name == "documents" else DV)
    through = TRANSFORMS[transform]

    @jax.jit
    def run(*args):
        fns = CASES[name], functools.partial(plain, name)
        return [value_and_gradients(lambda *a, fn=fn: through(fn, *a, IDS), *args) for fn in fns]

    assert_close(*run(q, k, v, w))


def test_forward_mode_and_gradients_of_gradients_need_the_reference():
    q, k, v = operands(8, 8)

    def slope(q, how):
        return jax.grad(lambda q: jnp.sin(attend(q, k, v, implementation=how)).sum())(q)

    def tangent(fn):
        return jax.eval_shape(lambda q: jax.jvp(fn, (q,), (q,))[1], q)

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda q: attend(q, k, v), (q,), (q,))
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.eval_shape(jax.grad(lambda q: slope(q, "xla").sum()), q)
    for fn in (functools.partial(slope, how="reference"), lambda q: attend(q, k, v, implementation="reference")):
        assert tangent(fn).shape in (q.shape, (*q.shape[:3], DV))


# ---- bytes ----------------------------------------------------------------------------------------------------------


def test_no_program_holds_all_scores():
    s, heads = 16384, 2
    shapes = [jax.ShapeDtypeStruct((1, s, n, 64), jnp.bfloat16) for n in (heads, 1, 1)]
    ids = jax.ShapeDtypeStruct((1, s), jnp.int32)
    mask = (masks.window(4095, 0) | masks.sink(4)) & masks.causal()

    def loss(q, k, v, ids):
        out, sums = attend(q, k, v, mask=mask, segment_ids=ids, return_column_sums=True)
        return out.astype(jnp.float32).sum() + sums.sum()

    bq, bk = default_blocks(shapes[0].shape, s)
    tile = heads * bq * bk * 4
    for fn in (loss, jax.grad(loss, (0, 1, 2))):
        compiled = jax.jit(fn).lower(*shapes, ids).compile()
        inputs = sum(x.size * x.dtype.itemsize for x in shapes)
        lists = 3 * 4 * (s // bq) * (s // bk)
        assert compiled_bytes(compiled).temp < 8 * tile + 8 * inputs + 8 * lists
        sizes = [
            np.prod([int(n) for n in dims.split(",")], dtype=np.int64)
            for dims in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
        ]
        assert max(sizes) < s * s / 8
    for how, too_big in (("reference", True), ("xla", False)):
        text = str(jax.make_jaxpr(lambda *a, how=how: attend(*a, mask=mask, implementation=how))(*shapes))
        assert (f"{s},{s}]" in text) == too_big


# ---- what else there is ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_of_the_keys_merge_to_the_whole():
    q, k, v = operands(24, 24)

    def whole(q, k, v):
        return attend(q, k, v, return_lse=True, blocks=(8, 8))

    def parts(q, k, v):
        halves = [
            attend(q, k[:, half], v[:, half], return_lse=True, blocks=(8, 8)) for half in (slice(9), slice(9, 24))
        ]
        return merge(*halves)

    found = jax.jit(lambda *a: [value_and_gradients(fn, *a) for fn in (whole, parts)])(q, k, v)
    assert_close(*found)


def test_column_sums_of_some_rows():
    mask = masks.causal() & masks.lengths(k_lengths=jnp.asarray([40, 33]))
    rows = jnp.asarray([39, 3, 17])
    mod = lambda s, b, h, q, k: s - 0.1 * (q - k)  # noqa: E731
    options = {"mask": mask, "blocks": BLOCKS, "score_mod": mod}
    table = jnp.repeat(mask.table(S, S), H, 1)

    @jax.jit
    def run(q, k, v):
        _, lse, every = attend(q, k, v, return_lse=True, return_column_sums=True, **options)
        at = [jnp.asarray(x) for x in np.ix_(*(range(n) for n in (B, H, S, S)))]
        s = mod(jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, H // HK, 2)) / D**0.5, *at)
        s = jnp.where(table, s, -jnp.inf)
        p = jnp.where(table, jnp.exp(s - lse.swapaxes(1, 2)[..., None]), 0)
        actual, expected = [every], [p.reshape(B, HK, -1, S).sum(2)]
        for reduce, x, how in (("sum", p, jnp.sum), ("max_logit", s, jnp.max)):
            actual.append(column_sums(q, k, lse, rows=rows, reduce=reduce, **options))
            expected.append(how(x[:, :, rows].reshape(B, HK, -1, S), 2))
        gradient = jax.grad(lambda q: attend(q, k, v, return_column_sums=True, **options)[1].sum())(q)
        return actual, expected, gradient

    actual, expected, gradient = run(*operands())
    assert_close(actual, expected)
    assert (gradient == 0).all()


def test_pages():
    pages = jnp.asarray([[3, 0], [1, 0]], jnp.int32)
    q, _, _ = operands(16)
    k, v = array(1, 4, 16, HK, D), array(2, 4, 16, HK, DV)
    mask = masks.causal() & masks.lengths(k_lengths=jnp.asarray([32, 20]))

    def paged(q, k, v):
        return attend(q, k, v, mask=mask, pages=pages)

    def gathered(q, k, v):
        k, v = (x[pages].reshape(B, 32, HK, -1) for x in (k, v))
        return attend(q, k, v, mask=mask, implementation="reference")

    assert_close(*jax.jit(lambda *a: [value_and_gradients(fn, *a) for fn in (paged, gathered)])(q, k, v))


def test_arrays_that_score_mod_reads():
    q, k, v = operands(8, 8)

    def loss(slope, q):
        return attend(q, k, v, score_mod=lambda s, b, h, q, k: s * slope[h]).sum()

    slope = 1 + jnp.arange(4.0) / 4
    expected = jax.jit(jax.grad(lambda q: attend(q * slope[:, None], k, v).sum()))(q)
    np.testing.assert_allclose(jax.jit(jax.grad(loss, 1))(slope, q), expected, 1e-5, 1e-6)
    with pytest.raises(TypeError, match="no gradient flows to arrays that score_mod reads"):
        jax.grad(loss)(slope, q)
    assert (jax.jit(jax.grad(lambda slope: loss(lax.stop_gradient(slope), q)))(slope) == 0).all()


def test_queries_that_lost_blocks_are_nan():
    q, k, v = operands()

    @jax.jit
    def run(q, k, v, ids):
        made = make_block_mask(masks.segments(ids), S, S, blocks=(8, 8), capacity=2)
        return attend(q, k, v, block_mask=made, return_lse=True)

    ids = np.repeat([[0, 1, 2, 2, 2]], 8, 1)
    out, lse = run(q, k, v, jnp.asarray(ids))
    assert jnp.isfinite(out[:, :16]).all() and jnp.isnan(out[:, 16:]).all() and jnp.isnan(lse[:, 16:]).all()


FORMS = {
    "full": masks.full(),
    "window": masks.window(7, None) & masks.causal() & masks.full(),
    "window both": masks.window(7, 0),
    "lengths": masks.lengths(jnp.asarray([40, 10]), jnp.asarray([33, 0])),
    "causal lengths": masks.causal() & masks.lengths(k_lengths=jnp.asarray([40, 10])),
}


def test_masks_in_the_terms_of_cudnn():
    q, k, v = (x[..., :D] for x in operands())
    forms = {name: cudnn_form(mask, S, S) for name, mask in FORMS.items()}
    assert all(form is not None and form.kind in name for name, form in forms.items())

    @jax.jit
    def run(q, k, v):
        actual = [cudnn_attention(q, k, v, form, D**-0.5, implementation="xla") for form in forms.values()]
        return actual, [attend(q, k, v, mask=mask, implementation="reference") for mask in FORMS.values()]

    assert_close(*run(q, k, v))
    not_expressible = (
        masks.window(3, 3),
        ~masks.causal(),
        masks.causal(1),
        masks.causal() | masks.full(),
        masks.sink(3),
    )
    assert all(cudnn_form(mask, S, S) is None for mask in not_expressible)
    assert cudnn_form(masks.causal(), S, 2 * S) is None and cudnn_form(masks.full(), S, 2 * S) is not None


def test_cudnn_is_taken_where_kernels_do_not_run_or_lose():
    causal, window = CudnnForm(causal=True), CudnnForm(causal=True, left=3)
    assert cudnn_is_taken(causal, 128, kernels_run=False) and cudnn_is_taken(CudnnForm(), 64, kernels_run=True)
    assert not cudnn_is_taken(causal, 128, kernels_run=True) and not cudnn_is_taken(window, 64, kernels_run=False)


def test_what_cannot_run_says_every_reason():
    q, k, v = operands()
    with pytest.raises(ValueError, match=r"softcap.*NVIDIA GPU.*no such mask.*float32.*heads of 8 and 12"):
        attend(q, k, v, mask=masks.window(3, 3), softcap=1.0, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation must be"):
        attend(q, k, v, implementation="triton")
    made = make_block_mask(masks.full(), S, S)
    with pytest.raises(ValueError, match="in place of mask"):
        attend(q, k, v, mask=masks.full(), block_mask=made)
    with pytest.raises(ValueError, match="S=40, T=40, the operands of S=39"):
        attend(q[:, 1:], k, v, block_mask=made)
    with pytest.raises(ValueError, match="needs a dropout_key"):
        attend(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="cuDNN has no column sums"):
        column_sums(q, k, jnp.zeros((B, S, H)), implementation="cudnn")
    with pytest.raises(ValueError, match="expected lse"):
        column_sums(q, k, jnp.zeros((B, H, S)))


def test_online_softmax():
    x = 30 * array(0, 3, 200)
    x = x.at[0, ::2].set(-jnp.inf)
    assert_close(online_softmax(x), jax.nn.softmax(x), 200 * 1.2e-7)
    assert_close(online_softmax(x.T, axis=0), jax.nn.softmax(x, axis=1).T, 200 * 1.2e-7)
    assert (online_softmax(jnp.full((2, 3), -jnp.inf)) == 0).all()
    parts = [(y.max(-1), jnp.exp(y - y.max(-1, keepdims=True)).sum(-1)) for y in (x[1:, :50], x[1:, 50:60], x[1:, 60:])]
    left, right = join(join(parts[0], parts[1]), parts[2]), join(parts[0], join(parts[1], parts[2]))
    assert_close(left, right, 1e-6)
    np.testing.assert_allclose(left[0] + jnp.log(left[1]), jax.nn.logsumexp(x[1:], -1), 1e-6)


def test_blocks_fit_the_rectangles_that_a_mask_selects():
    """So that whole rectangles need no table of their elements."""
    q, k, v = (array(i, 1, 256, 2, 16) for i in range(3))
    selected = np.random.default_rng(0).random((2, 2)) < 0.5
    selected[:, 0] = True
    mask = masks.blocks(selected, 128)
    fitted, larger = (
        jax.jit(functools.partial(attend, mask=mask, blocks=blocks)).lower(q, k, v).as_text()
        for blocks in (None, (256, 256))
    )
    assert "ui32" not in fitted and "ui32" in larger
    expected = attend(q, k, v, mask=mask, implementation="reference")
    np.testing.assert_allclose(attend(q, k, v, mask=mask), expected, atol=1e-5)
    attend(q, k, v, mask=masks.blocks(np.ones((13, 13), bool), 20))


@pytest.mark.parametrize("fn", [attend, column_sums])
def test_what_is_no_mask_and_no_operand_is_said(fn):
    q = jnp.zeros((1, 8, 2, 16))
    third = q if fn is attend else jnp.zeros((1, 8, 2))
    for mask, words in ((np.ones((8, 8), bool), "masks.array"), (masks.causal, "called"), ("causal", "got str")):
        with pytest.raises(TypeError, match=words):
            fn(q, q, third, mask=mask)
    with pytest.raises(ValueError, match="q: expected"):
        fn(q[0], q, third)
