"""Operations with a rule make the codes of what they read, and read codes in place of decoded arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import codecs, ops
from memjax.codecs import Packed, fused
from memjax.core.packing import CodesRule, codes_rules
from memjax.remat import ResidualPolicy, compress_residuals

POLICY = ResidualPolicy(bits=4, group=32, min_size=0, min_share=0)
X = jax.random.normal(jax.random.key(0), (2, 4, 64))
W = {
    name: jax.random.normal(jax.random.key(i), shape) / 8
    for i, (name, shape) in enumerate([("gate", (64, 128)), ("up", (64, 128)), ("down", (128, 64))])
}


def mlp(w, x):
    gate, up = (checkpoint_name(x @ w[name], name) for name in ("gate", "up"))
    return jax.checkpoint(lambda gate, up: ops.swiglu(gate, up) @ w["down"], prevent_cse=False)(gate, up)


def gradients(f, w, x):
    return jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(f(w, x))), (0, 1)))(w, x)


@pytest.fixture
def calls(monkeypatch):
    """Rules by plain jax.numpy in place of kernels; returns the names of those that ran."""
    seen = []

    def make(arguments, given, activation):
        seen.append("make")
        return ops.swiglu(*arguments), [codec and codec.encode(x, -1) for codec, x in zip(given, arguments)]

    def read(arguments, activation):
        assert isinstance(arguments[0], Packed) and isinstance(arguments[1], Packed)
        gate, up = (part.decode() for part in arguments[:2])
        if len(arguments) == 2:
            seen.append("product")
            return ops.swiglu(gate, up)
        seen.append("gradients")
        return jax.vjp(ops.swiglu, gate, up)[1](arguments[2])

    monkeypatch.setitem(codes_rules, "glu", CodesRule(make, read))
    monkeypatch.setitem(codes_rules, "glu_gradients", CodesRule(None, read, results=2))
    return seen


def scanned(f):
    def run(w, x):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), w)
        return jax.lax.scan(lambda x, w: (x + f(w, x), None), x, stacked)[0]

    return run


def sharded(f):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))


@pytest.mark.parametrize("around", [lambda f: f, scanned, sharded], ids=["jit", "scan", "shard_map"])
def test_rules_give_the_same_gradients(calls, monkeypatch, around):
    f = around(compress_residuals(mlp, POLICY))
    with monkeypatch.context() as without:
        without.setitem(codes_rules, "glu", CodesRule())
        without.setitem(codes_rules, "glu_gradients", CodesRule())
        expected = gradients(f, W, X)
    assert not calls
    actual = gradients(around(compress_residuals(mlp, POLICY)), W, X)
    assert set(calls) == {"make", "product", "gradients"}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


def test_what_an_operation_cannot_take_is_decoded(calls, monkeypatch):
    for name, results in (("glu", 1), ("glu_gradients", 2)):
        monkeypatch.setitem(codes_rules, name, CodesRule(lambda *_: None, lambda *_: None, results))
    f = compress_residuals(mlp, POLICY)
    for a, b in zip(jax.tree.leaves(gradients(f, W, X)), jax.tree.leaves(gradients(mlp, W, X))):
        assert 0 < jnp.linalg.norm(a - b) < 0.3 * jnp.linalg.norm(b)


def test_stochastic_codes_are_not_made_by_rules(calls):
    gradients(compress_residuals(mlp, ResidualPolicy(bits=4, group=32, rounding="stochastic", min_size=0)), W, X)
    assert "make" not in calls and "gradients" in calls


@pytest.mark.parametrize("name", ["gate", "up"])
def test_an_operation_without_some_of_its_results_is_evaluated_as_it_is(calls, name):
    def gradient(f):
        return jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(f(W | {name: v}, X)))))(W[name])

    packed, both = gradient(compress_residuals(mlp, POLICY)), gradients(compress_residuals(mlp, POLICY), W, X)[0]
    assert calls[0] == "make" and calls.count("gradients") == 1
    np.testing.assert_allclose(packed, both[name], rtol=1e-5, atol=1e-5)


def test_nothing_is_differentiated_through_rules(calls):
    def second(w):
        return jnp.sum(jnp.square(jax.grad(lambda w: jnp.sum(compress_residuals(mlp, POLICY)(w, X)))(w)["up"]))

    def by_cotangent(ct):
        return jnp.sum(jax.vjp(lambda w: compress_residuals(mlp, POLICY)(w, X), W)[1](ct)[0]["up"])

    for f, x in ((second, W), (by_cotangent, X)):
        with pytest.raises(TypeError, match="second-order differentiation through compress_residuals"):
            jax.make_jaxpr(jax.grad(f))(x)


def test_an_operation_without_a_rule_stays_one_where_it_reads_codes():
    def f(x, head):
        loss = functools.partial(ops.linear_cross_entropy, labels=jnp.arange(8))
        return jax.checkpoint(lambda h: jnp.sin(loss(h, head)), prevent_cse=False)(jnp.sin(x))

    def operations(policy):
        program = jax.make_jaxpr(jax.grad(compress_residuals(f, policy, params=(1,))))(X.reshape(8, 64), W["gate"])
        return str(program).count("name=memjax.linear_cross_entropy")

    assert operations(POLICY) == operations(ResidualPolicy(bits=32)) > 0


def test_a_second_reader_gets_the_decoded_array(calls):
    def f(w, x):
        gate = checkpoint_name(x @ w["gate"], "gate")
        return mlp(w, x) + jnp.tanh(gate) @ w["down"]

    exact, packed = (gradients(g, W, X) for g in (f, compress_residuals(f, POLICY)))
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(exact)):
        assert 0 < jnp.linalg.norm(a - b) < 0.3 * jnp.linalg.norm(b)


@pytest.mark.parametrize(
    "codec, rest", [(codecs.int4(128, symmetric=False), 3), (codecs.int6(128), 0)], ids=["int4", "int6"]
)
def test_swiglu_reads_and_makes_codes_by_kernels_on_a_hopper_gpu(monkeypatch, codec, rest):
    monkeypatch.setattr(fused, "on_hopper", lambda: True)
    monkeypatch.setattr("pallas_kernels.codec.api.on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    policy = ResidualPolicy(bits=32, per_leaf={"gate": codec, "up": codec})
    x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    shapes = {"gate": (256, 1024), "up": (256, 1024), "down": (1024, 256)}
    w = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def loss(w, x):
        return compress_residuals(mlp, policy)(w, x).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).trace(w, x).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("stablehlo.custom_call @mosaic") == rest
