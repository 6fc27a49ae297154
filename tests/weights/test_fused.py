"""Packed weights where a GPU kernel takes them: on a CPU the same program must give what it gives without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from memjax import codecs, weights
from memjax.weights import fused, lift
from pallas_kernels.packed_matmul import api
from tests.random_views import array

CODECS = {
    "int4": codecs.int4(group=128),
    "int6": codecs.int6(group=64),
    "nf4": codecs.nf4(),
    "q4_1": codecs.q4_1(),
}


@pytest.fixture
def hopper(monkeypatch):
    """Lets weights take the kernels' path."""
    monkeypatch.setattr(fused.kernels, "on_hopper", lambda: True)
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def params(codec):
    dense = {"up": {"kernel": array(0, 2, 128, 256) / 11}, "down": {"kernel": array(1, 2, 256, 128) / 16}}
    return weights.quantize(jax.tree.map(lambda w: w.astype(jnp.bfloat16), dense), codec)


def model(params, x):
    def layer(x, p):
        return x + jax.nn.silu(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    return lax.scan(jax.checkpoint(layer), x, params)[0]


def value_and_gradient(params, x):
    y, back = jax.vjp(lambda x: lift(model)(params, x), x)
    return y, back(jnp.ones_like(y))[0]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("rows", [4, 512])
def test_values_and_gradients_are_those_of_decoding(name, rows, monkeypatch):
    packed = params(CODECS[name])
    x = array(2, rows, 128).astype(jnp.bfloat16)
    expected = jax.jit(value_and_gradient)(packed, x)
    monkeypatch.setattr(fused.kernels, "on_hopper", lambda: True)  # the kernels' XLA form still runs on a CPU
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    actual = jax.jit(lambda *args: value_and_gradient(*args))(packed, x)
    for a, b in zip(actual, expected):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_a_gpu_program_calls_the_kernels(hopper):
    packed = params(CODECS["int4"])
    few = jax.jit(lambda p, x: value_and_gradient(p, x)[0]).trace(packed, array(2, 4, 128).astype(jnp.bfloat16))
    assert few.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2
    x = array(2, 512, 128).astype(jnp.bfloat16)
    both = jax.jit(lambda p, x: value_and_gradient(p, x)).trace(packed, x).lower(lowering_platforms=("cuda",)).as_text()
    assert both.count("@mosaic_gpu") == 5  # both weights in forward and in backward, and one more under checkpoint


def test_what_the_kernels_cannot_take_goes_the_usual_way(hopper):
    w = array(0, 128, 128).astype(jnp.bfloat16)
    packed = weights.quantize({"kernel": w}, codecs.int4(group=64))["kernel"]
    assert fused.kernel_format(packed.packed, packed.axes, ()) is not None
    assert fused.kernel_format(packed.packed, packed.axes, (jnp.float32,)) is None
    assert fused.kernel_format(packed.packed, weights.Axes((-1,), (-2,)), ()) is None
    for other in (codecs.int3(), codecs.int4(group="channel"), codecs.fp8()):
        view = weights.quantize({"kernel": w}, other)["kernel"]
        assert fused.kernel_format(view.packed, view.axes, ()) is None
    assert not fused.takes(jnp.zeros((4, 128)), {}) and not fused.takes(jnp.zeros((0, 128), jnp.bfloat16), {})
    assert not fused.takes(jnp.zeros((4, 128), jnp.bfloat16), {"precision": lax.Precision.HIGHEST})


@pytest.mark.parametrize("codec", [codecs.int8(), codecs.nf4()], ids=["int8", "nf4"])
def test_a_wide_weight_is_decoded_in_blocks(codec, monkeypatch):
    view = weights.quantize({"kernel": array(0, 3, 256, 4096)}, codec)["kernel"]
    inputs = array(1, 3, 8, 256)

    def run(views, inputs):
        def step(total, part):
            view, x = part
            y, back = jax.vjp(lambda x: lift(lambda w, x: x @ w)(view, x), x)
            return total + y, back(jnp.cos(y))[0]

        return lax.scan(step, jnp.zeros((8, 4096)), (views, inputs))

    whole = jax.jit(run).lower(view, inputs).compile()
    monkeypatch.setattr("memjax.weights.packed.WIDE_BYTES", 2**20)
    blocks = jax.jit(lambda *args: run(*args)).lower(view, inputs).compile()
    for a, b in zip(whole(view, inputs), blocks(view, inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    saved = whole.memory_analysis().temp_size_in_bytes - blocks.memory_analysis().temp_size_in_bytes
    assert saved > 1.5 * 2**20  # of the four that the dense weight takes


@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_shard_map_the_kernels_are_taken_and_under_gspmd_not(check_vma, monkeypatch):
    monkeypatch.setattr(fused.kernels, "on_hopper", lambda: True)
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    packed, x = params(CODECS["int4"]), jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.shard_map(lift(model), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    for run, calls in ((cut, True), (lift(model), False)):
        text = jax.jit(run).trace(packed, x).lower(lowering_platforms=("cuda",)).as_text()
        assert ("mosaic_gpu" in text) == calls
