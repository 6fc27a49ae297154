import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax.recipes import train
from memjax.recipes.data import Windows
from memjax.recipes.evaluate import make_evaluate

D = 5


def loss_fn(theta, frozen, batch, key):
    """A masked regression: enough to see sums, weights and which leaf goes wrong."""
    hidden = jnp.tanh(batch["x"] @ frozen["w"] @ theta["a"]["kernel"] + theta["b"])
    nll = ((hidden - batch["y"]) ** 2).sum(-1)
    return (nll * batch["weight"]).sum(), batch["weight"].sum()


def problem(rows=6):
    rng = np.random.default_rng(0)
    theta = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(D, D)), jnp.float32)},
        "b": jnp.asarray(rng.normal(size=D), jnp.float32),
    }
    frozen = {"w": jnp.asarray(rng.normal(size=(D, D)), jnp.float32)}
    batch = {
        "x": rng.normal(size=(rows, D)).astype(np.float32),
        "y": rng.normal(size=(rows, D)).astype(np.float32),
        # Unequal in number between the microbatches.
        "weight": np.array([1, 0, 0, 1, 1, 1], np.float32),
    }
    return theta, frozen, batch


def test_accumulation_equals_the_big_batch():
    theta, frozen, batch = problem()
    results = []
    for accumulate in (1, 2, 3):
        tx = optax.sgd(0.1)
        step = train.make_step(loss_fn, tx, accumulate=accumulate)
        results.append(step(train.init_state(jax.tree.map(jnp.copy, theta), tx), frozen, batch))
    expected = jax.grad(lambda t: loss_fn(t, frozen, batch, None)[0] / batch["weight"].sum())(theta)
    for state, metrics in results:
        np.testing.assert_allclose(metrics.loss, results[0][1].loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(expected), rtol=1e-5)
        for after, before, g in zip(*map(jax.tree.leaves, (state.theta, theta, expected)), strict=True):
            np.testing.assert_allclose(after, before - 0.1 * g, rtol=1e-5, atol=1e-6)
        assert metrics.tokens == 4 and int(state.step) == 1


def test_state_is_donated_and_frozen_is_not():
    theta, frozen, batch = problem()
    tx = train.make_optimizer(1e-2, 10)
    state = train.init_state(theta, tx)
    train.make_step(loss_fn, tx)(state, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not frozen["w"].is_deleted()


def test_non_finite_step_says_where_and_changes_nothing():
    theta, frozen, batch = problem()
    tx = train.make_optimizer(1e-2, 10)
    before = jax.tree.map(np.array, theta)
    state = train.init_state(theta, tx)
    step = train.make_step(loss_fn, tx)
    state, metrics = step(state, {"w": frozen["w"].at[0, 0].set(jnp.nan)}, batch)
    with pytest.raises(FloatingPointError, match="step 7: loss is nan; the gradient of 'a/kernel' is not finite"):
        train.check_finite(metrics, 7)
    jax.tree.map(np.testing.assert_array_equal, before, state.theta)
    assert int(state.step) == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(state.opt_state))
    state, metrics = step(state, frozen, batch)
    train.check_finite(metrics, 8)
    assert int(state.step) == 1


def test_non_finite_gradient_of_a_finite_loss_is_named():
    def root(theta, frozen, batch, key):
        return jnp.sqrt(theta["z"]).sum() + theta["a"].sum(), jnp.float32(1)

    tx = optax.sgd(0.1)
    state = train.init_state({"a": jnp.ones(2), "z": jnp.zeros(2)}, tx)
    _, metrics = train.make_step(root, tx)(state, None, None)
    with pytest.raises(FloatingPointError, match=r"loss is 2\.0; the gradient of 'z' .* the first of 1"):
        train.check_finite(metrics, 0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    tx = train.make_optimizer(1.0, 8, schedule=schedule, warmup=3, clip=None)
    theta = jnp.zeros(())
    state, rates = tx.init(theta), []
    for _ in range(8):
        update, state = tx.update(jnp.ones(()), state, theta)
        rates.append(-float(update))
    np.testing.assert_allclose(rates[:3], [1 / 3, 2 / 3, 1], rtol=1e-4)
    tail = {
        "constant": np.ones(5),
        "linear": 1 - np.arange(5) / 5,
        "cosine": (1 + np.cos(np.pi * np.arange(5) / 5)) / 2,
    }[schedule]
    np.testing.assert_allclose(rates[3:], tail, rtol=1e-4)


def test_clipping_is_by_the_global_norm():
    tx = train.make_optimizer(1.0, 2, clip=0.5)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = tx.update(grads, tx.init(grads), grads)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose([moments["a"][0], moments["b"][0]], [0.03, 0.04], rtol=1e-5)


def test_bad_arguments():
    theta, frozen, batch = problem()
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate=4 does not divide the batch of 6"):
        train.make_step(loss_fn, tx, accumulate=4)(train.init_state(theta, tx), frozen, batch)
    with pytest.raises(ValueError, match="accumulate=0"):
        train.make_step(loss_fn, tx, accumulate=0)
    with pytest.raises(ValueError, match="warmup=5"):
        train.make_optimizer(1e-3, 5, warmup=5)
    for bad in ({"lr": math.nan}, {"clip": math.nan}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=(nan|-1)"):
            train.make_optimizer(**{"lr": 1e-3, "steps": 5} | bad)
    with pytest.raises(ValueError, match="schedule='step'"):
        train.make_optimizer(1e-3, 5, schedule="step")
    with pytest.raises(TypeError, match="a/codes: trained leaves must be floats, got uint8"):
        train.init_state({"a": {"codes": jnp.zeros(3, jnp.uint8)}}, tx)


def test_evaluation_is_the_mean_over_targets_whatever_the_batch():
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(2, 5, 3)).astype(np.float32)
    windows = Windows(inputs, targets, rng.integers(0, 2, (5, 3)).astype(np.float32))

    def loss(theta, frozen, batch, key):
        return (batch.weights * (batch.inputs - theta * batch.targets) ** 2).sum(), batch.weights.sum()

    total, count = loss(0.5, None, windows, None)
    for batch in (1, 2, 5, 8):
        result = make_evaluate(loss)(0.5, None, windows, batch)
        np.testing.assert_allclose(result.nll, total / count, rtol=1e-6)
        assert result.tokens == count
    np.testing.assert_allclose(result.perplexity, np.exp(result.nll), rtol=1e-6)
