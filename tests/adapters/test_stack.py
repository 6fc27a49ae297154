import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import memjax as mj
from memjax.adapters import attach_stack, average, compose, lora, stack
from memjax.codecs import int8
from memjax.core.paths import leaf_paths, map_with_path
from tests.adapters.peft_fixtures import base

D, F = 8, 12


def trained(adapter, params, seed):
    """Returns (adapter, frozen, theta) with random factors."""
    shapes = jax.eval_shape(adapter.start, jax.random.key(0), params)[0]
    random = np.random.default_rng(seed)
    return adapter, params, jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def matrix(seed=0, shape=(D, F)):
    return {"w": {"kernel": jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)}}


def three(params, **settings):
    """Returns adapters of three ranks and scales."""
    return [
        trained(lora(rank=rank, alpha=alpha, **settings), params, seed)
        for seed, (rank, alpha) in enumerate([(2, 3), (4, 1), (1, 5)])
    ]


def dense(params, adapters, path):
    """Returns ``[n + 1, ...]``: the weight with each adapter, and at -1 without one."""
    w = np.asarray(dict(leaf_paths(params))[path])
    out = []
    for adapter, _, theta in adapters:
        a, b = (np.asarray(theta[path][name]) for name in "ab")
        out.append(w + adapter.scale(path, a.shape[-1]) * (a @ b if w.ndim < 4 else np.tensordot(a, b, 1)))
    return np.stack([*out, w])


def product(params, x):
    return x @ params["w"]["kernel"]


@pytest.mark.parametrize(
    "index, rows",
    [
        ([0, 2, -1, 1], ()),  # a row each
        ([0, 2, -1, 1], (5,)),  # blocks of more rows than the rank
        ([1, 1, 1, 1, 0, -1, 2, 1, -1, 2, 0, 1], ()),  # many short blocks: brought together
        ([0] * 12, ()),
        ([-1] * 12, (2,)),
    ],
)
def test_every_row_has_its_adapter(index, rows):
    params = matrix()
    adapters = three(params)
    stacked = stack(params, adapters)
    x = np.random.default_rng(9).normal(size=(len(index), *rows, D)).astype(np.float32)

    @jax.jit
    def run(params, stacked, x, index):
        return mj.lift(product)(attach_stack(params, stacked, index), x)

    expected = np.einsum("b...d,bdf->b...f", x, dense(params, adapters, "w/kernel")[index])
    found = run(params, stacked, x, np.array(index))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    packed = mj.weights.quantize(params, int8(group=8))
    off = mj.weights.materialize(packed)["w"]["kernel"] - params["w"]["kernel"]
    np.testing.assert_allclose(run(packed, stacked, x, np.array(index)), found + x @ off, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [[0, 2, -1, 1], [1, 1, 1, 1, 0, -1, 2, 1, -1, 2, 0, 1]])
def test_gradients_are_those_of_the_adapters_alone(index):
    params = matrix()
    adapters = three(params)
    thetas = [theta for _, _, theta in adapters]
    x, weight = (np.random.default_rng(9).normal(size=(len(index), k)).astype(np.float32) for k in (D, F))

    def with_thetas(thetas):
        return [(adapter, frozen, theta) for (adapter, frozen, _), theta in zip(adapters, thetas)]

    def together(thetas, x):
        stacked = stack(params, with_thetas(thetas))
        return jnp.sum(weight * mj.lift(product)(attach_stack(params, stacked, jnp.array(index)), x) ** 2)

    def one_by_one(thetas, x):
        w = params["w"]["kernel"]
        scales = [adapter.scale("w/kernel", theta["w/kernel"]["a"].shape[-1]) for adapter, _, theta in adapters]
        moved = [w + s * theta["w/kernel"]["a"] @ theta["w/kernel"]["b"] for s, theta in zip(scales, thetas)]
        return jnp.sum(weight * jnp.einsum("bd,bdf->bf", x, jnp.stack([*moved, w])[jnp.array(index)]) ** 2)

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(thetas, x) for f in (together, one_by_one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_many_short_blocks_copy_little():
    rows, n, rank, width = 512, 4, 8, 256
    params = matrix(shape=(width, width))
    stacked = {"w/kernel": {"a": jnp.ones((n, width, rank)), "b": jnp.ones((n, rank, width))}}

    def run(index, x):
        return mj.lift(product)(attach_stack(params, stacked, index), x)

    compiled = jax.jit(run).lower(jnp.zeros(rows, jnp.int32), jnp.ones((rows, width))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * rank * width * 4  # one copy of a for every row


def test_flattened_rows_and_rows_that_do_not_fit():
    params = matrix()
    adapters = three(params)
    view = attach_stack(params, stack(params, adapters), jnp.array([2, 0]))
    x = np.random.default_rng(9).normal(size=(2, 3, D)).astype(np.float32)

    def flattened(params, x):
        return (x.reshape(-1, D) @ params["w"]["kernel"]).reshape(2, 3, F)

    expected = np.einsum("bsd,bdf->bsf", x, dense(params, adapters, "w/kernel")[[2, 0]])
    np.testing.assert_allclose(jax.jit(mj.lift(flattened))(view, x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"each of 2 rows, but the operand has rows \(3,\)"):
        mj.lift(product)(view, jnp.ones((3, D)))


def test_lookup_and_tied_head():
    params = {"embedding": matrix(shape=(F, D))["w"]["kernel"]}
    adapters = three(params, targets="embedding")
    stacked = stack(params, adapters)
    tokens, index = jnp.array([[1, 5, 11], [0, 0, 3], [7, 2, 2]]), jnp.array([1, -1, 2])

    @jax.jit
    @mj.lift
    def tied(params, tokens):
        hidden = params["embedding"][tokens]
        columns = jnp.take(params["embedding"], tokens % D, axis=1)  # [F, B, S]
        return hidden, hidden @ params["embedding"].T, columns.transpose(1, 2, 0)

    found = tied(attach_stack(params, stacked, index), tokens)
    tables = dense(params, adapters, "embedding")[index]
    for b, (table, ids) in enumerate(zip(tables, np.asarray(tokens))):
        for x, y in zip(found, (table[ids], table[ids] @ table.T, table[:, ids % D].T)):
            np.testing.assert_allclose(x[b], y, rtol=1e-4, atol=1e-4)


def test_convolution():
    axes = {"w/kernel": ((0, 1, 2), 3)}
    params = matrix(shape=(3, 3, 2, 4))
    adapters = three(params, axes=axes)
    index = np.array([1, -1, 0])
    x = np.random.default_rng(3).normal(size=(3, 2, 5, 6)).astype(np.float32)

    def convolve(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"]["kernel"], (1, 2), "SAME", dimension_numbers=("NCHW", "HWIO", "NHWC")
        )

    found = jax.jit(mj.lift(convolve))(attach_stack(params, stack(params, adapters), index, axes), x)
    kernels = dense(params, adapters, "w/kernel")[index]
    expected = jax.jit(jax.vmap(lambda kernel, x: convolve({"w": {"kernel": kernel}}, x[None])[0]))(kernels, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_batch_of_a_scanned_model():
    model, targets = base(), ["layers/**/{q,v,down}_proj/kernel", "embed_tokens/embedding", "lm_head/kernel"]
    adapters = [
        trained(lora(rank=rank, alpha=0.1 * rank, targets=targets[:count]), model.params, rank)
        for rank, count in ((2, 1), (4, 3), (3, 2))
    ]
    stacked = stack(model.params, adapters)
    assert stacked["layers/mlp/down_proj/kernel"]["a"].shape == (3, 3, 48, 4)
    tokens = np.random.default_rng(0).integers(0, 264, (4, 6))
    traced = []

    @jax.jit
    def run(stacked, index, tokens):
        traced.append(1)
        return mj.lift(lambda p, t: model.logits(p, t, remat="full"))(
            attach_stack(model.params, stacked, index), tokens
        )

    index = [2, 0, -1, 1]
    found = run(stacked, jnp.array(index), tokens)
    plain = jax.jit(model.logits)
    for row, i in enumerate(index):
        mine = adapters[i][2] if i >= 0 else {}
        params = map_with_path(
            lambda path, w, i=i, mine=mine: dense(model.params, [adapters[i]], path)[0] if path in mine else w,
            model.params,
        )
        np.testing.assert_allclose(found[row], plain(params, tokens)[row], rtol=1e-4, atol=1e-4)

    again = run(jax.tree.map(lambda x: x[::-1].copy() * 0.5, stacked), jnp.array([0, 0, 1, 1]), tokens)
    assert len(traced) == 1 and not np.allclose(again, found)


def test_switching_adapters_compiles_nothing():
    params = matrix()
    adapter, _, first = trained(lora(rank=2), params, 0)
    second = trained(lora(rank=2), params, 1)[2]
    run = jax.jit(lambda theta, x: mj.lift(product)(adapter.attach(params, theta), x))
    x = jnp.ones((3, D))
    assert not np.allclose(run(first, x), run(second, x))
    assert run._cache_size() == 1


def test_under_vmap_and_a_scalar_index():
    params = matrix()
    adapters = three(params)
    stacked = stack(params, adapters)
    x, index = np.random.default_rng(9).normal(size=(3, 4, D)).astype(np.float32), np.array([2, -1, 0])

    def one(i, x):
        return mj.lift(product)(attach_stack(params, stacked, i), x)

    expected = np.einsum("b...d,bdf->b...f", x, dense(params, adapters, "w/kernel")[index])
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(index, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(one)(np.int32(2), x[0]), expected[0], rtol=1e-4, atol=1e-4)


def test_a_batch_that_is_sharded():
    params = matrix()
    adapters = three(params)
    stacked = stack(params, adapters)
    x, index = np.random.default_rng(9).normal(size=(4, 3, D)).astype(np.float32), np.array([2, -1, 0, 0])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    def run(stacked, index, x):
        return mj.lift(product)(attach_stack(params, stacked, index), x)

    expected = np.einsum("b...d,bdf->b...f", x, dense(params, adapters, "w/kernel")[index])
    np.testing.assert_allclose(run(stacked, index, x), expected, rtol=1e-4, atol=1e-4)


def test_composed_adapters_add_up_exactly():
    params = {"a": matrix(0)["w"], "b": matrix(1, (3, D, F))["w"]}
    adapters = [*three(params)[:2], trained(lora(rank=3, alpha=2, targets="a/kernel"), params, 7)]
    weights = [0.5, -2.0, 3.0]
    adapter, theta = compose(params, adapters, weights)
    assert theta["a/kernel"]["a"].shape == (D, 9) and theta["b/kernel"]["b"].shape == (3, 6, F)
    for path in ("a/kernel", "b/kernel"):
        a, b = (np.asarray(theta[path][name]) for name in "ab")
        expected = 0
        for weight, (one, _, own) in zip(weights, adapters):
            if path in own:
                scale = one.scale(path, own[path]["a"].shape[-1])
                expected = expected + weight * scale * np.asarray(own[path]["a"]) @ np.asarray(own[path]["b"])
        assert adapter.scale(path, a.shape[-1]) == 1
        np.testing.assert_allclose(a @ b, expected, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(adapter.attach(params, theta))


def test_average_is_the_mean_of_factors():
    params = matrix()
    thetas = [trained(lora(rank=2), params, seed)[2] for seed in range(3)]
    mean = average(thetas)
    jax.tree.map(lambda m, *xs: np.testing.assert_allclose(m, np.mean(xs, 0), rtol=1e-6), mean, *thetas)
    tilted = average(thetas, [1, 0, 3])
    np.testing.assert_allclose(
        tilted["w/kernel"]["a"], 0.25 * thetas[0]["w/kernel"]["a"] + 0.75 * thetas[2]["w/kernel"]["a"], rtol=1e-5
    )
    with pytest.raises(ValueError, match="w/kernel: adapter 0 has factors"):
        average([thetas[0], trained(lora(rank=3), params, 0)[2]])
    with pytest.raises(ValueError, match="not be negative"):
        average(thetas[:2], [1, -2])


def test_errors_name_what_is_wrong():
    params = matrix()
    adapters = three(params)
    stacked = stack(params, adapters)
    with pytest.raises(ValueError, match="one or more adapters"):
        stack(params, [])
    with pytest.raises(ValueError, match=r"index must be -1 to 2, got \[0, 3\]"):
        attach_stack(params, stacked, jnp.array([0, 3]))
    with pytest.raises(TypeError, match="integers"):
        attach_stack(params, stacked, jnp.array([0.0]))
    with pytest.raises(ValueError, match="no leaves of the params"):
        attach_stack({"v": params["w"]}, stacked, jnp.array([0]))
    with pytest.raises(ValueError, match="w/kernel: expected stacked factors"):
        attach_stack(matrix(shape=(D + 1, F)), stacked, jnp.array([0]))
    with pytest.raises(ValueError, match="w/kernel: lora makes it something else"):
        stack(matrix(seed=5), adapters)  # adapters of another tree
    with pytest.raises(TypeError, match="no one weight"):
        mj.weights.materialize(attach_stack(params, stacked, jnp.array([0])))
