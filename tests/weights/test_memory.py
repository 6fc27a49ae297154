"""Training a LoRA on a packed base holds codes, factors, optimizer state and block inputs, and no dense weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from memjax import adapters, codecs, weights
from memjax.core.bytes import compiled_bytes, nbytes
from memjax.weights import lift

D, F, RANK, ROWS = 128, 256, 4, 32
DEPTHS = (4, 8, 16)
CODEC = codecs.int4(group=32)
ADAPTER = adapters.lora(rank=RANK, targets="**/kernel")
OPTIMIZER = optax.adam(1e-3)


def model(params, x):
    def block(x, layer):
        h = jnp.tanh(x @ layer["up"]["kernel"].astype(x.dtype))
        return x + h @ layer["down"]["kernel"].astype(x.dtype), None

    return lax.scan(jax.checkpoint(block, prevent_cse=False), x, params["layers"])[0]


def trees(depth, codec=CODEC):
    """Returns abstract (frozen, theta, optimizer state, batch)."""

    def make():
        params = {"layers": {"up": {"kernel": jnp.zeros((depth, D, F))}, "down": {"kernel": jnp.zeros((depth, F, D))}}}
        frozen = weights.quantize(params, codec)
        theta = ADAPTER.init(jax.random.key(0), frozen)
        return frozen, theta, OPTIMIZER.init(theta), jnp.zeros((ROWS, D), jnp.bfloat16)

    return jax.eval_shape(make)


def compile_step(depth, apply, codec=CODEC):
    def step(theta, state, frozen, x):
        def loss(theta):
            return jnp.mean(apply(ADAPTER.attach(frozen, theta), x).astype(jnp.float32) ** 2)

        grads = jax.grad(loss)(theta)
        updates, state = OPTIMIZER.update(grads, state)
        return optax.apply_updates(theta, updates), state

    frozen, theta, state, x = trees(depth, codec)
    return jax.jit(step, donate_argnums=(0, 1)).lower(theta, state, frozen, x).compile()


@pytest.fixture(scope="module")
def compiled():
    return {depth: compile_step(depth, lift(model)) for depth in DEPTHS}


def formula(depth):
    """Bytes that grow with depth: codes, factors and moments (donated: counted once), gradients, block inputs."""
    frozen, theta, state, x = trees(depth)
    return nbytes(frozen) + nbytes(theta) + nbytes(state) + nbytes(theta) + depth * nbytes(x)


def slope(sizes):
    return np.polyfit(DEPTHS, sizes, 1)


@pytest.mark.smoke
def test_the_slope_with_depth_is_the_formula(compiled, record_property):
    measured, intercept = slope([compiled_bytes(compiled[depth]).total for depth in DEPTHS])
    predicted, _ = slope([formula(depth) for depth in DEPTHS])
    record_property("slope_bytes", float(measured))
    record_property("formula_bytes", float(predicted))
    record_property("intercept_bytes", float(intercept))
    print(f"slope {measured:.0f} bytes a layer, formula {predicted:.0f}, intercept {intercept:.0f}")
    assert measured == pytest.approx(predicted, rel=0.02)
    assert 0 <= intercept < 8 * D * F * 4


def arrays_of(compiled):
    """Returns {(dtype, shape)} of every array in the optimized program."""
    found = re.findall(r"\b(pred|[usf]\d+|bf16)\[([\d,]+)\]", compiled.as_text())
    return {(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found}


def dense_stacks(compiled, depth):
    return [
        (dtype, shape)
        for dtype, shape in arrays_of(compiled)
        if dtype in ("f32", "bf16", "f16") and np.prod(shape) >= depth * D * F
    ]


def test_no_array_is_as_large_as_a_dense_stack(compiled):
    depth = DEPTHS[-1]
    assert ("u8", (depth, D // 2, F)) in arrays_of(compiled[depth])
    assert dense_stacks(compiled[depth], depth) == []


@pytest.mark.parametrize("codec", [codecs.nf4(32)], ids=str)
def test_no_other_format_is_decoded_as_a_stack(codec):
    depth = DEPTHS[-1]
    compiled = compile_step(depth, lift(model), codec)
    assert ("u8", (depth, D // (2 if codec.bits == 4 else 4), F)) in arrays_of(compiled)
    assert dense_stacks(compiled, depth) == []


def test_the_check_sees_a_dense_base():
    depth = DEPTHS[0]
    dense = compile_step(depth, lambda params, x: model(weights.materialize(params), x))
    assert dense_stacks(dense, depth)
    predicted = formula(depth)
    assert compiled_bytes(dense).total > 1.5 * predicted


def test_donation_is_what_the_formula_assumes(compiled):
    _, theta, state, _ = trees(DEPTHS[0])
    assert compiled_bytes(compiled[DEPTHS[0]]).alias == nbytes(theta) + nbytes(state)
