"""VeRA: the shared matrices, and what they cost."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from memjax import adapters, codecs, weights
from memjax.adapters.vera import Drawn
from memjax.weights import lift
from tests.random_views import array, assert_close

T, D_IN, D_OUT, RANK = 7, 16, 12, 3


def moved(theta):
    return jax.tree.map(lambda x: x + 0.3 * array(x.size, *x.shape), theta)


def test_drawn_matrices():
    drawn = Drawn(5, 64, 400)
    a, b, fewer_a, fewer_b, other = map(
        np.asarray,
        jax.jit(
            lambda: (
                drawn.draw_a(400),
                drawn.draw_b(300),
                drawn.draw_a(100),
                drawn.draw_b(100),
                Drawn(6, 64, 400).draw_a(400),
            )
        )(),
    )
    assert a.shape == (400, 64) and b.shape == (64, 300)
    np.testing.assert_array_equal(fewer_a, a[:100])
    np.testing.assert_array_equal(fewer_b, b[:, :100])
    for matrix, fan in ((a, 400), (b, 64)):
        bound = np.sqrt(6 / fan)
        assert 0.99 * bound < np.abs(matrix).max() <= bound
        assert np.std(matrix) == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert abs(np.mean(matrix)) < 0.02 * bound
    assert abs(np.corrcoef(a[:300].ravel(), b.T.ravel())[0, 1]) < 0.02
    assert np.any(other != a)


def test_all_weights_and_layers_share_the_matrices():
    params = {"layers": {"kernel": jnp.zeros((2, 16, 8))}, "head": {"kernel": jnp.zeros((8, 12))}}
    adapter = adapters.vera(RANK, seed=5)
    theta = moved(adapter.init(jax.random.key(0), params))
    drawn = Drawn(5, RANK, 16)
    a, b = np.asarray(drawn.draw_a(16)), np.asarray(drawn.draw_b(12))
    given = adapters.vera(RANK, shared=(a, b))

    @jax.jit
    def dense(theta):
        return [weights.materialize(one.attach(params, theta)) for one in (adapter, given)]

    for tree in dense(theta):
        for name, (d_in, d_out) in {"layers": (16, 8), "head": (8, 12)}.items():
            d, scale = (np.asarray(theta[f"{name}/kernel"][factor])[..., None, :] for factor in ("d", "b"))
            assert_close(tree[name]["kernel"], (a[:d_in] * d) @ (b[:, :d_out] * scale))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [False, True])
def test_neither_input_nor_matrices_are_kept(dtype, given):
    params = weights.quantize({"kernel": array(0, D_IN, D_OUT, dtype=dtype)}, codecs.int4(group=8), where="kernel")
    shared = (array(1, D_IN, RANK), array(2, RANK, D_OUT)) if given else None
    adapter = adapters.vera(RANK, targets="kernel", shared=shared)
    theta, x = adapter.init(jax.random.key(0), params), array(3, T, D_IN, dtype=dtype)

    def loss(theta):
        return jnp.sum(lift(lambda p, x: x @ p["kernel"])(adapter.attach(params, theta), 2 * x))

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(loss, theta)[1])]
    assert shapes.count((T, RANK)) == 1
    assert not {(T, D_IN), (T, D_OUT)} & set(shapes)
    assert given or not {(D_IN, RANK), (RANK, D_OUT), (D_OUT, RANK)} & set(shapes)


@pytest.mark.parametrize("given", [False, True])
def test_a_stack_of_layers_has_no_stack_of_matrices(given):
    depth, d = 6, 32
    shared = (array(1, d, RANK), array(2, RANK, d)) if given else None
    adapter = adapters.vera(RANK, shared=shared)
    params = {"layers": {"kernel": array(0, depth, d, d)}}
    theta = adapter.init(jax.random.key(0), params)

    def loss(theta, params, x):
        def layer(x, p):
            return jnp.tanh(x @ p["kernel"]), None

        apply = lift(lambda p, x: lax.scan(jax.checkpoint(layer), x, p["layers"])[0])
        return jnp.sum(apply(adapter.attach(params, theta), x))

    compiled = jax.jit(jax.grad(loss)).lower(theta, params, array(3, T, d)).compile()
    found = {tuple(map(int, s.split(","))) for s in re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text())}
    assert (depth, RANK) in found and (d, RANK) in found
    assert not [shape for shape in found if np.prod(shape) == depth * d * RANK]


def test_dropout_lookups_and_tied_weights():
    params = {"embedding": array(0, 10, 8)}
    adapter = adapters.vera(RANK, targets="embedding", dropout=0.5)
    theta = moved(adapter.init(jax.random.key(0), params))
    tokens, x = jnp.array([[1, 9], [0, 1]]), jnp.ones((4000, 10))

    def tied(p, i):
        return p["embedding"][i] @ p["embedding"].T

    @jax.jit
    def run(key):
        attached = adapter.attach(params, theta)
        dense = attached["embedding"].materialize()
        delta = x @ (dense - params["embedding"])
        dropping = adapter.attach(params, theta, key)
        dropped = lift(lambda p, x: x @ p["embedding"])(dropping, x) - x @ params["embedding"]
        return lift(tied)(attached, tokens), tied({"embedding": dense}, tokens), dropped, delta

    actual, expected, dropped, delta = run(jax.random.key(1))
    assert_close(actual, expected, 5e-6)
    assert float(jnp.std(dropped[:, 0])) > 0.05
    assert_close(jnp.mean(dropped, 0), delta[0], 0.1)


def test_the_seed_is_saved_and_given_matrices_are_stored_once(tmp_path):
    params = {"layers": {"kernel": array(0, 2, D_IN, 8)}, "head": {"kernel": array(1, 8, D_OUT)}}
    given = adapters.vera(RANK, shared=(array(2, D_IN, RANK), array(3, RANK, D_OUT)))
    theta = moved(given.init(jax.random.key(0), params))
    for adapter, constants in ((given, 4 * RANK * (D_IN + D_OUT)), (adapters.vera(RANK, seed=2**40 + 1), 0)):
        assert adapter.nbytes(params) == (4 * (3 * RANK + 2 * 8 + D_OUT), constants)
        adapter.save(tmp_path, theta)
        again, _, _ = adapters.load(tmp_path, params)
        before, after = (weights.materialize(a.attach(params, theta)) for a in (adapter, again))
        jax.tree.map(np.testing.assert_array_equal, before, after)
    os.remove(tmp_path / "shared.safetensors")
    adapters.load(tmp_path, params)
    given.save(tmp_path, theta)
    os.remove(tmp_path / "shared.safetensors")
    with pytest.raises(ValueError, match="is not a readable adapter"):
        adapters.load(tmp_path, params)


def test_a_shard_cannot_use_the_shared_matrices():
    adapter = adapters.vera(RANK, targets="kernel")
    params = {"kernel": array(0, 8, 8)}
    view = adapter.attach(params, adapter.init(jax.random.key(0), params))
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for kernel, x, y in ((P(None, "m"), P(), P(None, "m")), (P("m", None), P(None, "m"), P("m"))):

        def program(p, x, kernel=kernel, x_spec=x, y=y):
            def local(w, x):
                return x @ w

            return jax.shard_map(local, mesh=mesh, in_specs=(kernel, x_spec), out_specs=y)(p["kernel"], x)

        with pytest.raises(ValueError, match="belong to the whole weight of 8 x 8; a shard of"):
            lift(program)(view, array(1, 4, 8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*62\], got -1"),
        (
            {"rank": 2, "shared": (jnp.ones((4, 3)), jnp.ones((2, 4)))},
            r"arrays \[d_in, 2\] and \[2, d_out\], got",
        ),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        adapters.vera(**settings)


def test_matrices_that_are_too_small_raise():
    adapter = adapters.vera(2, shared=(jnp.ones((8, 2)), jnp.ones((2, 8))))
    with pytest.raises(ValueError, match="kernel: the shared matrices are for weights of at most 8 x 8, this one"):
        adapter.init(jax.random.key(0), {"kernel": jnp.ones((8, 9))})
