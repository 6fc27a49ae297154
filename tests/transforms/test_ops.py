"""The transform matrix of operations: every operation through every transform, against its plain form."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import codecs, ops
from tests.random_views import array

B, S, D, DEVICES, DEPTH = 4, 3, 16, 4, 2
CODEC = codecs.int8(group=16)
X = array(0, B, S, D)
WEIGHTS = {"scale": 1 + 0.2 * array(1, D), "bias": 0.2 * array(2, D), "up": array(3, D)}
ANGLES = array(4, 1, S, D // 4)


def plain_rms(w, x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w["scale"]


def plain_layer(w, x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]


def plain_rope(w, x):
    cos, sin = jnp.cos(ANGLES)[:, :, None], jnp.sin(ANGLES)[:, :, None]
    a, b = jnp.split(x.reshape(*x.shape[:2], 2, -1), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


class Case(NamedTuple):
    """An operation as ``fn(weights, x)``, its plain form, and how far their gradients may lie apart."""

    fn: Callable
    plain: Callable
    tolerance: float


def unary(fn, plain, tolerance=1e-6):
    return Case(lambda w, x: fn(x * w["up"]), lambda w, x: plain(x * w["up"]), tolerance)


def pointwise_with_known_slope(levels):
    """Returns GELU whose derivative is the nearest of ``levels``."""

    @jax.custom_jvp
    def fn(x):
        return jax.nn.gelu(x, approximate=False)

    @fn.defjvp
    def _(primals, tangents):
        slope = jax.jvp(functools.partial(jax.nn.gelu, approximate=False), primals, (jnp.ones_like(primals[0]),))[1]
        nearest = jnp.asarray(levels, jnp.float32)[jnp.abs(slope[..., None] - jnp.asarray(levels)).argmin(-1)]
        return fn(*primals), nearest * tangents[0]

    return fn


CASES = {
    "rms_norm": Case(lambda w, x: ops.rms_norm(x, w["scale"]), plain_rms, 2e-6),
    "rms_norm input": Case(lambda w, x: ops.rms_norm(x, w["scale"], residual="input"), plain_rms, 2e-6),
    "rms_norm codes": Case(lambda w, x: ops.rms_norm(x, w["scale"], residual=CODEC), plain_rms, 0.03),
    "layer_norm": Case(lambda w, x: ops.layer_norm(x, w["scale"], w["bias"]), plain_layer, 5e-6),
    "layer_norm codes": Case(lambda w, x: ops.layer_norm(x, w["scale"], w["bias"], residual=CODEC), plain_layer, 0.03),
    "swiglu": Case(lambda w, x: ops.swiglu(x, x * w["up"]), lambda w, x: jax.nn.silu(x) * x * w["up"], 1e-6),
    "geglu": Case(lambda w, x: ops.geglu(x, x * w["up"]), lambda w, x: jax.nn.gelu(x) * x * w["up"], 2e-6),
    "swiglu codes": Case(
        lambda w, x: ops.swiglu(x, x * w["up"], residual=CODEC), lambda w, x: jax.nn.silu(x) * x * w["up"], 0.03
    ),
    "rope": Case(
        lambda w, x: ops.rope((x * w["up"]).reshape(*x.shape[:2], 2, -1), ANGLES).reshape(x.shape),
        lambda w, x: plain_rope(w, x * w["up"]),
        1e-6,
    ),
    "gelu": unary(ops.gelu, functools.partial(jax.nn.gelu, approximate=False), 5e-5),
    "silu": unary(ops.silu, jax.nn.silu, 5e-5),
    "few bits": unary(
        ops.few_bit_activation("gelu", 3), pointwise_with_known_slope(ops.derivative_levels("gelu", 3)), 1e-6
    ),
    "softmax": unary(ops.softmax, jax.nn.softmax, 3e-6),
    "softmax codes": unary(functools.partial(ops.softmax, residual=CODEC), jax.nn.softmax, 0.1),
    "dropout": unary(lambda x: ops.dropout(x, 0.5, 7), lambda x: x * ops.dropout(jnp.ones_like(x), 0.5, 7)),
}


def t_jit(fn, w, x):
    return jax.jit(fn)(w, x)


def t_vmap(fn, w, x):
    return jax.vmap(lambda x: fn(w, x[None])[0])(x)


def t_vmap_weights(fn, w, x):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), w)
    return jax.vmap(fn, in_axes=(0, None))(stacked, x)


def t_scan(fn, w, x):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEPTH), w)
    return lax.scan(lambda x, w: (x + jnp.tanh(fn(w, x)), None), x, stacked)[0]


def t_checkpoint(fn, w, x):
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable)(w, x)


def t_scan_checkpoint(fn, w, x):
    return t_scan(jax.checkpoint(fn, prevent_cse=False), w, x)


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def t_shard_map(fn, w, x):
    return jax.shard_map(fn, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"))(w, x)


def t_pmap(fn, w, x):
    return jax.pmap(fn, in_axes=(None, 0), devices=jax.devices()[:DEVICES])(w, x[:, None])[:, 0]


TRANSFORMS = {
    "jit": t_jit,
    "vmap": t_vmap,
    "vmap over weights": t_vmap_weights,
    "scan": t_scan,
    "checkpoint": t_checkpoint,
    "scan of checkpoint": t_scan_checkpoint,
    "shard_map": t_shard_map,
    "pmap": t_pmap,
}
PRODUCT = list(itertools.product(TRANSFORMS, CASES))
COVERING = {(t, c) for i, t in enumerate(TRANSFORMS) for j, c in enumerate(CASES) if (i + j) % 5 == 0}
COVERING |= {("shard_map", name) for name in ("rms_norm", "layer_norm", "swiglu", "gelu")}


def value_and_gradients(fn, w, x):
    y, back = jax.vjp(fn, w, x)
    return y, back(jnp.cos(y))


@pytest.mark.parametrize(
    "transform, name",
    [pytest.param(*c, marks=() if c in COVERING else pytest.mark.slow, id="-".join(c)) for c in PRODUCT],
)
def test_matrix(transform, name):
    case, through = CASES[name], TRANSFORMS[transform]

    @jax.jit
    def run(w, x):
        return [value_and_gradients(functools.partial(through, fn), w, x) for fn in (case.fn, case.plain)]

    (y, gradients), (plain_y, plain_gradients) = run(WEIGHTS, X)
    np.testing.assert_allclose(y, plain_y, 2e-6, 2e-6)
    for actual, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients)):
        assert jnp.linalg.norm(actual - expected) <= case.tolerance * (1 + jnp.linalg.norm(expected))


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_a_gradient(name):
    """Backward passes that are exact can be differentiated again; others say that they cannot."""
    case = CASES[name]

    def slope(fn, x):
        return jnp.sum(jnp.sin(jax.grad(lambda x: jnp.sum(jnp.sin(fn(WEIGHTS, x))))(x)))

    if name in ("gelu", "silu", "few bits") or "codes" in name:
        with pytest.raises(TypeError, match="second-order"):
            jax.grad(functools.partial(slope, case.fn))(X)
        return
    actual, expected = jax.jit(lambda x: [jax.grad(functools.partial(slope, fn))(x) for fn in case[:2]])(X)
    assert jnp.linalg.norm(actual - expected) <= 1e-3 * jnp.linalg.norm(expected)
