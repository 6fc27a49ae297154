import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import memjax as mj
from memjax.core.bytes import compiled_bytes
from tests.remat.relative import relative_error

D, F, T, L = 64, 128, 128, 3
X = jax.random.normal(jax.random.key(0), (T, D))


def params(layers=L):
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "up": jax.random.normal(keys[0], (layers, D, F)) / D**0.5,
        "down": jax.random.normal(keys[1], (layers, F, D)) / F**0.5,
    }


def block(p, x):
    x = checkpoint_name(x, "block_input")
    up = checkpoint_name(x @ p["up"], "linear_out")
    return x + checkpoint_name(jnp.tanh(up) * jnp.sin(up), "hidden") @ p["down"]


def loss(policy):
    body = mj.remat.checkpoint(lambda x, p: (block(p, x), None), policy, params=(1,), prevent_cse=False)

    def value(params, x):
        y = jax.lax.scan(body, x, params)[0]
        return jnp.sum(y * jnp.cos(y))

    return value


EXACT = jax.jit(jax.value_and_grad(loss("none"), (0, 1)))(params(), X)
INPUT, UP = D * 4, F * 4  # bytes per token and layer
# policy -> bytes per token and layer, largest relative gradient error
KEPT = {
    "none": (None, 0),
    "full": (INPUT, 0),
    "dots": (INPUT + UP, 0),
    "linear": (INPUT + UP, 0),
    "8bit": (None, 0.02),
    "4bit": (None, 0.2),
    "2bit": (None, 1.5),
    "linear-8bit": (D * (1 + 4 / 64) + F * (1 + 4 / 128), 0.02),
    "linear-4bit": (D * (1 + 4 / 64) + F * (0.5 + 4 / 128), 0.2),
    "full-8bit": (D * (1 + 4 / 64), 0.02),
    "full-4bit": (D * (0.5 + 4 / 64), 0.3),
    "offload": (INPUT, 0),
    "offload-linear": (INPUT + UP, 0),
    "offload-4bit": (None, 0.2),
}


def test_every_name_is_known_here():
    assert set(KEPT) == set(mj.remat.NAMED)
    assert all(mj.remat.parse(name) == remat for name, (remat, _) in mj.remat.NAMED.items())


def quick(names, *chosen):
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick(KEPT, "full", "linear", "4bit", "full-8bit", "offload-linear", "offload-4bit"))
def test_values_are_exact_and_gradients_as_near_as_what_is_kept(name):
    value, gradient = jax.jit(jax.value_and_grad(loss(name), (0, 1)))(params(), X)
    assert float(value) == pytest.approx(float(EXACT[0]), rel=1e-6)
    error, allowed = relative_error(gradient, EXACT[1]), KEPT[name][1]
    assert allowed / 100 <= error <= allowed or error < 1e-6


@pytest.mark.parametrize(
    "name", quick(["full", "linear", "linear-4bit", "full-8bit", "full-4bit"], "linear-4bit", "full-8bit", "full-4bit")
)
def test_bytes_that_grow_with_depth(name):
    """On a CPU host memory is device memory, so the names that offload are those that keep the same."""

    def temporaries(layers):
        # Gradients of the weights are outputs, so temporaries per layer are what is kept.
        step = jax.jit(jax.grad(loss(name), (0, 1)))
        return compiled_bytes(step.lower(params(layers), X).compile()).temp

    assert (temporaries(12) - temporaries(6)) / 6 / T == pytest.approx(KEPT[name][0], rel=0.02)


def test_a_named_tensor_is_kept_and_a_name_that_is_none_raises():
    keep = jax.jit(jax.grad(loss(mj.remat.names("linear_out", "block_input")), (0, 1)))(params(), X)
    assert relative_error(keep, EXACT[1]) < 1e-6
    for policy in (mj.remat.names("lineer_out"), mj.remat.offload("hidden", "lineer_out")):
        with pytest.raises(ValueError, match=r"'lineer_out'; it names block_input, hidden, linear_out"):
            loss(policy)(params(), X)
    with pytest.raises(ValueError, match="it names none"):
        mj.remat.checkpoint(jnp.sin, mj.remat.names("a"))(X)


def test_optional_names_are_kept_where_there_are_any():
    def scores(w, x):
        queries = checkpoint_name(2 * checkpoint_name(x @ w, "linear_out"), "q")
        return jnp.sum(jnp.tanh(queries))

    def kept(policy):
        leaves = jax.tree.leaves(jax.vjp(mj.remat.checkpoint(scores, policy), w, X)[1])
        return [leaf for leaf in leaves if leaf.shape == (T, F)]

    w = params()["up"][0]
    (queries,) = kept(mj.remat.names("linear_out", optional=("q", "k")))
    assert jnp.allclose(queries, 2 * X @ w)
    (linear,) = kept(mj.remat.names("linear_out"))
    assert jnp.allclose(linear, X @ w)


def test_what_is_offloaded_is_in_host_memory():
    spaces = {}
    for policy in (mj.remat.offload("hidden"), mj.remat.ResidualPolicy(4, inputs="**", offload="pinned_host")):
        kept = jax.make_jaxpr(lambda p, x, policy=policy: jax.vjp(loss(policy), p, x)[1])(params(), X).outvars
        spaces[policy] = [v.aval for v in kept if v.aval.memory_space == jax.memory.Space.Host]
    (hidden,), codes = spaces.values()
    assert hidden.shape == (L, T, F)
    assert {aval.dtype for aval in codes} == {jnp.dtype("uint8"), jnp.dtype("uint16")}


def matrix():
    value = loss("full-8bit")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    across = jax.shard_map(lambda p, x: value(p, x)[None], mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"))
    halves = lambda x: x.reshape(2, T // 2, D)  # noqa: E731
    return {
        "vmap": lambda p, x: jax.vmap(value, (None, 0))(p, halves(x)).sum(),
        "pmap": lambda p, x: jax.pmap(value, in_axes=(None, 0))(p, halves(x)).sum(),
        "shard_map": lambda p, x: across(p, x).sum(),
        "checkpoint": jax.checkpoint(value),
        "lift": mj.lift(value),
    }


@pytest.mark.parametrize("transform", quick(["vmap", "pmap", "shard_map", "checkpoint", "lift"], "vmap", "shard_map"))
def test_quantized_under_every_transform(transform):
    gradient = jax.grad(matrix()[transform], (0, 1))
    gradient = gradient if transform == "pmap" else jax.jit(gradient)
    expected = jax.jit(jax.grad(loss("full-8bit"), (0, 1)))(params(), X)
    assert relative_error(gradient(params(), X), expected) < 1e-5


def test_packed_and_adapted_weights_under_lift():
    frozen = mj.weights.quantize(params(), mj.codecs.int8(group=64), where="**")
    adapter = mj.adapters.lora(rank=2, targets="up")
    theta = jax.tree.map(lambda leaf: leaf + 0.1, adapter.init(jax.random.key(2), frozen))

    def gradient(policy):
        f = mj.lift(loss(policy))
        return jax.jit(jax.value_and_grad(lambda theta, x: f(adapter.attach(frozen, theta), x), (0, 1)))(theta, X)

    value, exact = gradient("none")
    for policy, allowed in {"linear": 1e-6, "full-8bit": 0.02, "linear-8bit": 0.02}.items():
        got, gradients = gradient(policy)
        assert float(got) == pytest.approx(float(value), rel=1e-6)
        assert relative_error(gradients, exact) < allowed


def test_contradictions_and_unknown_policies():
    with pytest.raises(ValueError, match="remat='ful' is not one of none, full, dots, linear, 8bit"):
        mj.remat.checkpoint(block, "ful")
    with pytest.raises(TypeError, match=r"or one made by memjax\.remat, got 8"):
        mj.remat.parse(8)
    with pytest.raises(ValueError, match="for packed codes there is ResidualPolicy"):
        mj.remat.Remat(mj.remat.offload("a"), mj.remat.ResidualPolicy(4))
    with pytest.raises(ValueError, match="again must be 'none', 'full', 'dots'"):
        mj.remat.Remat("some")
    with pytest.raises(ValueError, match='use "full"'):
        mj.remat.names()
    for wrong in ((), ("a",)):
        with pytest.raises(ValueError, match="names of tensors, or dots=True, and not both"):
            mj.remat.offload(*wrong, dots=bool(wrong))
    assert dataclasses.replace(mj.remat.quantized(4), again="none") == mj.remat.parse(
        mj.remat.ResidualPolicy(4, inputs="**", input_bits=4)
    )
