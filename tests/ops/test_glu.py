"""SwiGLU and GeGLU: gradients, and that two arrays, or their codes, are all that is kept."""

import functools

import jax
import jax.numpy as jnp
import pytest

from memjax import codecs, ops
from tests.ops.checks import assert_matches, kept_beside, total_bytes
from tests.random_views import array

GATED = {
    "swiglu": (ops.swiglu, jax.nn.silu),
    "geglu": (functools.partial(ops.geglu, approximate=False), functools.partial(jax.nn.gelu, approximate=False)),
    "geglu tanh": (ops.geglu, functools.partial(jax.nn.gelu, approximate=True)),
}


def inputs(dtype=jnp.float32):
    return (3 * array(0, 2, 5, 64)).astype(dtype), array(1, 2, 5, 64, dtype=dtype)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 5e-6), (jnp.bfloat16, 3e-3), (jnp.float16, 4e-4)])
def test_values_and_gradients(name, dtype, tolerance):
    fn, activation = GATED[name]
    assert_matches(fn, lambda gate, up: activation(gate) * up, inputs(dtype), tolerance)


@pytest.mark.parametrize("name", GATED)
def test_keeps_its_inputs_or_their_codes_and_nothing_else(name):
    fn, _ = GATED[name]
    args = inputs(jnp.bfloat16)
    y, kept = kept_beside(fn, args)
    assert not kept
    codec = codecs.int4(group=32)
    coded_y, kept = kept_beside(functools.partial(fn, residual=codec), args)
    assert (coded_y == y).all()
    assert total_bytes(kept) == 2 * y.size * codec.bits_per_element() / 8
    assert not any(leaf.shape == y.shape for leaf in kept)


def test_gradients_from_codes():
    args = inputs()
    exact = jax.vjp(ops.swiglu, *args)[1](args[0])
    for codec, limit in ((codecs.int8(group=32), 0.02), (codecs.int4(group=32, symmetric=False), 0.25)):
        coded = jax.vjp(functools.partial(ops.swiglu, residual=codec), *args)[1](args[0])
        for a, b in zip(coded, exact):
            assert 0 < jnp.linalg.norm(a - b) < limit * jnp.linalg.norm(b)


def test_arguments_that_do_not_fit():
    gate, up = inputs()
    with pytest.raises(ValueError, match="must be alike"):
        ops.swiglu(gate, up[..., :-1])
    with pytest.raises(ValueError, match="must be alike"):
        ops.geglu(gate, up.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="residual must be"):
        ops.swiglu(gate, up, residual="output")
