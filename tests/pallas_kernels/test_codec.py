"""Codec kernels: a thread's program in numpy, the grid in the interpreter, lowering for CUDA, and on a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs
from pallas_kernels import codec
from pallas_kernels._bits import seed_words
from pallas_kernels.codec import Form, kernel, reference
from pallas_kernels.codec.shapes import GROUP, SHAPES
from tests.pallas_kernels.warpgroup import Warpgroup

FORMS = [Form(bits, group, symmetric) for bits, group in ((8, 128), (4, 64), (2, 128)) for symmetric in (False, True)]
encode_arrays = jax.jit(reference.encode, static_argnums=2)
decode_arrays = jax.jit(reference.decode, static_argnums=(1, 2))


def numbers(rows, group, dtype="bfloat16", seed=0):
    """Returns groups of many sizes and centres, with zeros, equal numbers, one sign, and a tie in every code."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, group)) * np.exp2(rng.integers(-6, 6, (rows, 1))) + 3 * rng.normal(size=(rows, 1))
    x[0], x[1], x[2], x[3] = 0, -3, np.abs(x[2]), np.arange(group) / 2
    return np.array(jnp.asarray(x, dtype))


def run_encode(form, x, words, block=0, units=1, products=0):
    """Runs the encoding program of a block and returns (codes, scale, offset or None)."""
    groups = x.shape[0]
    outs = [np.full(x.size * form.bits // 8, 0xAA, np.uint8)]
    outs += [np.full(groups, 0xAAAA, np.uint16) for _ in range(1 if form.symmetric else 2)]
    thread = Warpgroup()
    seeds = [] if words is None else [np.concatenate([np.stack(words), kernel.FACTORS])]
    config = kernel.Config(units, products)
    kernel.encode_block(form, config, x.dtype.name, words is not None, thread, x, *seeds, *outs, thread.const(block))
    codes = outs[0].reshape(groups, -1)
    return codec.Codes(codes, outs[1][:, None], None if form.symmetric else outs[2][:, None])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_threads_program_makes_the_codes_of_xla(form):
    config = kernel.Config(2 if form.bits == 8 else 1)
    count = kernel.block_elements(form, config)
    for dtype, seed in (("bfloat16", None), ("bfloat16", 7), ("float32", 7), ("float16", None)):
        x = numbers(count // form.group, form.group, dtype)
        words = None if seed is None else seed_words(seed)
        made = run_encode(form, x, words, block=5, units=config.units)
        expected = encode_arrays(jnp.asarray(x), words, form, np.uint32(5 * count))
        for a, b in zip(made, expected):
            assert (a is None) == (b is None)
            np.testing.assert_array_equal(a, b)
        out = np.full(count, 7, x.dtype)
        parts = [part.reshape(-1) for part in made if part is not None]
        kernel.decode_block(form, config, dtype, Warpgroup(), *parts, out)
        np.testing.assert_array_equal(out.reshape(x.shape), decode_arrays(made, form, jnp.dtype(dtype)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_reference_is_the_codec_of_the_library(form):
    library = codecs.Grouped(form.bits, form.group, form.symmetric, "bfloat16")
    for dtype, seed in (("bfloat16", None), ("float32", 3)):
        x = jnp.asarray(numbers(24, form.group, dtype, seed=2)).reshape(4, -1)
        packed = library.encode(x, -1, seed)
        made = encode_arrays(x, None if seed is None else seed_words(seed), form)
        np.testing.assert_array_equal(made[0], packed.planes[0])
        np.testing.assert_array_equal(made[1], packed.scale)
        if not form.symmetric:
            np.testing.assert_array_equal(reference.floats(made[2]), reference.floats(packed.offset))
        np.testing.assert_array_equal(decode_arrays(made, form, jnp.dtype(dtype)), packed.decode())


def test_how_the_hash_is_computed_does_not_change_the_codes():
    x, words = numbers(16, 128), seed_words(3)
    plain, *others = [run_encode(Form(4, 128), x, words, products=n)[0] for n in (0, 3, 6)]
    for codes in others:
        np.testing.assert_array_equal(codes, plain)


def test_nan_makes_its_group_nan_and_no_other():
    x = numbers(16, 128)
    x[3, 70] = np.nan
    for form in (Form(4, 128), Form(4, 128, True)):
        _, scale, _ = run_encode(form, x, None)
        assert (np.isnan(np.asarray(reference.floats(jnp.asarray(scale))))[:, 0] == (np.arange(16) == 3)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_interpreted_kernels_equal_the_reference(symmetric):
    form = Form(4, 64, symmetric)
    x = jnp.asarray(numbers(96, 64)).reshape(3, 2048)
    run = functools.partial(codec.encode, bits=4, group=64, symmetric=symmetric, seed=9)
    made = run(x, implementation="mosaic_gpu", interpret=True)
    for a, b in zip(made, encode_arrays(x, seed_words(9), form)):
        np.testing.assert_array_equal(a, b)
    back = codec.decode(made, bits=4, group=64, implementation="mosaic_gpu", interpret=True)
    np.testing.assert_array_equal(back, decode_arrays(made, form, jnp.dtype(jnp.bfloat16)))


def test_what_the_kernels_cannot_take_is_said():
    assert codec.unsupported(Form(4, 128), (16, 128), jnp.bfloat16) is None
    assert "3 bits" in codec.unsupported(Form(3, 128), (16, 128), jnp.bfloat16)
    assert "groups of 48" in codec.unsupported(Form(4, 48), (16, 96), jnp.bfloat16)
    assert "float64" in codec.unsupported(Form(4, 128), (16, 128), np.float64)
    assert "multiples of 2048" in codec.unsupported(Form(4, 128), (15, 128), jnp.bfloat16)
    assert "do not divide" in codec.unsupported(Form(4, 128), (16, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="cannot run: groups of 48"):
        codec.encode(jnp.ones((2, 48)), bits=4, group=48, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="expected codes"):
        codec.decode(codec.Codes(jnp.zeros((2, 8), jnp.uint8), jnp.zeros((2, 1), jnp.uint16)), bits=4, group=32)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_benchmark_shape_lowers_for_cuda(form):
    options = {"bits": form.bits, "group": GROUP, "implementation": "mosaic_gpu"}
    for shape in SHAPES.values():
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for seed in (None, 1):
            encode = jax.jit(functools.partial(codec.encode, symmetric=form.symmetric, seed=seed, **options))
            lowered = encode.trace(x).lower(lowering_platforms=("cuda",))
        decode = jax.jit(lambda made: codec.decode(made, **options))
        decode.trace(lowered.out_info).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_kernels_on_a_device(form):
    options = {"bits": form.bits, "group": form.group, "implementation": "mosaic_gpu"}
    for dtype in ("bfloat16", "float32", "float16"):
        for seed in (None, 11):
            x = jnp.asarray(numbers(4096, form.group, dtype)).reshape(64, -1)
            made = codec.encode(x, symmetric=form.symmetric, seed=seed, **options)
            expected = encode_arrays(x, None if seed is None else seed_words(seed), form)
            np.testing.assert_array_equal(made[1], expected[1])
            # The reference divides by the scale and the kernel multiplies by its reciprocal: ties may part.
            codes_of_a_byte = 8 // form.bits
            assert (np.asarray(made[0]) != np.asarray(expected[0])).mean() < 2.5e-3 * max(2, codes_of_a_byte)
            step = np.asarray(made[1]).view(jnp.bfloat16).astype(np.float32).repeat(form.group, -1).reshape(x.shape)
            apart = np.abs(decode_arrays(made, form, jnp.float32) - decode_arrays(expected, form, jnp.float32))
            assert (apart <= 1.01 * np.abs(step)).all()
            back = codec.decode(made, dtype=x.dtype, **options)
            np.testing.assert_array_equal(back, decode_arrays(made, form, x.dtype))
