import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import memjax as mj
from memjax.core.bytes import compiled_bytes
from tests.remat.relative import relative_error

D, F = 16, 48


def mlp(p, x):
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]


def problem(n, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params = {
        name: jax.random.normal(key, shape, dtype) / shape[0] ** 0.5 for key, (name, shape) in zip(keys, shapes.items())
    }
    return params, *jax.random.normal(keys[4], (2, 2, n, D), dtype)


def loss(f):
    return lambda p, x, c: jnp.sum((f(p, x) * c).astype(jnp.float32))


@pytest.mark.parametrize("axis,n,chunks", [(1, 24, 4), (-2, 23, 4), (0, 5, 2)])
def test_values_and_gradients_are_those_of_the_function(axis, n, chunks):
    params, x, c = problem(n)
    got = jax.jit(jax.value_and_grad(loss(mj.remat.tiled(mlp, axis, chunks)), (0, 1)))(params, x, c)
    expected = jax.jit(jax.value_and_grad(loss(mlp), (0, 1)))(params, x, c)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert relative_error(a, b) < 1e-6


def test_gradients_of_half_precision_params_are_summed_in_float32():
    params, x, c = problem(512, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, x, c))
    exact = jax.jit(jax.grad(loss(mlp)))(*wide)
    got = jax.jit(jax.grad(loss(mj.remat.tiled(mlp, 1, 128))))(params, x, c)
    assert got["up"].dtype == jnp.bfloat16

    def summed_as_they_are(p, x, c):  # what it would be without
        parts = jnp.moveaxis(x.reshape(2, 128, 4, D), 1, 0), jnp.moveaxis(c.reshape(2, 128, 4, D), 1, 0)
        return jax.lax.scan(lambda s, part: (s + loss(mlp)(p, *part), None), 0.0, parts)[0]

    assert (
        relative_error(got, exact) < 0.01 < relative_error(jax.jit(jax.grad(summed_as_they_are))(params, x, c), exact)
    )


def test_a_chunk_s_share_of_the_temporaries():
    params, x, c = problem(1024)

    def temporaries(f):
        return compiled_bytes(jax.jit(jax.grad(loss(f), (0, 1))).lower(params, x, c).compile()).temp

    hidden = x.size // D * F * 4  # bytes of one array between the layers
    whole = temporaries(mlp)
    assert whole > 4 * hidden
    assert temporaries(mj.remat.tiled(mlp, 1, 16)) < whole / 16 + 3 * x.nbytes


def test_no_wide_copy_of_the_params_in_the_compiled_program():
    params, x, _ = problem(32, jnp.bfloat16)
    compiled = jax.jit(mj.remat.tiled(mlp, 1, 4)).lower(params, x).compile()
    loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert loops and f"bf16[{D},{F}]" in loops[0] and f"f32[{D},{F}]" not in loops[0]


def test_several_inputs_and_outputs_and_integer_params():
    def head(p, x, ids):
        y = x @ p["w"]
        return {
            "nll": jax.nn.logsumexp(y, -1) - jnp.take_along_axis(y, ids[..., None], -1)[..., 0],
            "same": ids + p["n"],
        }

    keys = jax.random.split(jax.random.key(1), 3)
    args = (
        {"w": jax.random.normal(keys[0], (D, 7)), "n": jnp.int32(3)},
        jax.random.normal(keys[1], (3, 10, D)),
        jax.random.randint(keys[2], (3, 10), 0, 7),
    )
    got, expected = mj.remat.tiled(head, 1, 3)(*args), head(*args)
    np.testing.assert_allclose(got["nll"], expected["nll"], rtol=1e-6)
    np.testing.assert_array_equal(got["same"], expected["same"])


def test_under_every_transform():
    params, x, c = problem(12)
    tiled = loss(mj.remat.tiled(mlp, 1, 3))
    expected = jax.grad(loss(mlp))(params, x, c)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    across = jax.shard_map(
        lambda *args: tiled(*args)[None], mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=P("batch")
    )

    def scanned(p, x, c):
        return jax.lax.scan(lambda s, xc: (s + tiled(p, xc[0][None], xc[1][None]), None), 0.0, (x, c))[0]

    for f in (
        lambda *args: jax.vmap(lambda p, x, c: tiled(p, x[None], c[None]), (None, 0, 0))(*args).sum(),
        scanned,
        lambda *args: across(*args).sum(),
        jax.checkpoint(tiled),
    ):
        assert relative_error(jax.jit(jax.grad(f))(params, x, c), expected) < 1e-6


def test_packed_and_adapted_params_under_lift():
    params, x, c = problem(10)
    frozen = mj.weights.quantize(params, mj.codecs.int8(group=16), where="*")
    adapter = mj.adapters.lora(rank=2, targets="{up,down}")
    theta = adapter.init(jax.random.key(2), frozen)
    theta = jax.tree.map(lambda leaf: leaf + 0.1, theta)

    def value(f):
        return jax.jit(
            jax.value_and_grad(lambda theta, x: mj.lift(loss(f))(adapter.attach(frozen, theta), x, c), (0, 1))
        )

    got, expected = value(mj.remat.tiled(mlp, 1, 4))(theta, x), value(mlp)(theta, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert relative_error(a, b) < 1e-5


def test_what_cannot_be_tiled():
    params, x, _ = problem(8)
    with pytest.raises(ValueError, match="chunks=0 must be at least 1"):
        mj.remat.tiled(mlp, 1, 0)
    with pytest.raises(ValueError, match="chunks=9 is more than the 8 positions of axis 1"):
        mj.remat.tiled(mlp, 1, 9)(params, x)
    with pytest.raises(ValueError, match=r"an output of shape \(2, 16\) does not have the 4 positions"):
        mj.remat.tiled(lambda p, x: x.sum(1), 1, 2)(params, x)
    with pytest.raises(ValueError, match=r"one size along axis 1, got \[4, 8\]"):
        mj.remat.tiled(lambda p, x, y: x, 1, 2)(params, x, x[:, :4])
    with pytest.raises(ValueError, match="no axis 3 to cut"):
        mj.remat.tiled(mlp, 3, 2)(params, x)
