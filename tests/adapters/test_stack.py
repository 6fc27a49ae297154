import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax.adapters import attach_stack, average, compose, lora, stack
from memjax.codecs import int8
from tests.adapters.peft_fixtures import base

D, F = 8, 12


def trained(adapter, params, seed):
    """Returns (adapter, frozen, theta) with random factors."""
    frozen, theta = adapter.prepare(jax.random.key(seed), params)
    leaves, tree = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(seed + 50), len(leaves))
    return adapter, frozen, jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def matrix(seed=0, shape=(D, F)):
    return {"w": {"kernel": jax.random.normal(jax.random.key(seed), shape)}}


def three(params, **settings):
    """Returns adapters of three ranks and scales."""
    return [
        trained(lora(rank=rank, alpha=alpha, **settings), params, seed)
        for seed, (rank, alpha) in enumerate([(2, 3), (4, 1), (1, 5)])
    ]


def alone(fn, params, adapters, i, x):
    """The reference: ``fn`` with adapter ``i``, or with the base for -1."""
    if i < 0:
        return mj.lift(fn)(params, x)
    adapter, frozen, theta = adapters[i]
    return mj.lift(fn)(adapter.attach(frozen, theta), x)


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
@pytest.mark.parametrize("packed", [False, True])
def test_every_row_has_its_adapter(index, rows, packed):
    params = matrix()
    if packed:
        params = mj.weights.quantize(params, int8(group=8))
    adapters = three(params)
    stacked = stack(params, adapters)
    x = jax.random.normal(jax.random.key(9), (len(index), *rows, D))

    def run(stacked, x, index):
        return mj.lift(product)(attach_stack(params, stacked, index), x)

    expected = jnp.stack([alone(product, params, adapters, i, row) for i, row in zip(index, x)])
    np.testing.assert_allclose(jax.jit(run)(stacked, x, jnp.array(index)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [[0, 2, -1, 1], [1, 1, 1, 1, 0, -1, 2, 1, -1, 2, 0, 1]])
def test_gradients_are_those_of_the_adapters_alone(index):
    params = matrix()
    adapters = three(params)
    thetas = [theta for _, _, theta in adapters]
    x = jax.random.normal(jax.random.key(9), (len(index), D))
    weight = jax.random.normal(jax.random.key(8), (len(index), F))

    def with_thetas(thetas):
        return [(adapter, frozen, theta) for (adapter, frozen, _), theta in zip(adapters, thetas)]

    def together(thetas, x):
        stacked = stack(params, with_thetas(thetas))
        return jnp.sum(weight * mj.lift(product)(attach_stack(params, stacked, jnp.array(index)), x) ** 2)

    def one_by_one(thetas, x):
        rows = [alone(product, params, with_thetas(thetas), i, row) for i, row in zip(index, x)]
        return jnp.sum(weight * jnp.stack(rows) ** 2)

    found, expected = (jax.grad(f, (0, 1))(thetas, x) for f in (together, one_by_one))
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
    x = jax.random.normal(jax.random.key(9), (2, 3, D))

    def flattened(params, x):
        return (x.reshape(-1, D) @ params["w"]["kernel"]).reshape(2, 3, F)

    np.testing.assert_allclose(mj.lift(flattened)(view, x), mj.lift(product)(view, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"each of 2 rows, but the operand has rows \(3,\)"):
        mj.lift(product)(view, jnp.ones((3, D)))


def test_lookup_and_tied_head():
    params = {"embedding": jax.random.normal(jax.random.key(0), (F, D))}
    adapters = three(params, targets="embedding")
    stacked = stack(params, adapters)
    tokens, index = jnp.array([[1, 5, 11], [0, 0, 3], [7, 2, 2]]), jnp.array([1, -1, 2])

    def tied(params, tokens):
        hidden = params["embedding"][tokens]
        return hidden, hidden @ params["embedding"].T

    found = mj.lift(tied)(attach_stack(params, stacked, index), tokens)
    for b, i in enumerate(index):
        expected = alone(tied, params, adapters, int(i), tokens[b : b + 1])
        jax.tree.map(lambda x, y, b=b: np.testing.assert_allclose(x[b], y[0], rtol=1e-5, atol=1e-5), found, expected)

    def column(params, tokens):  # a lookup along the output axis
        return jnp.take(params["embedding"], tokens, axis=1)

    found = mj.lift(lambda p, t: jnp.moveaxis(column(p, t), 0, -1))(attach_stack(params, stacked, index), tokens % D)
    for b, i in enumerate(index):
        expected = jnp.moveaxis(alone(column, params, adapters, int(i), tokens[b] % D), 0, -1)
        np.testing.assert_allclose(found[b], expected, rtol=1e-5, atol=1e-5)


def test_convolution():
    axes = {"w/kernel": ((0, 1, 2), 3)}
    params = matrix(shape=(3, 3, 2, 4))
    adapters = three(params, axes=axes)
    index = jnp.array([1, -1, 0])
    x = jax.random.normal(jax.random.key(3), (3, 2, 5, 6))

    def convolve(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"]["kernel"], (1, 2), "SAME", dimension_numbers=("NCHW", "HWIO", "NHWC")
        )

    found = mj.lift(convolve)(attach_stack(params, stack(params, adapters), index, axes), x)
    for b, i in enumerate(index):
        expected = alone(convolve, params, adapters, int(i), x[b : b + 1])
        np.testing.assert_allclose(found[b], expected[0], rtol=1e-4, atol=1e-4)


def test_one_batch_of_a_scanned_model():
    model, targets = base(), ["layers/**/{q,v,down}_proj/kernel", "embed_tokens/embedding", "lm_head/kernel"]
    adapters = [
        trained(lora(rank=rank, alpha=0.1 * rank, targets=targets[:count]), model.params, rank)
        for rank, count in ((2, 1), (4, 3), (3, 2))
    ]
    stacked = stack(model.params, adapters)
    assert stacked["layers/mlp/down_proj/kernel"]["a"].shape == (3, 3, 48, 4)
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 264)
    traced = []

    @jax.jit
    def run(stacked, index, tokens):
        traced.append(1)
        return mj.lift(lambda p, t: model.logits(p, t, remat="full"))(
            attach_stack(model.params, stacked, index), tokens
        )

    index = [2, 0, -1, 1]
    found = run(stacked, jnp.array(index), tokens)
    whole = jax.jit(mj.lift(model.logits))
    for row, i in enumerate(index):
        params = model.params if i < 0 else adapters[i][0].attach(*adapters[i][1:])
        np.testing.assert_allclose(found[row], whole(params, tokens)[row], rtol=1e-4, atol=1e-4)

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
    x, index = jax.random.normal(jax.random.key(9), (3, 4, D)), jnp.array([2, -1, 0])

    def one(i, x):
        return mj.lift(product)(attach_stack(params, stacked, i), x)

    expected = mj.lift(product)(attach_stack(params, stacked, index), x)
    np.testing.assert_allclose(jax.vmap(one)(index, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one(2, x[0]), expected[0], rtol=1e-5, atol=1e-5)


def test_composed_adapters_add_up_exactly():
    params = {"a": matrix(0)["w"], "b": matrix(1, (3, D, F))["w"]}
    adapters = [*three(params)[:2], trained(lora(rank=3, alpha=2, targets="a/kernel"), params, 7)]
    weights = [0.5, -2.0, 3.0]
    adapter, theta = compose(params, adapters, weights)
    assert theta["a/kernel"]["a"].shape == (D, 9) and theta["b/kernel"]["b"].shape == (3, 6, F)
    found = mj.weights.materialize(adapter.attach(params, theta))
    expected = params
    for weight, (one, frozen, own) in zip(weights, adapters):
        moved = mj.weights.materialize(one.attach(frozen, own))
        expected = jax.tree.map(lambda w, m, p, weight=weight: w + weight * (m - p), expected, moved, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, expected)
    assert adapter.prepare(jax.random.key(0), params)[1]["a/kernel"]["a"].shape == (D, 9) if D >= 9 else True


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
