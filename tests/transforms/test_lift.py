"""The transform matrix: transforms x frameworks x views, against dense weights.

Each model is a residual block of multi-head attention (kernels ``[d, heads, head_dim]`` and ``[heads, head_dim, d]``)
and a matrix, written as a Flax NNX module, a Flax Linen module and a plain function of a dict.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import adapters, codecs, weights
from memjax.core.paths import leaf_paths, map_with_path
from memjax.weights import lift, materialize
from tests.random_views import array

D, HEADS, DEPTH, DEVICES = 8, 2, 2, 4
X = array(0, DEVICES, 3, D)  # [batch, sequence, D]


def random_params():
    """Returns the params of a block; all three frameworks name them alike."""
    heads, out = (
        {"kernel": (D, HEADS, D // HEADS), "bias": (HEADS, D // HEADS)},
        {"kernel": (HEADS, D // HEADS, D), "bias": (D,)},
    )
    dense = {"kernel": (D, D), "bias": (D,)}
    shapes = {"attention": {"query": heads, "key": heads, "value": heads, "out": out}, "dense": dense}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(tree, [array(10 + i, *shape) / 2 / D**0.5 for i, shape in enumerate(leaves)])


def plain_block(params, x):
    heads = params["attention"]
    q, k, v = (
        jnp.einsum("bsd,dhk->bshk", x, heads[name]["kernel"]) + heads[name]["bias"]
        for name in ("query", "key", "value")
    )
    attended = jax.nn.dot_product_attention(q, k, v)
    x = x + jnp.einsum("bshk,hkd->bsd", attended, heads["out"]["kernel"]) + heads["out"]["bias"]
    return x + jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])


class LinenBlock(nn.Module):
    def setup(self):
        self.attention = nn.MultiHeadDotProductAttention(num_heads=HEADS)
        self.dense = nn.Dense(D)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + jnp.tanh(self.dense(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.dense = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + jnp.tanh(self.dense(x))


GRAPH, STATE = nnx.split(nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0))))
APPLY: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "nnx": lambda state, x: nnx.merge(GRAPH, state)(x),
    "linen": lambda params, x: LinenBlock().apply({"params": params}, x),
    "plain": plain_block,
}


@functools.cache
def params_of(name: str, stacked: bool) -> Any:
    """Returns the same weights as each framework holds them; a stack holds ``DEPTH`` different multiples of them."""
    params = random_params()
    if stacked:
        params = jax.tree.map(lambda x: jnp.stack([x * (1 - 0.2 * i) for i in range(DEPTH)]), params)
    if name != "nnx":
        return params
    leaves = dict(leaf_paths(params))
    return map_with_path(lambda path, _: leaves[path], STATE)


def t_jit(apply, params, x):
    return jax.jit(apply)(params, x)


def t_grad(apply, params, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(apply(params, x))))(x)


def t_vmap(apply, params, x):
    return jax.vmap(lambda params, x: apply(params, x[None])[0], in_axes=(None, 0))(params, x)


def t_vmap_params(apply, params, x):
    return jax.vmap(apply, in_axes=(0, None))(params, x)


def t_scan(apply, params, x):
    return lax.scan(lambda x, layer: (apply(layer, x), None), x, params)[0]


def t_checkpoint(apply, params, x):
    return jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_saveable)(params, x)


def t_scan_checkpoint(apply, params, x):
    return t_scan(jax.checkpoint(apply), params, x)


def t_shard_map(apply, params, x):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    return jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(params, x)


def t_pmap(apply, params, x):
    devices = jax.devices()[:DEVICES]
    return jax.pmap(apply, in_axes=(None, 0), devices=devices)(params, x[:, None])[:, 0]


TRANSFORMS = {
    "jit": t_jit,
    "grad": t_grad,
    "vmap": t_vmap,
    "vmap over params": t_vmap_params,
    "scan": t_scan,
    "checkpoint": t_checkpoint,
    "scan of checkpoint": t_scan_checkpoint,
    "shard_map": t_shard_map,
    "pmap": t_pmap,
}
STACKED = ("vmap over params", "scan", "scan of checkpoint")
VIEWS = ("lora on dense", "lora on packed")


MEANING = {"grad": "grad", "vmap over params": "each", "scan": "in turn", "scan of checkpoint": "in turn"}


@functools.cache
def frozen_and_theta(name: str, view: str, stacked: bool):
    """Returns (adapter, frozen params, random factors)."""
    params = params_of(name, stacked)
    axes = weights.infer_axes(APPLY[name], params_of(name, False), X)
    if view == "lora on packed":
        params = weights.quantize(params, codecs.int4(group=4), axes=axes)
    adapter = adapters.lora(rank=2, alpha=4, targets="**/kernel", axes=axes)
    theta = adapter.init(jax.random.key(0), params)
    return adapter, params, jax.tree.map(lambda x: x + 0.2 * array(x.size, *x.shape), theta)


def value_and_gradients(fn, theta, x):
    y, back = jax.vjp(fn, theta, x)
    return y, back(jnp.cos(y))


@functools.cache
def dense_reference(view: str, stacked: bool):
    """Returns values and gradients of what the transforms mean, on materialised weights."""
    adapter, frozen, theta = frozen_and_theta("plain", view, stacked)

    def layer(params, i):
        return jax.tree.map(lambda leaf: leaf[i], params)

    def each(params, x):
        return jnp.stack([plain_block(layer(params, i), x) for i in range(DEPTH)])

    def in_turn(params, x):
        return functools.reduce(lambda x, i: plain_block(layer(params, i), x), range(DEPTH), x)

    meanings = {"apply": plain_block, "grad": functools.partial(t_grad, plain_block)}
    if stacked:
        meanings = {"each": each, "in turn": in_turn}

    def run(theta, x):
        dense = {
            meaning: lambda theta, x, fn=fn: fn(materialize(adapter.attach(frozen, theta)), x)
            for meaning, fn in meanings.items()
        }
        return {meaning: value_and_gradients(fn, theta, x) for meaning, fn in dense.items()}

    return jax.jit(run)(theta, X)


def assert_equal(actual, expected, tolerance=1e-6):
    """Asserts that every leaf is as expected, relative to its norm."""

    def check(actual, expected):
        assert actual.shape == expected.shape
        assert jnp.linalg.norm(actual - expected) <= tolerance * jnp.linalg.norm(expected)

    jax.tree.map(check, actual, expected)


CASES = list(itertools.product(TRANSFORMS, APPLY, VIEWS, ("inside", "outside")))
COVERING = {
    (transform, tuple(APPLY)[(i + j) % 3], view, ("inside", "outside")[(i + j) % 2])
    for i, transform in enumerate(TRANSFORMS)
    for j, view in enumerate(VIEWS)
}


@pytest.mark.parametrize(
    "transform, name, view, side",
    [pytest.param(*c, marks=() if c in COVERING else pytest.mark.slow, id="-".join(c)) for c in CASES],
)
def test_matrix(transform, name, view, side):
    stacked = transform in STACKED
    adapter, frozen, theta = frozen_and_theta(name, view, stacked)
    through, apply = TRANSFORMS[transform], APPLY[name]
    program = lift(functools.partial(through, apply)) if side == "outside" else functools.partial(through, lift(apply))

    @jax.jit
    def run(theta, frozen, x):
        return value_and_gradients(lambda theta, x: program(adapter.attach(frozen, theta), x), theta, x)

    assert_equal(run(theta, frozen, X), dense_reference(view, stacked)[MEANING.get(transform, "apply")])


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return LinenBlock(name="block")(x), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.remat(LinenLayer, prevent_cse=False)
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
        return layers(name="layers")(x, None)[0]


@pytest.mark.smoke
@pytest.mark.parametrize("view", VIEWS)
def test_a_linen_stack_of_scanned_rematerialised_blocks(view):
    def apply(params, x):
        return LinenStack().apply({"params": params}, x)

    params = {"layers": {"block": params_of("linen", True)}}
    axes = weights.infer_axes(apply, params, X)
    assert axes["layers/block/attention/out/kernel"] == ((-3, -2), (-1,))
    frozen = weights.quantize(params, codecs.int4(group=4), axes=axes) if view == "lora on packed" else params
    adapter = adapters.lora(rank=2, alpha=4, targets="**/kernel", axes=axes)
    theta = {f"layers/block/{path}": factors for path, factors in frozen_and_theta("linen", view, True)[2].items()}

    @jax.jit
    def run(theta, frozen, x):
        return value_and_gradients(lambda theta, x: lift(apply)(adapter.attach(frozen, theta), x), theta, x)

    y, (theta_grads, x_grad) = run(theta, frozen, X)
    theta_grads = {path.removeprefix("layers/block/"): grads for path, grads in theta_grads.items()}
    assert_equal((y, (theta_grads, x_grad)), dense_reference(view, True)["in turn"])


def test_views_survive_in_an_nnx_state():
    _, frozen, _ = frozen_and_theta("nnx", "lora on packed", False)
    again = nnx.from_flat_state(nnx.to_flat_state(frozen))
    assert jax.tree.structure(again) == jax.tree.structure(frozen)
    module = nnx.merge(GRAPH, frozen)
    _, state = nnx.split(module)
    kernels = [leaf for path, leaf in leaf_paths(state) if path.endswith("kernel")]
    assert len(kernels) == 5 and all(map(weights.is_view, kernels))
    assert_equal(lift(APPLY["nnx"])(state, X), APPLY["nnx"](materialize(frozen), X))
    assert_equal(lift(lambda module, x: module(x))(module, X), APPLY["nnx"](materialize(frozen), X))
