"""The loss against the obvious one in float64, at frozen, trained, packed, adapted and sharded heads."""

import functools
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax.core import make_axes
from memjax.ops import linear_cross_entropy
from memjax.weights import Dense, LowRank, lift, materialize
from pallas_kernels.linear_cross_entropy import api as kernels_api
from tests.random_views import array, assert_close, builder, factors

T, D, V = 13, 8, 50


def inputs(seed=0, dtype=jnp.float32, w_axis=0, entries=V):
    w = array(seed + 1, D, entries) if w_axis == 0 else array(seed + 1, entries, D)
    arrays = {"x": array(seed, T, D), "w": w, "bias": array(seed + 2, entries)}
    arrays = {name: leaf.astype(dtype) for name, leaf in arrays.items()}
    labels = jax.random.randint(jax.random.key(seed), (T,), 0, entries).at[jnp.array([3, 7])].set(-100)
    return arrays | {"weights": jnp.abs(array(seed + 3, T))}, labels


def naive(
    arrays, labels, *, w_axis=0, ignore_index=-100, softcap=None, label_smoothing=0.0, z_loss=0.0, reduction="mean"
):
    """The loss by its definition, in the dtype of the arrays."""
    w = arrays["w"] if w_axis == 0 else arrays["w"].T
    z = arrays["x"] @ w + arrays.get("bias", 0.0)
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    lse = jax.nn.logsumexp(z, axis=-1)
    log_p = z - lse[:, None]
    counted = labels != ignore_index
    wanted = jax.nn.one_hot(jnp.where(counted, labels, 0), z.shape[1], dtype=z.dtype)
    wanted = (1 - label_smoothing) * wanted + label_smoothing / z.shape[1]
    share = counted * arrays.get("weights", 1.0)
    loss = share * (z_loss * lse**2 - (wanted * log_p).sum(axis=-1))
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / share.sum()}[reduction]


def expected(arrays, labels, names, cotangent=None, **settings):
    """Returns value and gradients by the arrays ``names``, in float64."""
    with jax.enable_x64():
        arrays = {name: jnp.asarray(np.asarray(leaf, np.float64)) for name, leaf in arrays.items()}

        @jax.jit
        def run(chosen, arrays, labels):
            value, back = jax.vjp(lambda chosen: naive(arrays | chosen, labels, **settings), chosen)
            wide = jnp.ones_like(value) if cotangent is None else jnp.asarray(np.asarray(cotangent, np.float64))
            return value, back(wide)[0]

        return jax.tree.map(np.asarray, run({name: arrays[name] for name in names}, arrays, labels))


def actual(arrays, labels, names, cotangent=None, **settings):
    @jax.jit
    def run(chosen, arrays, labels):
        def loss(chosen):
            all_ = arrays | chosen
            return linear_cross_entropy(
                all_["x"], all_["w"], labels, bias=all_.get("bias"), weights=all_.get("weights"), **settings
            )

        value, back = jax.vjp(loss, chosen)
        return value, back(jnp.ones_like(value) if cotangent is None else cotangent)[0]

    return run({name: arrays[name] for name in names}, arrays, labels)


SETTINGS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "label smoothing": {"label_smoothing": 0.2},
    "z loss": {"z_loss": 0.1, "reduction": "sum"},
    "all": {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.05, "ignore_index": 5, "w_axis": 1},
}
TRAINED = {"frozen": ("x", "weights"), "trained": ("x", "w", "bias", "weights"), "bias alone": ("bias",)}
CHUNKS = {"tiles": 3, "one tile": None, "all kept": T}  # 3 * 50 logits are 12 entries for 13 tokens
ALWAYS = {
    ("plain", "frozen", "one tile"),
    ("plain", "frozen", "tiles"),
    ("plain", "trained", "tiles"),
    ("plain", "bias alone", "tiles"),
    ("softcap", "trained", "tiles"),
    ("label smoothing", "frozen", "tiles"),
    ("z loss", "frozen", "tiles"),
    ("all", "frozen", "tiles"),
    ("all", "trained", "tiles"),
    ("all", "trained", "all kept"),
}
CASES = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow, id="-".join(case))
    for case in itertools.product(SETTINGS, TRAINED, CHUNKS)
]


@pytest.mark.parametrize("settings, names, chunk", CASES)
def test_values_and_gradients_of_every_input(settings, names, chunk):
    settings, names = SETTINGS[settings], TRAINED[names]
    arrays, labels = inputs(w_axis=settings.get("w_axis", 0))
    labels = jnp.where(labels == -100, settings.get("ignore_index", -100), labels)
    got = actual(arrays, labels, names, chunk=CHUNKS[chunk], **settings)
    assert_close(got, expected(arrays, labels, names, **settings))


HEADS = {"frozen": ("x",), "trained": ("x", "w")}
KERNELS = {
    ("plain", "frozen", 4),
    ("z loss", "frozen", T),
    ("softcap", "trained", 3),
    ("all", "trained", 3),
    ("label smoothing", "trained", T),
    ("all", "frozen", 4),
    ("plain", "trained", 3),
    ("all", "trained", T),
}
SOME_KERNELS = {
    ("plain", "frozen", 4),
    ("z loss", "frozen", T),
    ("softcap", "trained", 3),
    ("label smoothing", "trained", T),
}


@pytest.mark.parametrize(
    "settings, names, chunk",
    [pytest.param(*case, marks=() if case in SOME_KERNELS else pytest.mark.slow) for case in sorted(KERNELS)],
)
def test_the_way_with_kernels(settings, names, chunk, monkeypatch):
    """What the kernels give is what their references give, which run on any device."""
    monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "_kernels_run", lambda *_: True)
    settings, names = SETTINGS[settings], TRAINED[names]
    arrays, labels = inputs(w_axis=settings.get("w_axis", 0), entries=600)  # 3 * 600 logits are a slab of 256
    labels = jnp.where(labels == -100, settings.get("ignore_index", -100), labels)
    got = actual(arrays, labels, names, chunk=chunk, implementation="mosaic_gpu", **settings)
    assert_close(got, expected(arrays, labels, names, **settings), 5e-6)


@pytest.mark.parametrize("names", HEADS.values(), ids=HEADS)
def test_every_token_has_a_cotangent_of_its_own(names):
    arrays, labels = inputs()
    cotangent = array(9, T)
    got = actual(arrays, labels, names, cotangent, reduction="none", chunk=3)
    assert_close(got, expected(arrays, labels, names, cotangent, reduction="none"))
    assert not np.any(got[1]["x"][np.asarray(labels) == -100])


def test_log_sum_exp_is_returned_and_differentiated():
    arrays, labels = inputs()
    x, w = arrays["x"], arrays["w"]

    def ours(x, w):
        loss, lse = linear_cross_entropy(x, w, labels, return_lse=True, chunk=3)
        return loss + jnp.sin(lse).sum()

    def obvious(x, w):
        return naive({"x": x, "w": w}, labels) + jnp.sin(jax.nn.logsumexp(x @ w, axis=-1)).sum()

    for argnums in (0, (0, 1)):
        got, want = (jax.jit(jax.value_and_grad(fn, argnums))(x, w) for fn in (ours, obvious))
        assert_close(got, want)


@pytest.mark.parametrize("names", HEADS.values(), ids=HEADS)
def test_a_label_with_a_probability_near_one(names):
    """Rounding p before subtracting 1 would leave 100 % error in bfloat16; in float32, p - 1 itself leaves 1e-4."""
    for dtype, tolerance in ((jnp.float32, 3e-6), (jnp.bfloat16, 6e-3)):
        w = jnp.eye(D, 24, dtype=dtype)
        labels = jnp.arange(4)
        x = jnp.asarray(10.0 * np.eye(4, D), dtype)  # p = 0.999: exp(10) beside 23 ones
        arrays = {"x": x, "w": w}
        value, grads = actual(arrays, labels, names, chunk=1)
        p = np.exp(10) / (np.exp(10) + 23)
        assert 0.9985 < p < 0.9995
        want, wanted = expected(arrays, labels, names)
        assert abs(value - want) < 1e-6
        at_label = np.asarray(grads["x"], np.float64)[np.arange(4), np.arange(4)]
        np.testing.assert_allclose(at_label, (p - 1) / 4, rtol=tolerance)
        assert_close(grads, wanted, tolerance)


def test_sums_of_the_head_are_float32_and_its_gradient_is_rounded_once():
    tokens = 1000
    many = {"x": array(0, tokens, D, dtype=jnp.bfloat16), "w": array(1, D, V, dtype=jnp.bfloat16)}
    labels = jax.random.randint(jax.random.key(0), (tokens,), 0, V)
    for chunk in (200, tokens):
        _, grads = actual(many, labels, ("x", "w"), chunk=chunk)
        _, want = expected(many, labels, ("x", "w"))
        assert grads["w"].dtype == jnp.bfloat16
        for name, grad in grads.items():
            error = np.linalg.norm(np.asarray(grad, np.float64) - want[name]) / np.linalg.norm(want[name])
            assert error < (2e-3 if name == "w" else 3e-3)


def test_mixed_dtypes():
    arrays, labels = inputs()
    rounded = arrays["x"].astype(jnp.bfloat16)
    low = {"x": rounded.astype(jnp.float32), "w": arrays["w"].astype(jnp.bfloat16).astype(jnp.float32)}
    got = actual({"x": rounded, "w": arrays["w"]}, labels, ("x", "w"), chunk=3)
    assert got[1]["w"].dtype == jnp.float32 and got[1]["x"].dtype == jnp.bfloat16
    assert_close(got, expected(low, labels, ("x", "w")), 1e-2)


@pytest.mark.parametrize("names", HEADS.values(), ids=HEADS)
def test_no_label_counts(names):
    arrays, labels = inputs()
    value, grads = actual(arrays, jnp.full_like(labels, -100), names, chunk=3)
    assert value == 0 and not any(np.any(grad) for grad in grads.values())


@pytest.mark.parametrize("names", HEADS.values(), ids=HEADS)
def test_large_and_banned_logits(names):
    arrays, labels = inputs()
    arrays = {"x": arrays["x"], "w": arrays["w"], "bias": jnp.full(V, 3e4).at[:20].set(-jnp.inf)}
    labels = jnp.where(labels < 0, labels, jnp.maximum(labels, 20))
    value, grads = actual(arrays, labels, names, chunk=3)
    less = {"x": arrays["x"], "w": arrays["w"], "bias": arrays["bias"] - 3e4}
    want, wanted = actual(less, labels, names, chunk=3)
    assert np.isfinite(want) and all(np.all(np.isfinite(grad)) for grad in grads.values())
    assert_close((value, grads), (want, wanted), 4e-3)  # an ulp of 3e4 is 2e-3


def temp_bytes(entries, names, tokens, width, chunk, implementation=None, dtype=jnp.float32):
    abstract = {
        "x": jax.ShapeDtypeStruct((tokens, width), dtype),
        "w": jax.ShapeDtypeStruct((width, entries), dtype),
    }

    def grad(arrays, labels):
        def loss(chosen):
            x, w = map((arrays | chosen).get, "xw")
            return linear_cross_entropy(x, w, labels, chunk=chunk, implementation=implementation)

        return jax.grad(loss)({name: arrays[name] for name in names})

    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return jax.jit(grad).lower(abstract, labels).compile().memory_analysis().temp_size_in_bytes


ENTRIES, CHUNK, TOKENS, WIDTH = 4096, 8, 64, 16
TILE_BYTES = 4 * CHUNK * ENTRIES


@pytest.mark.parametrize("names", HEADS.values(), ids=HEADS)
def test_memory_is_that_of_tiles_and_not_of_all_logits(names):
    small, large = (temp_bytes(ENTRIES, names, tokens, WIDTH, CHUNK) for tokens in (TOKENS, 2 * TOKENS))
    # Logits, probabilities or their gradients, and the part of the head, all in float32; sums like the inputs.
    assert small < 2.5 * TILE_BYTES + 8 * TOKENS * WIDTH * 4
    assert large < small + 8 * TOKENS * WIDTH * 4


def test_blocks_for_the_kernels_copy_no_input(monkeypatch):
    monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "_kernels_run", lambda *_: True)
    small, large = (temp_bytes(256, ("x",), tokens, 512, 24, "mosaic_gpu") for tokens in (250, 500))
    assert large < small + 250 * 512 * 4 / 2


@pytest.mark.gpu
def test_a_block_of_the_kernels_exists_once_on_a_device():
    entries, block = 65536, 512
    assert temp_bytes(entries, ("x",), 1024, 256, block, "mosaic_gpu", jnp.bfloat16) < 1.5 * 2 * block * entries


def test_a_frozen_head_has_no_gradient():
    width = 256
    assert temp_bytes(ENTRIES, ("x",), TOKENS, width, CHUNK) < 4 * ENTRIES * width
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((TOKENS, width), (width, ENTRIES))]
    labels = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)

    def program(argnums):
        loss = functools.partial(linear_cross_entropy, chunk=CHUNK)
        return str(jax.make_jaxpr(jax.value_and_grad(loss, argnums))(*abstract, labels))

    assert program((0, 1)).count("= dot_general") > program(0).count("= dot_general")
    assert "dynamic_update_slice" in program((0, 1)) and "dynamic_update_slice" not in program(0)


VIEWS = [
    ("packed", 0),
    ("lora on packed", 1),
    pytest.param("packed", 1, marks=pytest.mark.slow),
    pytest.param("lora on packed", 0, marks=pytest.mark.slow),
    pytest.param("lora on dense", 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, w_axis", VIEWS)
def test_heads_that_are_views(kind, w_axis):
    arrays, labels = inputs()
    w = array(1, 16, 48) if w_axis == 0 else array(1, 48, 16)
    x, labels, bias = array(0, T, 16), jnp.minimum(labels, 47), arrays["bias"][:48]
    view, theta = builder(kind, w)(factors(5, w.shape)), factors(6, w.shape)
    settings = {"softcap": 9.0, "label_smoothing": 0.1, "bias": bias, "w_axis": w_axis}

    def attached(view, theta):
        return view if kind == "packed" else replace(view, deltas=(LowRank(theta["a"], theta["b"], 0.5),))

    def ours(x, theta, view):
        loss = functools.partial(linear_cross_entropy, labels=labels, chunk=4, **settings)
        return lift(loss)(x, attached(view, theta))

    def obvious(x, theta, view):
        w = materialize(attached(view, theta))
        return linear_cross_entropy(x, w, labels, implementation="reference", **settings)

    @jax.jit
    def run(x, theta, view):
        return [[jax.value_and_grad(fn, argnums)(x, theta, view) for argnums in (0, (0, 1))] for fn in (ours, obvious)]

    got, want = run(x, theta, view)
    assert_close(got, want, 5e-6)


def sharded(check_vma=True, shards=4):
    """Returns the loss over a vocabulary cut into shards, of ``x, w, bias, labels``."""
    mesh = jax.make_mesh((2, shards), ("data", "vocabulary"), axis_types=(AxisType.Auto,) * 2)

    def local(x, w, bias, labels, chunk):
        loss = linear_cross_entropy(
            x, w, labels, bias=bias, axis_name="vocabulary", reduction="none", softcap=5.0, label_smoothing=0.1,
            z_loss=0.01, chunk=chunk,
        )  # fmt: skip
        return jax.lax.psum((loss**2).sum(), "data")

    def loss(x, w, bias, labels, chunk):
        specs = (P("data"), P(None, "vocabulary"), P("vocabulary"), P("data"))
        cut = jax.shard_map(functools.partial(local, chunk=chunk), mesh=mesh, in_specs=specs, out_specs=P(),
                            check_vma=check_vma)  # fmt: skip
        return cut(x, w, bias, labels)

    return loss


SHARDED = [((0,), True), ((0, 1, 2), True), ((0, 1, 2), False), pytest.param((0,), False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("argnums, check_vma", SHARDED)
def test_a_vocabulary_cut_into_shards(argnums, check_vma):
    arrays, labels = inputs()
    x, w, bias, labels = arrays["x"][:12], arrays["w"][:, :48], arrays["bias"][:48], jnp.minimum(labels[:12], 47)

    def whole(x, w, bias, labels):
        loss = naive({"x": x, "w": w, "bias": bias}, labels, softcap=5.0, label_smoothing=0.1, z_loss=0.01,
                     reduction="none")  # fmt: skip
        return (loss**2).sum()

    got = jax.jit(jax.value_and_grad(functools.partial(sharded(check_vma), chunk=3), argnums))(x, w, bias, labels)
    assert_close(got, jax.jit(jax.value_and_grad(whole, argnums))(x, w, bias, labels))


def by_shards(loss, x, w, labels):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def local(x, w, labels):
        return jax.lax.psum(loss(x, w, labels), "data")

    return jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P())(x, w, labels)


TRANSFORMS = {
    "vmap": lambda loss, x, w, labels: jax.vmap(loss, (0, None, 0))(x, w, labels).sum(),
    "scan": lambda loss, x, w, labels: jax.lax.scan(lambda s, xy: (s + loss(xy[0], w, xy[1]), None), 0.0, (x, labels))[
        0
    ],
    "checkpoint": lambda loss, x, w, labels: jax.checkpoint(loss)(x, w, labels),
    "shard_map": by_shards,
    "pmap": lambda loss, x, w, labels: jax.pmap(loss, in_axes=(0, None, 0), devices=jax.devices()[:4])(
        x, w, labels
    ).sum(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    x, w = array(0, 4, 5, D), array(1, D, V)
    labels = jax.random.randint(jax.random.key(0), (4, 5), 0, V)
    loss = functools.partial(linear_cross_entropy, reduction="sum", chunk=2)

    def by(argnums):
        return jax.value_and_grad(lambda x, w: TRANSFORMS[transform](loss, x, w, labels), argnums)(x, w)

    want = jax.value_and_grad(lambda x, w: naive({"x": x, "w": w}, labels.ravel(), reduction="sum"), (0, 1))(
        x.reshape(-1, D), w
    )
    for argnums in (0, (0, 1)):
        value, grads = by(argnums) if transform == "pmap" else jax.jit(by, static_argnums=0)(argnums)
        grads = (grads.reshape(-1, D),) if argnums == 0 else (grads[0].reshape(-1, D), grads[1])
        assert_close((value, grads), (want[0], want[1][: len(grads)]))


def test_bad_settings():
    arrays, labels = inputs()
    x, w = arrays["x"], arrays["w"]
    bad = {
        "do not fit": {"w": w.T},
        "bias": {"bias": x},
        "shape of the labels": {"weights": x},
        "softcap=0": {"softcap": 0.0},
        "label_smoothing=2": {"label_smoothing": 2},
        "reduction='max'": {"reduction": "max"},
        "chunk=0": {"chunk": 0},
        "implementation='cuda'": {"implementation": "cuda"},
        "cannot run: the default device is no Hopper GPU; x is float32": {"implementation": "mosaic_gpu"},
        "w_axis=2": {"w_axis": 2},
        "must be integers": {"labels": x[:, 0]},
    }
    for message, settings in bad.items():
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**{"x": x, "w": w, "labels": labels} | settings)
    with pytest.raises(TypeError, match=r"w is a weight view \(Dense\).*memjax.lift"):
        linear_cross_entropy(x, Dense(w, make_axes(0, 1, ndim=2)), labels)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 4096])
@pytest.mark.parametrize("shape", [(4096, 128256, 0), (2048, 128256, 1)])
def test_the_way_with_kernels_lowers_for_cuda(shape, chunk, monkeypatch):
    monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "on_hopper", lambda: True)
    monkeypatch.setattr(kernels_api, "on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    width, entries, w_axis = shape
    x = jax.ShapeDtypeStruct((4096, width), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((width, entries) if w_axis == 0 else (entries, width), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    settings = {"w_axis": w_axis, "chunk": chunk, "implementation": "mosaic_gpu", "z_loss": 1e-4}
    for argnums in (0, (0, 1)):
        step = jax.jit(jax.value_and_grad(functools.partial(linear_cross_entropy, **settings), argnums))
        assert "mosaic_gpu" in step.trace(x, w, labels).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_kernels_and_xla_agree_on_a_device(settings):
    tokens, width, entries, w_axis = 700, 256, 4992, settings.get("w_axis", 0)
    w = array(1, width, entries) if w_axis == 0 else array(1, entries, width)
    arrays = {"x": array(0, tokens, width), "w": w / width**0.5, "bias": array(2, entries)}
    arrays = {name: leaf.astype(jnp.bfloat16) for name, leaf in arrays.items()}
    labels = jax.random.randint(jax.random.key(0), (tokens,), 0, entries)
    for names in (("x",), ("x", "w", "bias")):
        for chunk in (60, tokens):
            got, want = (
                actual(arrays, labels, names, chunk=chunk, implementation=way, **settings)
                for way in ("mosaic_gpu", "xla")
            )
            np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
            for name in names:
                ours, theirs = (np.asarray(pair[1][name], np.float64) for pair in (got, want))
                assert np.linalg.norm(ours - theirs) < 6e-3 * np.linalg.norm(theirs)


def test_threads_that_trace_at_once_share_an_operation(monkeypatch):
    module = sys.modules["memjax.ops.linear_cross_entropy"]
    registered = []

    def slow(name, rule):
        time.sleep(0.05)
        registered.append(name)

    monkeypatch.setattr(module, "register_rule", slow)
    options = module._Options(0, None, False, 977, "xla")  # of no other test
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(module._operation, [options] * 4))
    assert len(registered) == len({id(f) for f in found}) == 1
