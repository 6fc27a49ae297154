"""SwiGLU kernels: a thread's program in numpy, the grid in the interpreter, lowering for CUDA, and on a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import glu
from pallas_kernels.codec import Codes, Form
from pallas_kernels.codec.kernel import Config, block_elements
from pallas_kernels.glu import kernel, reference
from pallas_kernels.glu.shapes import GROUP, SHAPES
from tests.pallas_kernels.warpgroup import Warpgroup

FORMS = [Form(4, 128), Form(8, 64, True)]
forward_arrays = jax.jit(reference.forward, static_argnums=2)
backward_arrays = jax.jit(reference.backward, static_argnums=3)
decoded_product = jax.jit(reference.of_codes, static_argnums=(2, 3))


def operands(rows, size):
    rng = np.random.default_rng(0)
    return [np.array(jnp.asarray(3 * rng.normal(size=(rows, size)), jnp.bfloat16)) for _ in range(3)]


def off(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_threads_program_is_the_reference(form):
    config = Config(2 if form.bits == 8 else 1)
    gate, up, dh = operands(block_elements(form, config) // 256, 256)
    h, d_gate, d_up = (np.full(gate.shape, 7, gate.dtype) for _ in range(3))
    expected_h, *expected = forward_arrays(gate, up, form)
    packed = [np.full(leaf.shape, 0xAA, leaf.dtype) for leaf in jax.tree.leaves(expected)]
    kernel.forward_block(form, config, Warpgroup(), gate, up, h, *packed)
    assert off(h, expected_h) < 1e-3
    for a, b in zip(packed, jax.tree.leaves(expected)):
        np.testing.assert_array_equal(a, b)
    kernel.backward_block(form, config, Warpgroup(), dh, *packed, d_gate, d_up)
    for a, b in zip((d_gate, d_up), backward_arrays(dh, *expected, form)):
        assert off(a, b) < 1e-3
    again = np.full(gate.shape, 7, gate.dtype)
    kernel.of_codes_block(form, config, Warpgroup(), *packed, again)
    assert off(again, decoded_product(*expected, form, gate.dtype)) < 1e-3


def test_the_interpreted_kernels_equal_the_reference():
    form = Form(4, 128)
    gate, up, dh = (jnp.asarray(x).reshape(2, 8, 256) for x in operands(16, 256))
    options = {"bits": 4, "group": 128, "implementation": "mosaic_gpu", "interpret": True}
    h, *made = glu.swiglu_packed(gate, up, **options)
    expected = forward_arrays(gate, up, form)
    for a, b in zip(jax.tree.leaves((h, *made)), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and off(a, b) < 1e-6
    for a, b in zip(glu.swiglu_backward(dh, *made, **options), backward_arrays(dh, *made, form)):
        assert a.shape == b.shape and off(a, b) < 1e-3
    again = glu.swiglu_of_codes(*made, **options)
    assert again.shape == gate.shape and off(again, decoded_product(*made, form, gate.dtype)) < 1e-3
    assert 1e-3 < off(again, h) < 0.2


def test_the_reference_has_the_gradients_of_the_exact_function():
    gate, up, dh = (jnp.asarray(x, jnp.float32) for x in operands(4, 256))
    form = Form(8, 64)
    y, back = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    h, *made = reference.forward(gate, up, form)
    assert off(h, y) < 1e-6
    for a, b in zip(reference.backward(dh, *made, form), back(dh)):
        assert off(a, b) < 0.01


def test_what_the_kernels_cannot_take_is_said():
    assert glu.unsupported(Form(4, 128), (8, 2048), jnp.bfloat16) is None
    assert "float32" in glu.unsupported(Form(4, 128), (8, 2048), jnp.float32)
    with pytest.raises(ValueError, match="alike"):
        glu.swiglu_packed(jnp.ones((2, 128)), jnp.ones((2, 256)), bits=4, group=128)
    with pytest.raises(ValueError, match="expected codes"):
        codes = Codes(jnp.zeros((2, 64), jnp.uint8), jnp.zeros((2, 1), jnp.uint16))
        glu.swiglu_backward(jnp.ones((2, 256)), codes, codes, bits=4, group=128)
    with pytest.raises(ValueError, match="codes alike"):
        glu.swiglu_of_codes(codes, Codes(jnp.zeros((2, 32), jnp.uint8), codes.scale), bits=4, group=128)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_benchmark_shape_lowers_for_cuda(bits, symmetric):
    options = {"bits": bits, "group": GROUP, "implementation": "mosaic_gpu"}
    for shape in SHAPES.values():
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        forward = jax.jit(functools.partial(glu.swiglu_packed, symmetric=symmetric, **options))
        lowered = forward.trace(x, x).lower(lowering_platforms=("cuda",))
        backward = jax.jit(lambda *args: glu.swiglu_backward(*args, **options))
        backward.trace(x, *lowered.out_info[1:]).lower(lowering_platforms=("cuda",))
        of_codes = jax.jit(lambda *args: glu.swiglu_of_codes(*args, **options))
        of_codes.trace(*lowered.out_info[1:]).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("form", [*FORMS, Form(2, 128)], ids=str)
def test_the_kernels_on_a_device(form):
    options = {"bits": form.bits, "group": form.group, "implementation": "mosaic_gpu"}
    gate, up, dh = (jnp.asarray(x) for x in operands(1024, 2048))
    h, *made = glu.swiglu_packed(gate, up, symmetric=form.symmetric, **options)
    expected_h, *expected = forward_arrays(gate, up, form)
    assert off(h, expected_h) < 1e-3
    for a, b in zip(made, expected):
        assert (np.asarray(a.codes) != np.asarray(b.codes)).mean() < 5e-3  # ties, as for the codec
    for a, b in zip(glu.swiglu_backward(dh, *made, **options), backward_arrays(dh, *made, form)):
        assert off(a, b) < 1e-3
    assert off(glu.swiglu_of_codes(*made, **options), decoded_product(*made, form, gate.dtype)) < 1e-3
