"""What every optimizer of the table owes its users."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import memjax as mj
from memjax.core import leaf_paths
from tests.optim.battery import GAP, OPTIMIZERS, grads, params

STEPS = 4 * GAP + 1
each = pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.name)
long = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.variant) for row in OPTIMIZERS]
)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b)))


@functools.cache
def runner(row):
    """The jitted step of a row, and the list that grows by one with every trace."""
    tx, traces = row.make(), []

    @jax.jit
    def step(p, state, g):
        traces.append(1)
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    return tx, step, traces


@functools.cache
def trajectory(row):
    """Params and state after every step of a run over many switches."""
    tx, step, _ = runner(row)
    p = params()
    state = jax.jit(tx.init)(p)
    points = [(p, state)]
    for i in range(STEPS):
        points.append(step(*points[-1], grads(i)))
    return points


@each
def test_state_takes_the_bytes_of_the_formula(row):
    assert mj.optim.init_bytes(row.make(), params()) == row.formula(params())
    abstract = jax.eval_shape(params)
    assert mj.optim.init_bytes(row.make(), abstract) == row.formula(params())
    assert mj.optim.state_bytes(trajectory(row)[-1][1]) == row.formula(params())


@each
def test_no_two_leaves_of_the_state_are_one_buffer(row):
    """Which could not be donated."""
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(row.make().init(params())) if jnp.size(leaf)]
    assert len({leaf.unsafe_buffer_pointer() for leaf in arrays}) == len(arrays)


@each
def test_one_trace_serves_all_switches_and_every_leaf_moves(row):
    points, (_, _, traces) = trajectory(row), runner(row)
    assert len(traces) == 1
    for (path, before), (_, after) in zip(leaf_paths(points[0][0]), leaf_paths(points[-1][0])):
        assert np.isfinite(after).all() and not np.array_equal(before, after), path


@each
def test_a_restored_run_continues_bitwise(row):
    points, (tx, step, _) = trajectory(row), runner(row)
    for start in (0, GAP + 1):
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(points[start])]  # what any checkpoint keeps
        like = jax.tree.structure((params(), jax.eval_shape(tx.init, params())))
        point = jax.tree.unflatten(like, [jnp.asarray(leaf) for leaf in leaves])
        for i in range(start, STEPS):
            point = step(*point, grads(i))
        assert equal(point, points[-1])


@each
def test_nan_stays_in_its_leaf(row):
    points, (_, step, _) = trajectory(row), runner(row)
    for start in (GAP - 1, GAP):
        g = grads(start)
        g["w"][3, 5] = np.nan
        broken, state = step(*points[start], g)
        broken, _ = step(broken, state, grads(start + 1))
        for (path, found), (_, sound) in zip(leaf_paths(broken), leaf_paths(points[start + 2][0])):
            assert path == "w" or np.array_equal(found, sound), path


@each
def test_zero_gradients_give_finite_updates(row):
    points, (_, step, _) = trajectory(row), runner(row)
    p, _ = step(*points[0], jax.tree.map(np.zeros_like, params()))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))


@long
def test_bf16_params_and_gradients(row):
    tx = row.make()
    p, g = params(jnp.bfloat16), grads(0, jnp.bfloat16)
    for tree in (p, g):  # what is left has leaves of every kind
        del tree["layers"]["o_proj"], tree["embed_tokens"]
    state = jax.eval_shape(tx.init, p)

    @jax.jit
    def one(g, p):
        updates, state = tx.update(g, tx.init(p), p)
        return updates, optax.apply_updates(p, updates), state

    updates, after, new = one(g, p)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(new)] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((updates, after)))
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(after))
    assert not equal(after, p)
    if row.bits32:
        assert not any(leaf.dtype == jnp.bfloat16 and leaf.ndim for leaf in jax.tree.leaves(state))


@long
def test_in_a_chain_with_injected_hyperparameters_under_multi_steps(row):
    points = trajectory(row)
    injected = optax.inject_hyperparams(row.make, static_args=row.static)(learning_rate=1e-2)
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1e6), injected), every_k_schedule=2)

    batches = jax.tree.map(lambda *x: np.stack(x), *[grads(i // 2) for i in range(2 * GAP + 2)])

    @jax.jit
    def run(p):
        def body(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (p, tx.init(p)), batches)[0]

    p, _ = run(params())
    for (path, found), (_, wanted) in zip(leaf_paths(p), leaf_paths(points[GAP + 1][0])):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5, err_msg=path)


@each
def test_in_a_partition_with_masked_and_missing_leaves(row):
    tx = optax.partition(
        {"method": row.make(), "sgd": optax.sgd(1.0)},
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "sgd" if "w" in jax.tree_util.keystr(path) else "method", tree
        ),
    )
    own = {"layers": {"a": params()["layers"]["q_proj"]["kernel"]}}
    tree = {**own, "w": params()["w"], "nothing": None, "more": {}}
    updates, state = jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p), tree, tree)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, tree)
    alone = row.make()
    _, lone = jax.eval_shape(lambda g, p: alone.update(g, alone.init(p), p), own, own)
    assert mj.optim.state_bytes(state) == mj.optim.state_bytes(lone)


@each
def test_trees_without_leaves(row):
    tx = row.make()
    for empty in ({}, {"a": None, "b": optax.MaskedNode()}):
        updates, _ = tx.update(empty, tx.init(empty), empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)


@long
def test_sharded_state_updates_its_own_shards(row):
    """Batch and state on eight devices: gradients are reduced before anything else, and no leaf is ever whole."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    p, tx = {"layers": {"kernel": params()["layers"]["q_proj"]["kernel"]}, "w": params()["w"]}, row.make()
    specs = {"layers": {"kernel": PartitionSpec(None, None, "data")}, "w": PartitionSpec(None, "data")}

    def shard(spec):
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map(shard, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    state_shardings = mj.optim.state_shardings(tx, p, shardings)
    # Half of the batch pulls one way, the other half, harder, the other: signs of parts would cancel or differ.
    slopes = np.float32(np.random.default_rng(5).standard_normal(8) + np.where(np.arange(8) % 2, 30.0, -31.0))

    def loss(q, slopes):
        parts = jax.vmap(lambda slope: slope * sum(jnp.sum(jnp.sin(leaf * 3)) for leaf in jax.tree.leaves(q)))
        return jnp.mean(parts(slopes))

    def step(replicas, p, state, slopes):
        gradients = jax.lax.with_sharding_constraint(jax.grad(loss)(replicas, slopes), shardings)
        return tx.update(gradients, state, p)

    wanted, _ = jax.jit(lambda p: tx.update(jax.grad(loss)(p, slopes), tx.init(p), p))(p)
    lowered = jax.jit(
        step,
        in_shardings=(shard(PartitionSpec()), shardings, state_shardings, shard(PartitionSpec("data"))),
        out_shardings=(shardings, state_shardings),
    ).lower(p, p, tx.init(p), slopes)
    compiled = lowered.compile()
    if row.fsdp:
        smallest = min(leaf.size for leaf in jax.tree.leaves(p))
        for line in compiled.as_text().splitlines():
            found = re.search(r"= \(?(?:f32|bf16)\[([\d,]+)\].* all-gather(?:-start)?\(", line)
            assert not found or np.prod([int(d) for d in found[1].split(",")]) < smallest, line
    args = (
        jax.device_put(p, shard(PartitionSpec())),
        jax.device_put(p, shardings),
        jax.device_put(tx.init(p), state_shardings),
        jax.device_put(slopes, shard(PartitionSpec("data"))),
    )
    updates, _ = compiled(*args)
    for (path, found), (_, expected) in zip(leaf_paths(updates), leaf_paths(wanted)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=path)


@each
def test_a_view_among_the_params_is_refused(row):
    tree = mj.weights.quantize({"w": params()["w"]}, mj.codecs.int8(group=8), where="w")
    if row.name != "adamw":  # optax knows no views
        with pytest.raises(TypeError, match="w"):
            row.make().init(tree)
