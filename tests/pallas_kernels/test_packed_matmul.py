"""Kernels on packed weights: in the interpreter on a CPU, lowered for CUDA, and (marked gpu) on a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._bits import NF4_LEVELS, PLANES, pack
from pallas_kernels.packed_matmul import Format, decode, kernel, packed_matmul, unsupported
from pallas_kernels.packed_matmul import api as packed_matmul_api
from pallas_kernels.packed_matmul.shapes import ROWS, SHAPES

FORMATS = {
    "int4": Format(4, 128),
    "int4-g32": Format(4, 32),
    "int6": Format(6, 128),
    "int6-g64": Format(6, 64),
    "int8": Format(8, 128),
    "nf4": Format(4, 64, nf4=True),
    "q4_1": Format(4, 32, affine=True),
}


def weight(form, k, n, seed=0):
    """Returns random operands of the kernel and the weight, computed by numpy from the codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**form.bits, (k, n)).astype(np.uint8)
    scale = (rng.uniform(0.5, 1.5, (k // form.group, n)) * 0.01).astype(jnp.bfloat16)
    offset = (rng.normal(size=scale.shape) * 0.01).astype(jnp.bfloat16) if form.affine else None
    if form.nf4:
        values = np.asarray(NF4_LEVELS, jnp.bfloat16).astype(np.float32)[codes]
    elif form.affine:
        values = codes.astype(np.float32)
    elif form.bits == 8:
        values = codes.view(np.int8).astype(np.float32)
    else:
        values = codes.astype(np.float32) - 2 ** (form.bits - 1)
    dense = values * np.repeat(scale.astype(np.float32), form.group, 0)
    if offset is not None:
        dense = dense + np.repeat(offset.astype(np.float32), form.group, 0)
    planes = pack(jnp.asarray(codes), form.bits, 0, form.group)
    parts = (planes, jnp.asarray(scale), None if offset is None else jnp.asarray(offset))
    return parts, dense.astype(jnp.bfloat16).astype(np.float32)


def activations(m, k):
    return jnp.asarray(np.random.default_rng(1).normal(size=(m, k)), jnp.bfloat16)


def off(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", FORMATS)
def test_the_interpreted_kernels_equal_numpy(name):
    form = FORMATS[name]
    parts, dense = weight(form, 640, 128)
    np.testing.assert_array_equal(np.asarray(decode(*parts, form=form, implementation="xla"), np.float32), dense)
    x = activations(9, 640)
    expected = np.asarray(x, np.float32) @ dense
    for implementation in ("xla", "reference"):
        y = packed_matmul(x, *parts, form=form, out_dtype=jnp.float32, implementation=implementation)
        assert off(y, expected) < 1e-6
    y = packed_matmul(x, *parts, form=form, out_dtype=jnp.float32, implementation="mosaic_gpu", interpret=True)
    assert y.shape == (9, 128) and off(y, expected) < 1e-6


def test_the_interpreted_decoding_equals_numpy():
    form = FORMATS["int6"]
    parts, dense = weight(form, 256, 256)
    made = decode(*parts, form=form, implementation="mosaic_gpu", interpret=True)
    np.testing.assert_array_equal(np.asarray(made, np.float32), dense)


@pytest.mark.parametrize(
    "config", [kernel.Config(1, 2, 1), kernel.Config(3, 3, 2), kernel.Config(2, 4, 4), kernel.Config(2, 4, 2, 2)]
)
def test_every_way_to_cut_the_work_gives_the_same(config):
    form = FORMATS["int4"]
    parts, dense = weight(form, 1024, 256)
    x = activations(16, 1024)
    y = kernel.matmul(x, *parts, form=form, config=config, out_dtype=jnp.float32, interpret=True)
    assert off(y, np.asarray(x, np.float32) @ dense) < 1e-6


def test_what_the_kernel_cannot_take_is_said():
    assert unsupported(Format(4, 128), 256, 128) is None
    assert "256" not in (unsupported(Format(4, 64), 128, 128) or "")
    assert "multiples of 128" in unsupported(Format(4, 128), 200, 128)
    assert "2 bits" in unsupported(Format(2, 128), 128, 128)
    assert "groups of 256" in unsupported(Format(4, 256), 256, 128)
    parts, _ = weight(Format(4, 128), 128, 128)
    with pytest.raises(ValueError, match="not bfloat16"):
        packed_matmul(activations(8, 128).astype(jnp.float32), *parts, form=Format(4, 128), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="expected scales"):
        packed_matmul(activations(8, 128), *parts, form=Format(4, 64))


def abstract(form, m, k, n):
    scale = jax.ShapeDtypeStruct((k // form.group, n), jnp.bfloat16)
    planes = tuple(jax.ShapeDtypeStruct((k * width // 8, n), jnp.uint8) for width in PLANES[form.bits])
    return jax.ShapeDtypeStruct((m, k), jnp.bfloat16), planes, scale, scale if form.affine else None


@pytest.mark.parametrize("name", FORMATS)
def test_every_benchmark_shape_lowers_for_cuda(name):
    form = FORMATS[name]
    for k, n in SHAPES.values():
        x, *parts = abstract(form, 64, k, n)
        for m in (m for m in ROWS if m <= kernel.MAX_ROWS):
            config = packed_matmul_api.heuristic(m, k, n, form)
            rows = -(-m // 8) * 8
            assert kernel.smem_bytes(rows, form, config) <= 232448 and config.stages % config.warpgroups == 0
            shares = config.splits * config.parts
            assert (k // 128) % shares == 0 and k // 128 // shares >= config.warpgroups
        lower = {"lowering_platforms": ("cuda",)}
        run = jax.jit(lambda x, *p: packed_matmul(x, *p, form=form, implementation="mosaic_gpu"))
        run.trace(x, *parts).lower(**lower)
        unpack = jax.jit(lambda *p: decode(*p, form=form, implementation="mosaic_gpu"))
        unpack.trace(*parts).lower(**lower)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernels_on_a_device(name):
    form = FORMATS[name]
    for k, n in ((640, 256), (4096, 512), (2048, 14336)):
        parts, dense = weight(form, k, n)
        made = decode(*parts, form=form, implementation="mosaic_gpu")
        np.testing.assert_array_equal(np.asarray(made, np.float32), dense)
        for m in (1, 3, 8, 17, 64, 129):
            x = activations(m, k)
            y = packed_matmul(x, *parts, form=form, out_dtype=jnp.float32, implementation="mosaic_gpu")
            assert off(y, np.asarray(x, np.float32) @ dense) < 1e-5
            y = packed_matmul(x, *parts, form=form, implementation="mosaic_gpu")
            assert off(y, np.asarray(x, np.float32) @ dense) < 4e-3
