import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import memjax as mj
from memjax.core.bytes import compiled_bytes
from tests.remat.relative import relative_error

D, B = 16, 8


def problem(layers, dtype=jnp.float32, dropout=False):
    keys = jax.random.split(jax.random.key(0), 6)

    def stack(key, i, o):
        return jax.random.normal(key, (layers, i, o), dtype) / i**0.5

    params = (
        {"w": stack(keys[0], D, D), "number": jnp.arange(layers)}
        | ({"key": jax.random.split(keys[4], layers)} if dropout else {}),
        {"up": stack(keys[1], D, 2 * D), "down": stack(keys[2], 2 * D, D)},
    )
    return params, *jax.random.normal(keys[3], (2, B, D), dtype), jax.random.normal(keys[5], (D,), dtype)


def branches(shared):
    def F(p, x):
        y = jnp.tanh(x.astype(shared.dtype) @ p["w"] + shared) * jnp.where(p["number"] == 1, 0.5, 1.0)
        if "key" in p:
            y = jnp.where(jax.random.bernoulli(p["key"], 0.8, x.shape), y, 0)  # the same mask when run again
        return y.astype(x.dtype)

    def G(p, x):
        return (jax.nn.gelu(x.astype(shared.dtype) @ p["up"]) @ p["down"] * shared).astype(x.dtype)

    return F, G


def plain(F, G, params, x1, x2):
    forward = mj.remat.reversible(F, G).forward
    return jax.lax.scan(lambda x, p: (forward(p, *x), None), (x1, x2), params)[0]


def split(params):
    ints = {name: leaf for name, leaf in params[0].items() if name != "w"}
    return ({"w": params[0]["w"]}, params[1]), ints


def loss(scan, ints):
    def value(params, x1, x2, shared):
        y1, y2 = scan(*branches(shared), ({**params[0], **ints}, params[1]), x1, x2)
        y1, y2 = y1.astype(jnp.float32), y2.astype(jnp.float32)
        return jnp.sum(jnp.sin(y1)) + jnp.sum(y1 * y2)

    return value


def test_gradients_of_params_streams_and_closures_equal_plain_ones():
    params, x1, x2, shared = problem(5, dropout=True)
    floats, ints = split(params)
    expected = jax.jit(jax.value_and_grad(loss(plain, ints), (0, 1, 2, 3)))(floats, x1, x2, shared)
    got = jax.jit(jax.value_and_grad(loss(mj.remat.reversible_scan, ints), (0, 1, 2, 3)))(floats, x1, x2, shared)
    assert got[0] == pytest.approx(float(expected[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1])):
        assert relative_error(a, b) < 1e-5


def test_the_inverse_undoes_a_block():
    params, x1, x2, shared = problem(1)
    block = mj.remat.reversible(*branches(shared))
    layer = jax.tree.map(lambda x: x[0], params)
    back = block.inverse(layer, *block.forward(layer, x1, x2))
    np.testing.assert_allclose(back[0], x1, atol=1e-6)
    np.testing.assert_allclose(back[1], x2, atol=1e-6)


def temporaries(scan, layers):
    params, x1, x2, shared = problem(layers)
    x1, x2 = (jnp.tile(x, (32, 1)) for x in (x1, x2))
    floats, ints = split(params)
    # Without gradients of params, which are outputs that grow with depth of their own accord.
    step = jax.jit(jax.grad(lambda x1, x2: loss(scan, ints)(floats, x1, x2, shared), (0, 1)))
    return compiled_bytes(step.lower(x1, x2).compile()).temp


def test_nothing_is_kept_per_layer():
    stream = 32 * B * D * 4
    grown = {scan: temporaries(scan, 12) - temporaries(scan, 6) for scan in (plain, mj.remat.reversible_scan)}
    assert grown[mj.remat.reversible_scan] <= 6 * 64  # numbers of the layers
    assert grown[plain] > 6 * 4 * stream


def test_drift_of_the_recovered_inputs():
    """What `reversible_scan` says of rounding: harmless for float32 streams, not for bfloat16 ones."""

    def gradient(scan, dtype, streams):
        params, x1, x2, shared = problem(24, jnp.bfloat16)
        floats, ints = split(jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, params))
        args = (floats, x1.astype(streams), x2.astype(streams), shared.astype(dtype))
        return jax.jit(jax.grad(loss(scan, ints)))(*args)

    exact = gradient(plain, jnp.float32, jnp.float32)
    undone = mj.remat.reversible_scan
    assert relative_error(gradient(undone, jnp.float32, jnp.float32), exact) < 2e-5
    wide, half = (relative_error(gradient(undone, jnp.bfloat16, s), exact) for s in (jnp.float32, jnp.bfloat16))
    assert 0.05 < wide < 0.09  # that of the branches, as without reversing
    assert 1.5 * wide < half < 3 * wide


def test_under_vmap_and_shard_map():
    params, x1, x2, shared = problem(2)
    floats, _ = split(params)

    def local(params, x1, x2, shared):
        y1, y2 = mj.remat.reversible_scan(
            lambda p, x: jnp.tanh(x @ p["w"] + shared), branches(shared)[1], params, x1, x2
        )
        return jnp.sum(y1 * y2)[None]

    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    across = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("batch"), P("batch"), P()), out_specs=P("batch"))
    expected, *results = (
        jax.jit(jax.grad(lambda *args, f=f: f(*args).sum(), (0, 3)))(floats, x1, x2, shared)
        for f in (local, across, jax.vmap(local, (None, 0, 0, None)))
    )
    for got in results:
        assert relative_error(got, expected) < 1e-5


def test_stacked_views_under_lift():
    params, x1, x2, shared = problem(3)
    floats, ints = split(params)
    frozen = mj.weights.quantize(floats, mj.codecs.int8(group=16), where="**")
    adapter = mj.adapters.lora(rank=2, targets="1/*")
    theta = jax.tree.map(lambda leaf: leaf + 0.1, adapter.init(jax.random.key(2), frozen))

    def gradient(scan):
        return jax.jit(
            jax.value_and_grad(
                lambda theta, x1, shared: mj.lift(loss(scan, ints))(adapter.attach(frozen, theta), x1, x2, shared),
                (0, 1, 2),
            )
        )(theta, x1, shared)

    got, expected = gradient(mj.remat.reversible_scan), gradient(plain)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert relative_error(a, b) < 1e-5


def test_a_branch_of_another_shape():
    params, x1, x2, _ = problem(1)
    with pytest.raises(ValueError, match=r"branch G must return float32\[8, 16\]"):
        mj.remat.reversible_scan(lambda p, x: x, lambda p, x: x[:1], params, x1, x2)
