"""Moments in 8 and 4 bits: codes, bytes, and fifty steps beside a plain transcription."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memjax import codecs
from memjax import optim as low
from memjax.core import compiled_bytes, nbytes
from memjax.optim import quantized_state as stored
from pallas_kernels.optim.formats import dynamic_levels

ROWS = {"kernel": (2, 32, 128), "odd": (4, 64, 48), "rows": (64, 96), "bias": (96,)}
"""Blocks within a row, blocks that straddle rows, rows that make blocks of their own, a leaf too small to encode."""


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape)), dtype)
        for name, shape in ROWS.items()
    }


def gradients(seed, dtype=np.float32):
    return jax.tree.map(lambda g: 0.1 * g, tree(1000 + seed, dtype))


class Plain:
    """Blockwise codes of one moment in numpy, by search among the levels."""

    def __init__(self, bits, signed, block):
        self.block = block
        self.levels = dynamic_levels(bits, signed) if signed or bits == 8 else np.arange(1, 17, dtype=np.float32) / 16
        self.middles = (self.levels[1:].astype(np.float64) + self.levels[:-1]) / 2

    def __call__(self, x):
        if x.size < stored.LEAST:
            return x
        blocks = x.reshape(-1, 96 if x.shape == (64, 96) else self.block)
        scale = np.maximum(np.abs(blocks).max(1, keepdims=True), np.float32(1e-12))
        return (self.levels[np.searchsorted(self.middles, blocks / scale)] * scale).reshape(x.shape)


@pytest.mark.parametrize("bits, signed", [(8, True), (8, False), (4, True), (4, False)])
def test_levels_are_those_of_the_papers(bits, signed):
    levels = dynamic_levels(bits, signed)
    assert levels.shape == (2**bits,) and (np.diff(levels) > 0).all() and levels[-1] == 1 and 0 in levels
    if (bits, signed) == (4, True):
        known = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0, 0.0055, 0.0325, 0.0775, 0.2125]
        np.testing.assert_allclose(levels, [*known, 0.4375, 0.6625, 0.8875, 1], rtol=1e-6)
    if bits == 8:
        first, last = (5.5e-7, 0.99296875) if signed else (3.25e-7, 0.99648437)
        np.testing.assert_allclose([levels[levels > 0][0], levels[-2]], [first, last], rtol=1e-6)


@pytest.mark.parametrize(
    "codec", [codecs.dynamic(8), codecs.dynamic(8, signed=False), codecs.dynamic(4), codecs.positive()]
)
def test_codes_return_and_are_nearest(codec):
    codes = np.arange(2**codec.bits, dtype=np.uint8)
    levels = np.asarray(codec.values(jnp.asarray(codes)))
    again, scale, _ = codec.quantize(jnp.asarray(levels)[None], (-1,), None)
    np.testing.assert_array_equal(again[0], codes)
    assert scale.view(jnp.float32).item() == 1
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-18, 0, (8, codec.group))).astype(np.float32)
    x = x * rng.choice([-1, 1], x.shape).astype(np.float32) if codec.symmetric else x
    decoded = np.asarray(codec.encode(jnp.asarray(x), -1).decode())
    largest = np.abs(x).max(1, keepdims=True)
    nearest = np.abs((x / largest)[..., None] - levels).min(-1) * largest
    np.testing.assert_allclose(np.abs(decoded - x), nearest, rtol=1e-4, atol=1e-7)
    if isinstance(codec, codecs.Positive):
        assert (decoded > 0).all()


@pytest.mark.parametrize("bits, block", [(8, 256), (4, 128)])
def test_state_bytes_are_the_formula(bits, block):
    params = tree(0)
    form = stored.state_format(bits)
    tx = low.scale_by_adam8bit(bits=bits)
    state = jax.eval_shape(tx.init, params)
    sizes = {2 * 32 * 128: block, 4 * 64 * 48: block, 64 * 96: 96}
    moment = sum(n * bits // 8 + 4 * n // own for n, own in sizes.items()) + 4 * 96
    assert nbytes(state) == nbytes(tx.init(params)) == 4 + 2 * moment
    assert moment == sum(stored.moment_bytes(shape, form) for shape in ROWS.values())
    assert nbytes(low.scale_by_lion8bit(bits=bits).init(params)) == 4 + moment
    assert stored.stored_shape((512, 96), form) == ((512 * 96,), block)  # more rows than layers: a matrix
    last = (2, 32 * 128) if bits == 8 else (2, 32, 128)
    assert (
        state.mu["kernel"].shape == last
        and state.mu["odd"].shape == (4, 64 * 48)
        and state.mu["rows"].shape == (64, 96)
    )
    assert state.mu["bias"].shape == (96,)


def transcript(kind, bits, steps):
    """Returns the parameters after some steps in numpy."""
    first, second = Plain(bits, True, stored.BLOCKS[bits]), Plain(bits, False, stored.BLOCKS[bits])
    f = np.float32
    params = {name: np.asarray(p) for name, p in tree(0).items()}
    m = {name: np.zeros(p.shape, f) for name, p in params.items()}
    v = {name: np.zeros(p.shape, f) for name, p in params.items()}
    for t in range(1, steps + 1):
        for name, g in gradients(t).items():
            g, p = np.asarray(g), params[name]
            if kind == "adamw":
                m[name] = f(0.9) * m[name] + f(1 - 0.9) * g
                v[name] = f(0.999) * v[name] + f(1 - 0.999) * g * g
                u = (m[name] / f(1 - 0.9**t)) / (np.sqrt(v[name] / f(1 - 0.999**t)) + f(1e-8))
                v[name] = second(v[name])
            elif kind == "lion":
                u = np.sign(f(0.9) * m[name] + f(1 - 0.9) * g)
                m[name] = f(0.99) * m[name] + f(1 - 0.99) * g
            else:
                m[name] = f(0.9) * m[name] + g
                u = m[name]
            m[name] = first(m[name])
            params[name] = p - f(1e-3) * (u + f(0.1 if kind != "sgdm" else 0) * p)
    return params


METHODS = {
    "adamw": (functools.partial(low.adamw8bit, weight_decay=0.1), low.scale_by_adam8bit, low.apply_adam8bit),
    "lion": (functools.partial(low.lion8bit, weight_decay=0.1), low.scale_by_lion8bit, low.apply_lion8bit),
    "sgdm": (low.sgdm8bit, low.scale_by_sgdm8bit, low.apply_sgdm8bit),
}


@pytest.mark.parametrize("kind, bits", [("adamw", 8), ("adamw", 4), ("lion", 8), ("sgdm", 8)])
def test_fifty_steps_are_those_of_a_transcription(kind, bits):
    alias, scale_by, apply = METHODS[kind]
    tx, inner = alias(1e-3, bits=bits), scale_by(bits=bits)
    decay = {"weight_decay": 0.1} if kind != "sgdm" else {}

    @jax.jit
    def step(params, state, fused, fused_state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, *apply(fused, g, fused_state, 1e-3, chunk=1024, **decay)

    params = fused = tree(0)
    carry = params, tx.init(params), fused, inner.init(params)
    for t in range(1, 51):
        carry = step(*carry, gradients(t))
    expected = transcript(kind, bits, 50)
    for name in ROWS:
        apart = np.abs(np.asarray(carry[0][name]) - expected[name]) / np.maximum(np.abs(expected[name]), 1e-2)
        # A moment half way between two levels may take either: some thousandths of the elements, by less than a step.
        assert np.quantile(apart, 0.99) < 1e-5 and apart.max() < 0.2, (name, apart.max(), (apart > 1e-5).mean())
        # Products and sums are contracted in other places where the programs are cut otherwise.
        np.testing.assert_allclose(carry[2][name], carry[0][name], rtol=1e-5, atol=1e-6)


def test_the_step_in_one_is_the_chain_to_the_last_bit():
    params, (alias, scale_by, apply) = tree(0), METHODS["adamw"]
    tx = alias(1e-3)
    state, fused_state, fused = tx.init(params), scale_by().init(params), params
    for t in range(2):
        updates, state = tx.update(gradients(t), state, params)
        params = optax.apply_updates(params, updates)
        fused, fused_state = apply(fused, gradients(t), fused_state, 1e-3, weight_decay=0.1)
    jax.tree.map(np.testing.assert_array_equal, (fused, fused_state), (params, state[0]))


def test_moments_of_many_steps_stay_near_float32():
    params = tree(0)
    ours, theirs = low.scale_by_adam8bit(), optax.scale_by_adam()
    step = jax.jit(lambda g, a, b: (ours.update(g, a), theirs.update(g, b)))
    a, b = ours.init(params), theirs.init(params)
    for t in range(20):
        (u, a), (w, b) = step(gradients(t), a, b)
    for name in ROWS:
        off = np.linalg.norm(u[name] - w[name]) / np.linalg.norm(w[name])
        assert off < (0.06 if name != "bias" else 1e-6), (name, off)


def test_any_transform_with_moments_in_codes_is_ours():
    params = {name: tree(0)[name] for name in ("kernel", "bias")}
    ours, wrapped = low.scale_by_adam8bit(), stored.quantize_state(optax.scale_by_adam())
    a, b = ours.init(params), wrapped.init(params)
    step = jax.jit(lambda g, a, b: (ours.update(g, a), wrapped.update(g, b)))
    for t in range(5):
        g = {name: gradients(t)[name] for name in params}
        (u, a), (w, b) = step(g, a, b)
    assert nbytes(a) == nbytes(b)
    for name in params:
        np.testing.assert_allclose(u[name], w[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inner", [optax.scale_by_adam, optax.scale_by_rss], ids=["zeros", "tenths"])
def test_a_start_is_the_code_of_the_inner_start(inner, bits):
    params = tree(0)
    form = stored.state_format(bits)

    def coded(got, dense):
        if not stored.is_moment(got):
            return dense
        return stored.encode(dense, stored.zeros(dense, got.codec, form))

    found = stored.quantize_state(inner(), bits).init(params)
    expected = jax.tree.map(coded, found, inner().init(params), is_leaf=stored.is_moment)
    assert any(map(stored.is_moment, jax.tree.leaves(found, is_leaf=stored.is_moment)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_start_is_made_without_float32_moments():
    p = jax.ShapeDtypeStruct((4, 256, 1024), jnp.float32)
    program = jax.make_jaxpr(stored.quantize_state(optax.scale_by_adam()).init)({"kernel": p})
    made = [out.aval for eqn in program.eqns for out in eqn.outvars]
    assert max(out.size * out.dtype.itemsize for out in made) == p.size  # bytes of the codes


def test_a_start_that_is_no_constant_is_coded_too():
    inner = optax.GradientTransformation(lambda params: {"m": 2 * params["kernel"], "n": params["bias"]}, None)
    params = {name: tree(0)[name] for name in ("kernel", "bias")}
    found = stored.quantize_state(inner).init(params)
    jax.tree.map(np.testing.assert_array_equal, found["m"], stored.encode(2 * params["kernel"], found["m"]))
    np.testing.assert_array_equal(found["n"], params["bias"])


def test_bfloat16_parameters_move_by_updates_too_small_to_round_to():
    params = {"kernel": jnp.ones((64, 256), jnp.bfloat16)}
    g = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    state = low.scale_by_adam8bit().init(params)
    plain = jax.jit(lambda p, s: low.apply_adam8bit(p, g, s, 1e-4))
    random = jax.jit(lambda p, s: low.apply_adam8bit(p, g, s, 1e-4, seed=3))
    a = b = (params, state)
    for _ in range(8):
        a, b = plain(*a), random(*b)
    assert (a[0]["kernel"] == 1).all()
    np.testing.assert_allclose(jnp.mean(b[0]["kernel"].astype(jnp.float32)), 1 - 8e-4, atol=1.5e-4)


def test_pieces_take_the_room_of_a_piece():
    shape = (64, 4096)
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(low.scale_by_adam8bit().init, {"w": p})
    step = lambda p, g, s: low.apply_adam8bit(p, g, s, 1e-3, chunk=4096)  # noqa: E731
    compiled = jax.jit(step, donate_argnums=(0, 2)).lower({"w": p}, {"w": p}, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * p.size * 4


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="8 or 4 bits"):
        low.scale_by_adam8bit(bits=5)
    with pytest.raises(ValueError, match="nearest level only"):
        codecs.dynamic().encode(jnp.ones((1, 256)), -1, 3)
    params = {"kernel": jnp.ones((17, 256))}
    with pytest.raises(ValueError, match="cannot run: 4352 elements"):
        state = low.scale_by_adam8bit().init(params)
        low.apply_adam8bit(params, params, state, 1e-3, implementation="mosaic_gpu")


@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
def test_shards_that_hold_whole_blocks_make_the_codes_of_one_device(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec(*spec))
    g = np.random.default_rng(0).normal(size=(16, 2048)).astype(np.float32)
    tx = low.scale_by_adam8bit()
    state = tx.init({"w": jnp.asarray(g)})
    shardings = jax.tree.map(lambda leaf: over if leaf.ndim else NamedSharding(mesh, PartitionSpec()), state)
    step = jax.jit(tx.update, in_shardings=({"w": over}, shardings), out_shardings=({"w": over}, shardings))
    compiled = step.lower({"w": g}, state).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    updates, new = compiled(jax.device_put({"w": g}, {"w": over}), jax.device_put(state, shardings))
    alone, expected = jax.jit(tx.update)({"w": jnp.asarray(g)}, state)
    np.testing.assert_array_equal(new.mu["w"].planes[0], expected.mu["w"].planes[0])
    np.testing.assert_array_equal(new.nu["w"].planes[0], expected.nu["w"].planes[0])
    np.testing.assert_allclose(updates["w"], alone["w"], rtol=1e-6)


@pytest.mark.parametrize("tx", [low.scale_by_adam8bit(), low.scale_by_lion8bit(bits=4)], ids=["adam", "lion"])
def test_large_leaves_are_moved_piece_by_piece_to_the_same_end(tx, monkeypatch):
    """Where arrays are whole; float32 moments of a piece alone then exist."""
    module, size = importlib.import_module("memjax.optim.adam8bit"), 2**19
    p = jnp.zeros(size, jnp.bfloat16)
    ends, temporaries = [], []
    for chunk in (size, size // 16):
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "whole_arrays", lambda: True)
        state, rng = tx.init(p), np.random.default_rng(0)
        update = jax.jit(lambda g, state: tx.update(g, state), donate_argnums=(0, 1))
        lowered = update.lower(p, jax.eval_shape(tx.init, p))
        temporaries.append(compiled_bytes(lowered.compile()).temp)
        for _ in range(3):
            found, state = update(jnp.asarray(rng.normal(size=size), jnp.bfloat16), state)
        ends.append((found, state))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):  # but for rounding, which depends on what is fused
        assert (np.asarray(a) == np.asarray(b)).mean() > 0.999
    assert temporaries[1] < temporaries[0] / 3
