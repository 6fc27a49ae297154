"""Optimizer kernels: a thread's program in numpy, the grid in the interpreter, lowering for CUDA, and on a device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import optim
from pallas_kernels._bits import seed_words
from pallas_kernels.optim import api, formats, kernel, reference
from pallas_kernels.optim.shapes import SHAPES
from tests.pallas_kernels.warpgroup import Warpgroup

SCALARS = optim.adam_scalars(1e-2, 0.9, 0.95, 1e-8, np.float32(3), 0.1, free_rate=3e-3)


def done(step):
    """Returns the step that is complete when it returns: arrays of numpy that it reads may change after it."""
    run = jax.jit(step)
    return lambda *args: jax.block_until_ready(run(*args))


step_arrays = done(reference.adam8bit_step)


def operands(size, params="bfloat16", grads="bfloat16", seed=0):
    """Returns the arrays of a step, with blocks of many sizes, of zeros, and of the largest codes."""
    rng = np.random.default_rng(seed)
    blocks = size // 256
    sizes = np.exp(rng.normal(size=(blocks, 1)) * 3)
    g = rng.normal(size=(blocks, 256)) * np.exp(2 * rng.normal(size=(blocks, 256))) * sizes
    g[0], g[1, :7] = 0, 0
    codes = rng.integers(0, 256, (2, size), dtype=np.uint8)
    scales = np.exp(rng.normal(size=(2, blocks))).astype(np.float32) * sizes[:, 0].astype(np.float32)
    scales[1] **= 2
    scales[:, 0] = 0
    dense = [np.array(jnp.asarray(x.reshape(-1), t)) for x, t in ((rng.normal(size=size), params), (g, grads))]
    return [*dense, codes[0], scales[0].view(np.uint32), codes[1], scales[1].view(np.uint32)]


def close(made, expected):
    """Checks what two ways of computing a step made: the same up to rounding, and codes at most one level apart."""
    for i, (a, b) in enumerate(zip(made, expected)):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8:
            assert (a != b).mean() < 2e-3
            assert np.abs(a.astype(int) - b).max() <= 1
        elif a.dtype == np.uint32:
            np.testing.assert_allclose(a.view(np.float32), b.view(np.float32), rtol=2e-6)
        else:
            tolerance = {"rtol": 1e-2, "atol": 1e-4} if a.dtype != np.float32 else {"rtol": 2e-5, "atol": 1e-6}
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), err_msg=str(i), **tolerance)


@pytest.mark.parametrize("params, grads, seed", [("bfloat16", "bfloat16", 5), ("float32", "bfloat16", None)])
def test_a_threads_program_takes_the_step_of_adam(params, grads, seed):
    config = kernel.Config(2)
    count = kernel.block_elements(config)
    p, g, *codes = operands(count, params, grads)
    words = None if seed is None else seed_words(seed)
    expected = step_arrays(p, g, *codes, SCALARS, words, np.uint32(3 * count))
    thread = Warpgroup()
    seeds = [] if words is None else [np.stack(words)]
    tiles = [p, *codes]
    shared = np.zeros(kernel._WORDS, np.uint32)
    rest = [g, np.array(SCALARS), kernel.lookup_table(), *seeds, shared, thread.const(3)]
    kernel.adam8bit_block(config, (params, grads), seed is not None, thread, *tiles, *rest)
    close(tiles, expected)
    if params == "bfloat16":  # the same random bits: all but a few that lie next to a change
        assert (np.asarray(p) == np.asarray(expected[0])).mean() > 0.99


def test_codes_of_every_level_and_between_them_are_the_nearest():
    config = kernel.Config(1)
    rng = np.random.default_rng(0)
    for signed in (True, False):
        levels = formats.dynamic_levels(8, signed).astype(np.float64)
        middles = (levels[1:] + levels[:-1]) / 2
        near = np.concatenate([levels, middles * (1 + 1e-5), middles * (1 - 1e-5)])
        x = np.concatenate([near, np.exp(rng.uniform(-20, 0, 1024 - len(near)))]).astype(np.float32)
        blocks = rng.permutation(x).reshape(4, 256)
        blocks[:, 3] = 1
        thread = Warpgroup()
        shared = kernel.lookup_table().copy()
        values = [blocks.reshape(128, 8)[:, i].copy().view(np.uint32) for i in range(8)]
        codes, scale = kernel._encode(thread, thread.table(shared), values, signed)
        assert (scale.view(np.float32) == 1).all()
        made = np.stack(codes, 1).copy().view(np.uint8).reshape(-1)
        wanted = np.searchsorted(middles, blocks.reshape(-1).astype(np.float64))
        np.testing.assert_array_equal(made, wanted)
        np.testing.assert_array_equal(made, formats.nearest_code(jnp.asarray(blocks.reshape(-1)), 8, signed))
    assert config.units


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates_are_added_with_the_reference_s_random_bits(dtype):
    rng = np.random.default_rng(3)
    p = np.array(jnp.asarray(rng.normal(size=4096), jnp.bfloat16))
    u = np.array(jnp.asarray(1e-3 * rng.normal(size=4096), dtype))
    words = seed_words(4)
    expected = done(optim.add_stochastic)(p, u, words)
    made = optim.add_stochastic(jnp.asarray(p), jnp.asarray(u), words, implementation="mosaic_gpu", interpret=True)
    np.testing.assert_array_equal(made, expected)
    for block in range(2):
        thread, mine = Warpgroup(), slice(2048 * block, 2048 * (block + 1))
        program = functools.partial(kernel.add_stochastic_block, kernel.Config(2), dtype)
        program(thread, p[mine], u[mine], np.stack(words), thread.const(block))
    np.testing.assert_array_equal(p, expected)
    arrays = [jax.ShapeDtypeStruct((2**20,), kind) for kind in ("bfloat16", dtype)]
    step = jax.jit(functools.partial(optim.add_stochastic, words=words, implementation="mosaic_gpu"), donate_argnums=0)
    assert "output_operand_alias<" in step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_nan_stays_in_its_block():
    p, g, *codes = operands(1024, "float32")
    g[300] = np.nan
    thread, shared = Warpgroup(), np.zeros(kernel._WORDS, np.uint32)
    rest = [g, np.array(SCALARS), kernel.lookup_table(), shared, thread.const(0)]
    kernel.adam8bit_block(kernel.Config(1), ("float32", "bfloat16"), False, thread, p, *codes, *rest)
    assert (np.isnan(p).nonzero()[0] == [300]).all()
    for scale in (codes[1], codes[3]):
        assert (np.isnan(scale.view(np.float32)) == (np.arange(4) == 1)).all()


def test_the_interpreted_kernel_equals_the_reference():
    arrays = [jnp.asarray(x) for x in operands(4096)]
    words = seed_words(1)
    step = functools.partial(optim.adam8bit_step, implementation="mosaic_gpu", interpret=True)
    for a, b in zip(step(*arrays, SCALARS, words), step_arrays(*arrays, SCALARS, words)):
        np.testing.assert_array_equal(a, b)


def test_stochastic_rounding_is_unbiased_and_leaves_what_bfloat16_holds():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    held = jnp.asarray([0.0, -0.0, 1.5, -3e38, largest, -np.inf, np.inf, np.nan], jnp.bfloat16)
    for seed in range(4):
        again = optim.round_stochastic(held.astype(jnp.float32), seed_words(seed))
        np.testing.assert_array_equal(again.view(jnp.uint16), held.view(jnp.uint16))
    x = np.float32([1.001, -0.37, 1e-30, 1234.56, 3.395e38])
    draws = optim.round_stochastic(jnp.broadcast_to(x, (4096, 5)), seed_words(7)).astype(jnp.float32)
    draws = np.asarray(draws, np.float64)
    assert np.isfinite(draws).all()
    spread = draws[:, :4].std(0) / 64
    assert (spread > 0).all()
    assert (np.abs(draws[:, :4].mean(0) - x[:4]) < 3 * spread).all()


def test_every_leaf_of_the_model_lowers_for_cuda_in_place():
    words = seed_words(0)
    for shape in SHAPES.values():
        size = math.prod(shape)
        kinds = [jnp.bfloat16, jnp.bfloat16, jnp.uint8, jnp.uint32, jnp.uint8, jnp.uint32]
        sizes = [size, size, size, size // 256, size, size // 256]
        arrays = [jax.ShapeDtypeStruct((n,), kind) for n, kind in zip(sizes, kinds)]
        step = jax.jit(
            lambda *a: optim.adam8bit_step(*a, SCALARS, words, implementation="mosaic_gpu"),
            donate_argnums=(0, 2, 3, 4, 5),
        )
        text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.output_operand_alias<") == 5


def runs(outer, count, run, kept, params, grads="bfloat16", seed=0):
    """Returns the arrays of a step on ``kept`` of ``count`` runs, with gradients of zero and infinities of moments."""
    rng = np.random.default_rng(seed)
    place = np.stack([rng.permutation(count) for _ in range(outer)]).astype(np.int32)
    g = rng.normal(size=(outer, count, run)) * np.exp(3 * rng.normal(size=(outer, count, 1)))
    g[0, :, :5] = 0
    g[0, :, 5] = 1.2e-38
    dense = [np.array(jnp.asarray(x, t)) for x, t in ((rng.normal(size=g.shape), params), (g, grads))]
    moments = [rng.normal(size=(outer, kept, run)).astype(np.float32) for _ in range(2)]
    return [*dense, moments[0], moments[1] ** 2, place]


FRUGAL = {"rows": (2, 6, 2048, 2), "groups": (2, 64, 32, 16), "layers": (1, 3, 4096, 1)}


@pytest.mark.parametrize("name", FRUGAL)
def test_a_threads_program_takes_the_step_of_frugal(name):
    outer, count, run, kept = FRUGAL[name]
    for params, seed in (("bfloat16", 5), ("float32", None)):
        p, g, mu, nu, place = runs(outer, count, run, kept, params)
        words = None if seed is None else seed_words(seed)
        expected = done(reference.frugal_adam_step)(p, g, mu, nu, place, SCALARS, words)
        config = api.frugal_heuristic(count, run)
        size = kernel.block_elements(config)
        for i in range(outer):
            for piece in range(count * run // size):
                thread, mine = Warpgroup(), slice(piece * size, (piece + 1) * size)
                tiles = [p[i].reshape(-1)[mine], mu[i].reshape(-1), nu[i].reshape(-1), g[i].reshape(-1)[mine], place[i]]
                seeds = [] if words is None else [np.stack(words)]
                at = [i * count * run + piece * size, piece * size // run, piece * size % run]
                at = [thread.const(word) for word in at]
                program = functools.partial(kernel.frugal_adam_block, config, (params, "bfloat16"), seed is not None)
                program(run, kept, thread, *tiles, np.array(SCALARS), *seeds, *at)
        close((p, mu, nu), expected)
        if seed is not None:
            assert (np.asarray(p) == np.asarray(expected[0])).mean() > 0.99


@pytest.mark.parametrize("name", ["rows", "groups"])
def test_the_interpreted_step_of_frugal_equals_the_reference(name):
    arrays = [jnp.asarray(x) for x in runs(*FRUGAL[name], "bfloat16")]
    step = functools.partial(optim.frugal_adam_step, scalars=SCALARS, words=seed_words(2))
    made = step(*arrays, implementation="mosaic_gpu", interpret=True)
    close(made, step(*arrays, implementation="xla"))


def test_runs_without_moments_go_by_the_sign_and_nothing_is_lost():
    p, g, mu, nu, place = (jnp.asarray(x) for x in runs(*FRUGAL["groups"], "float32", "float32"))
    new_p, new_mu, _ = optim.frugal_adam_step(p, g, mu, nu, place, SCALARS)
    free = np.asarray(place) >= 16
    at = reference.Scalars(*np.asarray(SCALARS)[:9])
    np.testing.assert_allclose(new_p[free], p[free] * at.shrink - at.free * np.sign(g[free]), rtol=1e-6)
    for i in range(2):
        for run in range(64):
            if place[i, run] < 16:
                wanted = at.b1 * mu[i, place[i, run]] + at.rest1 * g[i, run]
                np.testing.assert_allclose(new_mu[i, place[i, run]], wanted, rtol=1e-5, atol=1e-6)


def test_what_the_kernels_cannot_take_is_said():
    assert "blocks of 128" in optim.adam8bit_unsupported(4096, 128, jnp.bfloat16, jnp.bfloat16)
    assert "multiples of 1024" in optim.adam8bit_unsupported(4096 + 256, 256, jnp.bfloat16, jnp.bfloat16)
    assert "float16" in optim.adam8bit_unsupported(4096, 256, jnp.float16, jnp.bfloat16)
    assert "runs of 24" in optim.frugal_unsupported(64, 24, 16, jnp.bfloat16, jnp.bfloat16)
    assert "0 of 64" in optim.frugal_unsupported(64, 32, 0, jnp.bfloat16, jnp.bfloat16)
    with pytest.raises(ValueError, match="expected gradients"):
        optim.frugal_adam_step(*(jnp.zeros((1, 2, 8)) for _ in range(4)), jnp.zeros((1, 3), jnp.int32), SCALARS)


def test_every_matrix_of_the_model_lowers_for_cuda_by_rows_and_by_groups():
    words = seed_words(0)
    for shape in SHAPES.values():
        *stack, m, n = shape
        layers = math.prod(stack)
        for outer, count, run in ((layers, m, n), (layers * m, n // 32, 32)):
            kinds = [(count, run, jnp.bfloat16)] * 2 + [(count // 4, run, jnp.float32)] * 2
            arrays = [jax.ShapeDtypeStruct((outer, a, b), kind) for a, b, kind in kinds]
            arrays.append(jax.ShapeDtypeStruct((outer, count), jnp.int32))
            if optim.frugal_unsupported(count, run, count // 4, jnp.bfloat16, jnp.bfloat16):
                assert (run, n) == (32, 512)  # a row of keys is shorter than a block
                continue
            run_step = functools.partial(
                optim.frugal_adam_step, scalars=SCALARS, words=words, implementation="mosaic_gpu"
            )
            step = jax.jit(run_step, donate_argnums=(0, 2, 3))
            text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("stablehlo.output_operand_alias<") == 3


@pytest.mark.gpu
def test_the_kernels_on_a_device():
    for params, seed in (("bfloat16", 5), ("float32", None)):
        words = None if seed is None else seed_words(seed)
        arrays = [jnp.asarray(x) for x in operands(2**20, params)]
        expected = step_arrays(*arrays, SCALARS, words)
        close(optim.adam8bit_step(*arrays, SCALARS, words, implementation="mosaic_gpu"), expected)
        for name in FRUGAL:
            arrays = [jnp.asarray(x) for x in runs(*FRUGAL[name], params)]
            step = functools.partial(optim.frugal_adam_step, scalars=SCALARS, words=words)
            close(
                step(*arrays, implementation="mosaic_gpu"),
                jax.jit(functools.partial(step, implementation="xla"))(*arrays),
            )
