"""The transform matrix of `compress_residuals`: transforms x frameworks x weights, against the function itself.

Models and transforms are those of `test_lift`, on sequences long enough to have groups; weights are dense, or packed
with adapters, under `lift` inside or outside.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from memjax.remat import ResidualPolicy, compress_residuals
from memjax.weights import lift, materialize
from tests.random_views import array
from tests.transforms.test_lift import (
    APPLY,
    STACKED,
    TRANSFORMS,
    D,
    LinenBlock,
    frozen_and_theta,
    params_of,
    plain_block,
)

X = array(0, 4, 32, D)
# Every float array of the block has an axis of 32 only where attention weights [.., 32, 32] are; the rest is kept.
POLICY = ResidualPolicy(bits=8, group=32, min_size=0, min_share=0, inputs=(1,))
WEIGHTS = ("dense", "lift inside", "lift outside")


def transformed(transform, f, weights):
    through = functools.partial(TRANSFORMS[transform], f)
    return lift(through) if weights == "lift outside" else through


def gradients(program, params, theta, x, attach):
    def loss(theta, params, x):
        return jnp.sum(jnp.sin(program(attach(params, theta), x)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))(theta, params, x)


def assert_near(actual, expected):
    assert abs(actual[0] - expected[0]) <= 1e-5 * abs(expected[0]) + 1e-5
    flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (actual[1], expected[1])]
    error = jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1])
    assert 0 < error < 0.01


FIRST_ORDER = tuple(name for name in TRANSFORMS if name != "grad")  # of a gradient there is no gradient
CASES = list(itertools.product(FIRST_ORDER, APPLY, WEIGHTS))
COVERING = {(name, tuple(APPLY)[i % 3], WEIGHTS[i // 2 % 3]) for i, name in enumerate(FIRST_ORDER)}


@pytest.mark.parametrize(
    "transform, name, weights",
    [pytest.param(*c, marks=() if c in COVERING else pytest.mark.slow, id="-".join(c)) for c in CASES],
)
def test_matrix(transform, name, weights):
    stacked = transform in STACKED
    if weights == "dense":
        theta, params, attach = params_of(name, stacked), (), lambda params, theta: theta
    else:
        adapter, params, theta = frozen_and_theta(name, "lora on packed", stacked)
        attach = adapter.attach
    inner = lift(APPLY[name]) if weights == "lift inside" else APPLY[name]
    program = transformed(transform, compress_residuals(inner, POLICY), weights)
    reference = functools.partial(TRANSFORMS[transform], APPLY[name])

    def dense(params, theta):
        return materialize(attach(params, theta))

    assert_near(gradients(program, params, theta, X, attach), gradients(reference, params, theta, X, dense))


def test_a_gradient_inside():
    program = compress_residuals(plain_block, POLICY)
    params = params_of("plain", False)
    actual, expected = (jax.jit(functools.partial(TRANSFORMS["grad"], f))(params, X) for f in (program, plain_block))
    assert 0 < jnp.linalg.norm(actual - expected) < 0.01 * jnp.linalg.norm(expected)
    adapter, frozen, theta = frozen_and_theta("plain", "lora on packed", False)
    lifted = jax.jit(lift(functools.partial(TRANSFORMS["grad"], program)))(adapter.attach(frozen, theta), X)
    expected = TRANSFORMS["grad"](plain_block, materialize(adapter.attach(frozen, theta)), X)
    assert 0 < jnp.linalg.norm(lifted - expected) < 0.01 * jnp.linalg.norm(expected)


@pytest.mark.smoke
@pytest.mark.parametrize("weights", WEIGHTS[1:])
def test_the_body_of_a_scan_over_layers(weights):
    """Carry in front, params and what else tells layers apart behind, as models scan."""
    adapter, frozen, theta = frozen_and_theta("plain", "lora on packed", True)

    def body(apply):
        def step(x, layer):
            params, (index, scaled) = layer
            return lax.cond(scaled, lambda y: y * 0.5, lambda y: y, apply(params, x)) + index, None

        return step

    def model(step, params, x):
        xs = jnp.arange(len(frozen["dense"]["kernel"].shape) - 1), jnp.array([True, False])
        return lax.scan(step, x, (params, xs))[0]

    compress = functools.partial(
        compress_residuals,
        policy=POLICY.__class__(bits=8, group=32, min_size=0, min_share=0, inputs=(0,)),
        params=(1,),
        prevent_cse=False,
    )
    if weights == "lift inside":
        program = functools.partial(model, compress(lift(body(plain_block))))
    else:
        program = lift(functools.partial(model, compress(body(plain_block))))
    reference = functools.partial(model, body(plain_block))

    def dense(params, theta):
        return materialize(adapter.attach(params, theta))

    assert_near(gradients(program, frozen, theta, X, adapter.attach), gradients(reference, frozen, theta, X, dense))


class Layer(nn.Module):
    """A Linen layer whose call is compressed."""

    @nn.compact
    def __call__(self, x, _):
        block = LinenBlock(name="block")
        if self.is_initializing():
            return block(x), None
        compressed = compress_residuals(lambda params, x: LinenBlock().apply({"params": params}, x), POLICY)
        return compressed(self.variables["params"]["block"], x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(
            x, None
        )[0]


def test_inside_a_scanned_linen_module():
    params = params_of("linen", True)
    variables = {"layers": {"block": params}}
    actual = gradients(lambda params, x: Stack().apply({"params": params}, x), (), variables, X, lambda _, theta: theta)
    expected = gradients(functools.partial(TRANSFORMS["scan"], APPLY["linen"]), (), params, X, lambda _, theta: theta)
    actual = actual[0], (actual[1][0]["layers"]["block"], actual[1][1])
    assert_near(actual, expected)
