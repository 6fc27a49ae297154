"""Codecs where a GPU kernel takes them: the program for a Hopper GPU calls it, and others go the usual way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import codecs
from memjax.codecs import fused, packed

INT4 = codecs.int4(group=64, symmetric=False)
NAMES = ("encode_words", "decode")
X = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)


def forget():
    """Forgets traces, which hold the choice that was made in them."""
    packed._encode.clear_cache()
    packed._decode.clear_cache()


@pytest.fixture
def hopper(monkeypatch):
    """Lets small arrays on one device take the kernels' path."""
    monkeypatch.setattr(fused, "on_hopper", lambda: True)
    monkeypatch.setattr(fused, "LEAST", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    yield
    forget()


def kernels_in(fn, *args):
    forget()
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")


def test_a_gpu_program_calls_the_kernels(hopper):
    def there_and_back(codec, key=None):
        return lambda x: codec.encode(x, -1, key).decode()

    assert kernels_in(there_and_back(INT4), X) == 2
    assert kernels_in(there_and_back(codecs.int8(group="channel"), 3), X) == 2
    assert kernels_in(jax.vmap(there_and_back(INT4, 3)), jax.ShapeDtypeStruct((3, *X.shape), X.dtype)) == 2
    keys = jax.ShapeDtypeStruct((5,), jnp.uint32)

    def layers(x, keys):
        return lax.scan(lambda x, key: (there_and_back(INT4, key)(x), None), x, keys)[0]

    assert kernels_in(layers, X, keys) == 2
    rebuilt = jax.checkpoint(lambda x: jnp.sum(x * there_and_back(INT4)(x)))
    assert kernels_in(jax.grad(rebuilt), X) >= 2


def test_what_the_kernels_cannot_take_goes_the_usual_way(hopper, monkeypatch):
    def taken(codec, axis=-1, shape=X.shape, dtype=X.dtype):
        return kernels_in(lambda x: codec.encode(x, axis).decode(), jax.ShapeDtypeStruct(shape, dtype))

    assert taken(INT4) == 2
    assert not any(map(taken, (codecs.int3(), codecs.fp8(64), codecs.nf4(), codecs.int4(search=True))))
    assert not taken(codecs.int4(scale_dtype="float16")) and not taken(codecs.int4(group=48), shape=(64, 96))
    assert not taken(INT4, axis=-2) and not taken(INT4, shape=(3, 64)) and not taken(INT4, axis=(-2, -1))
    monkeypatch.setattr(fused, "LEAST", 2**18)
    assert not taken(INT4)
    monkeypatch.setattr(fused, "LEAST", 1)
    monkeypatch.setattr(fused, "on_hopper", lambda: False)
    assert not taken(INT4)


def test_on_several_devices_only_what_shard_map_has_cut(hopper, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)

    def fn(x):
        return INT4.encode(x, -1).decode()

    assert kernels_in(fn, X) == 0
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def cut(check):
        return jax.shard_map(fn, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check)

    wide = jax.ShapeDtypeStruct((128, 128), X.dtype)
    assert kernels_in(cut(False), wide) == 2
    assert kernels_in(cut(True), wide) == 2
    assert jax.jit(cut(True)).trace(wide).out_info.shape == wide.shape


def test_the_choice_does_not_change_the_codes(hopper, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 256)), jnp.bfloat16)
    codec = codecs.int4(group=128, symmetric=False)

    def run():
        forget()
        made = [codec.encode(x, -1, key) for key in (None, 5)]
        return made, [part.decode() for part in made]

    interpreted = {name: functools.partial(getattr(fused.kernels, name), interpret=True) for name in NAMES}
    for name in NAMES:
        monkeypatch.setattr(fused.kernels, name, interpreted[name])
    by_kernels = run()
    monkeypatch.setattr(fused, "on_hopper", lambda: False)
    for a, b in zip(jax.tree.leaves(by_kernels), jax.tree.leaves(run()), strict=True):
        np.testing.assert_array_equal(a, b)
