"""Low-rank factors: the best approximation, the rule that skips, other solvers, and training both factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import weights
from memjax.core.views import make_axes
from memjax.weights import lift
from memjax.weights.factored import rank_limit, solve
from tests.random_views import array, assert_close


def test_svd_is_the_best_of_its_rank_and_exact_at_full_rank():
    w = array(0, 2, 12, 20)
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    for rank in (1, 5):
        u, v = solve(w, rank, "svd")
        error = np.linalg.norm(np.asarray(u @ v - w, np.float64), axis=(1, 2))
        np.testing.assert_allclose(error, np.sqrt((s[:, rank:] ** 2).sum(-1)), rtol=1e-5)  # Eckart and Young
    assert_close(jnp.matmul(*solve(w, 12, "svd")), w, 5e-6)


@pytest.mark.parametrize("rank, expected", [(3, 3), (0.5, 3), (6, 6), (0.99, 6), (7, None), (8, None), (0.1, None)])
def test_rank_is_a_number_or_a_fraction_and_the_rule_skips(rank, expected):
    assert rank_limit(12, 20) == 7
    tree = {"a": {"kernel": array(0, 12, 20)}, "b": {"kernel": array(1, 64, 64)}, "bias": array(2, 4)}
    result = weights.factorize(tree, rank)
    assert weights.is_view(result["b"]["kernel"]) and result["bias"] is tree["bias"]
    if expected is None:
        assert result["a"]["kernel"] is tree["a"]["kernel"]
    else:
        view = result["a"]["kernel"]
        assert (view.u.shape, view.v.shape) == ((12, expected), (expected, 20))
        assert view.nbytes == expected * (12 + 20) * 4 < tree["a"]["kernel"].nbytes


def test_energy_takes_the_least_rank_that_holds_it():
    w = jnp.stack([jnp.diag(jnp.array([4.0, 2, 1, 1] + [0] * 12)), jnp.diag(jnp.array([4.0] + [0] * 15))])
    for energy, rank in ((0.5, 1), (16 / 22 + 1e-4, 2), (20 / 22 + 1e-4, 3), (1.0, 4)):
        assert weights.factorize({"kernel": w}, energy=energy)["kernel"].u.shape == (2, 16, rank)


def test_nonnegative_and_random_factors():
    w, key = array(0, 20, 30), jax.random.key(0)

    def error(w, u, v):
        return np.linalg.norm(np.asarray(u) @ np.asarray(v) - w) / np.linalg.norm(w)

    best = error(w, *solve(w, 5, "svd"))
    u, v = solve(w, 5, "snmf", key)
    assert float(v.min()) >= 0 and float(u.min()) < 0 and best < error(w, u, v) < 1.1 * best
    w = jnp.abs(w)
    u, v = solve(w, 5, "nmf", key)
    assert float(v.min()) >= 0 and float(u.min()) >= 0 and error(w, u, v) < 0.45
    again = solve(w, 5, "nmf", key, iterations=3)
    assert error(w, *again) > error(w, u, v)
    view = weights.factorize({"kernel": jnp.zeros((64, 96))}, 16, solver="random", key=key)["kernel"]
    assert float(jnp.var(view.materialize())) == pytest.approx(1 / 64, rel=0.2)


def test_both_factors_train_as_two_dense_layers_do():
    tree = {"kernel": array(0, 12, 20)}
    view = weights.factorize(tree, 4)["kernel"]
    x, y = array(1, 6, 12), array(2, 6, 20)

    def loss(view):
        return jnp.mean((lift(lambda w, x: x @ w)(view, x) - y) ** 2)

    def two_layers(view):
        return jnp.mean((x @ view.u @ view.v - y) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(view)
    assert_close((value, grads), jax.jit(jax.value_and_grad(two_layers))(view))
    dense = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(view.materialize())
    assert_close((grads.u, grads.v), (dense @ view.v.T, view.u.T @ dense))

    optimizer = optax.sgd(0.05)

    @jax.jit
    def step(view, state):
        updates, state = optimizer.update(jax.grad(loss)(view), state)
        return optax.apply_updates(view, updates), state

    trained, state = view, optimizer.init(view)
    for _ in range(20):
        trained, state = step(trained, state)
    assert float(loss(trained)) < 0.8 * float(value)


def test_a_convolution_becomes_one_to_r_channels_and_a_pointwise_one():
    kernel, axes = array(0, 3, 3, 8, 16), make_axes((0, 1, 2), 3, 4)
    view = weights.factorize({"conv": {"kernel": kernel}}, 4, axes={"conv/*": axes})["conv"]["kernel"]
    assert (view.u.shape, view.v.shape) == ((3, 3, 8, 4), (4, 16))

    def program(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = array(1, 1, 5, 5, 8)
    jaxpr = str(jax.make_jaxpr(lift(program))(view, x))
    assert "[3,3,8,16]" not in jaxpr and "[1,5,5,4]" in jaxpr
    assert_close(lift(program)(view, x), program(view.materialize(), x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank must be a positive"),
        ({"rank": 1.5}, "must be whole"),
        ({"energy": 1.5}, "energy must be in"),
        ({"rank": 2, "solver": "qr"}, "expected a solver among svd, random, nmf, snmf"),
        ({"rank": 2, "solver": "nmf"}, "give key="),
        ({"rank": 2, "solver": "nmf", "key": jax.random.key(0)}, "kernel: nmf needs a weight without negative"),
        ({"rank": 7}, "rank 7 makes none of the selected weights smaller: kernel"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        weights.factorize({"kernel": array(0, 12, 20)}, **arguments)
