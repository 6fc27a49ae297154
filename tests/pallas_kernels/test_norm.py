"""RMSNorm kernels: a thread's program in numpy, the grid in the interpreter, lowering for CUDA, and on a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import norm
from pallas_kernels.codec import Codes, Form
from pallas_kernels.codec import reference as codec
from pallas_kernels.norm import kernel, reference
from pallas_kernels.norm.shapes import GROUP, SHAPES
from tests.pallas_kernels.warpgroup import Warpgroup

EPS = 1e-5
forward_arrays = jax.jit(reference.forward, static_argnums=(2, 3))
backward_arrays = jax.jit(reference.backward, static_argnums=4)


def operands(rows, size, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, size)) * np.exp(rng.normal(size=(rows, 1)))
    gain = (1 + 0.3 * rng.normal(size=size)).astype(np.float32)
    return *(np.array(jnp.asarray(v, jnp.bfloat16)) for v in (x, rng.normal(size=(rows, size)))), gain


def empty(*shape, dtype=np.uint16):
    return np.full(shape, 0xAA, dtype)


def packed_outputs(form, rows, size):
    codes = empty(rows, size * form.bits // 8, dtype=np.uint8)
    return [codes, *(empty(rows, size // form.group) for _ in range(1 if form.symmetric else 2))]


def off(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    "size, form", [(2048, Form(4, 128)), (1024, Form(4, 64)), (512, Form(4, 128, True)), (1024, Form(8, 128))], ids=str
)
def test_a_threads_program_is_the_reference(size, form):
    cut = kernel.cut_row(size, form)
    x, dy, gain = operands(3 * cut.rows, size)
    y, rstd, packed = (
        empty(*x.shape).view(x.dtype),
        empty(3 * cut.rows, dtype=np.float32),
        packed_outputs(form, *x.shape),
    )
    sums = np.full(2 * kernel.WARPS, np.nan, np.float32)
    for block in range(3):
        mine = slice(block * cut.rows, (block + 1) * cut.rows)
        outs = [part[mine] for part in (y, *packed, rstd)]
        kernel.forward_rows(form, size, cut, EPS, Warpgroup(), x[mine], gain, *outs, sums)
    expected_y, _, expected_rstd = forward_arrays(x, gain, EPS, form)
    np.testing.assert_allclose(rstd, expected_rstd, rtol=1e-6)
    assert off(y, expected_y) < 1e-3
    normalized = jnp.asarray(x.astype(np.float32) * rstd[:, None]).astype(jnp.bfloat16)
    for a, b in zip(packed, jax.jit(codec.encode, static_argnums=(1, 2))(normalized, None, form)):
        np.testing.assert_array_equal(a, b)

    dx, d_gain = empty(*dy.shape).view(dy.dtype), np.full((2, cut.rows, size), np.nan, np.float32)
    for block in range(2):  # of which the first goes down two strips of rows and the second one
        thread = Warpgroup()
        words = [thread.const(n) for n in (block, 2, 2 - block)]
        kernel.backward_rows(form, size, cut, thread, dy, *packed, rstd, gain, dx, d_gain[block], sums, *words)
    expected_dx, expected_d_gain = backward_arrays(dy, Codes(*packed), rstd, gain, form)
    assert off(dx, expected_dx) < 1e-3
    assert off(d_gain.sum((0, 1)), expected_d_gain) < 1e-6


@pytest.mark.parametrize("form", [Form(4, 64), Form(2, 128, True)], ids=str)
def test_the_interpreted_kernels_equal_the_reference(form):
    size = 1024
    x, dy, gain = operands(20, size)
    options = {"bits": form.bits, "group": form.group, "implementation": "mosaic_gpu", "interpret": True}
    made = norm.rms_norm_packed(jnp.asarray(x).reshape(5, 4, size), gain, eps=EPS, symmetric=form.symmetric, **options)
    expected = forward_arrays(x, gain, EPS, form)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected)):
        assert off(a.reshape(b.shape), b) < 1e-6
    kept = expected[1:]
    expected_dx, expected_d_gain = backward_arrays(dy, *kept, gain, form)
    for blocks in (None, 2):
        if blocks is None:
            dx, d_gain = norm.rms_norm_backward(jnp.asarray(dy), *kept, gain, **options)
        else:
            dx, d_gain = kernel.backward(jnp.asarray(dy), *kept, gain, form=form, blocks=2, interpret=True)
        assert off(dx, expected_dx) < 1e-3 and off(d_gain, expected_d_gain) < 1e-6


def test_the_reference_has_the_gradients_of_the_exact_norm():
    form = Form(8, 64)
    x, dy, gain = (jnp.asarray(v, jnp.float32) for v in operands(6, 256))

    def exact(x, gain):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * gain

    y, back = jax.vjp(exact, x, gain)
    made, codes, rstd = reference.forward(x, gain, EPS, form)
    assert off(made, y) < 1e-6
    for a, b in zip(reference.backward(dy, codes, rstd, gain, form), back(dy)):
        assert off(a, b) < 0.01


def test_what_the_kernels_cannot_take_is_said():
    assert norm.unsupported(Form(4, 128), (8, 4096), jnp.bfloat16) is None
    assert "float32" in norm.unsupported(Form(4, 128), (8, 4096), jnp.float32)
    assert "rows of 768" in norm.unsupported(Form(4, 128), (8, 768), jnp.bfloat16)
    assert "rows of 16384" in norm.unsupported(Form(4, 128), (8, 16384), jnp.bfloat16)
    assert "multiples of 2" in norm.unsupported(Form(4, 128), (7, 1024), jnp.bfloat16)
    with pytest.raises(ValueError, match="cannot run: arrays of float32"):
        norm.rms_norm_packed(jnp.ones((2, 256)), jnp.ones(256), eps=EPS, bits=4, group=64, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="a gain"):
        norm.rms_norm_packed(jnp.ones((2, 256)), jnp.ones(128), eps=EPS, bits=4, group=64)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_benchmark_shape_lowers_for_cuda(bits, symmetric):
    options = {"bits": bits, "group": GROUP, "implementation": "mosaic_gpu"}
    for shape in SHAPES.values():
        x, gain = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16)
        forward = jax.jit(functools.partial(norm.rms_norm_packed, eps=EPS, symmetric=symmetric, **options))
        lowered = forward.trace(x, gain).lower(lowering_platforms=("cuda",))
        backward = jax.jit(lambda *args: norm.rms_norm_backward(*args, **options))
        backward.trace(x, *lowered.out_info[1:], gain).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("form", [Form(8, 128), Form(4, 64), Form(4, 128, True), Form(2, 128)], ids=str)
def test_the_kernels_on_a_device(form):
    options = {"bits": form.bits, "group": form.group, "implementation": "mosaic_gpu"}
    for rows, size in ((1004, 2048), (640, 4096), (400, 8192), (12, 512)):
        if kernel.cut_row(size, form) is None:
            continue
        x, dy, gain = (jnp.asarray(v) for v in operands(rows, size))
        y, made, rstd = norm.rms_norm_packed(x, gain, eps=EPS, symmetric=form.symmetric, **options)
        expected_y, expected, expected_rstd = forward_arrays(x, gain, EPS, form)
        np.testing.assert_allclose(rstd, expected_rstd, rtol=1e-5)
        assert off(y, expected_y) < 2e-3
        assert (np.asarray(made.codes) != np.asarray(expected.codes)).mean() < 5e-3
        dx, d_gain = norm.rms_norm_backward(dy, made, rstd, gain, **options)
        expected_dx, expected_d_gain = backward_arrays(dy, made, rstd, gain, form)
        assert off(dx, expected_dx) < 2e-3 and off(d_gain, expected_d_gain) < 1e-5
