import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.core import compiled_bytes
from memjax.optim.pamc import pamc_contrast, pamc_loss, sharpened, soft_assignment

N, D, K, TAU = 12, 4, 3, 1.5


def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    z, centers = jax.random.normal(keys[0], (N, D)), jax.random.normal(keys[1], (K, D))
    dense = jax.random.bernoulli(keys[2], 0.4, (N, N)) * jax.random.uniform(keys[3], (N, N))
    dense = dense.at[jnp.arange(N), jnp.arange(N)].set(0.5)
    edges = jnp.stack(jnp.nonzero(dense))
    return z, centers, dense, edges, dense[edges[0], edges[1]]


def dense_contrast(z, q, dense, tau):
    """The loss by its definition, over all pairs."""
    unit = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    cosine = (unit @ unit.T) * (1 - jnp.eye(len(z)))
    positive = jnp.sum(dense * jnp.exp(tau * cosine), axis=1)
    meta = jnp.stack([jnp.sum(jnp.where((jnp.argmax(q, 1) == k)[:, None], z, 0), 0) for k in range(q.shape[1])])
    meta = meta / jnp.linalg.norm(meta, axis=1, keepdims=True)
    negative = jnp.sum(jnp.exp(tau * (meta @ meta.T) * (1 - jnp.eye(len(meta)))), axis=1)
    return -jnp.mean(jnp.log(positive + 1e-10)) + jnp.mean(jnp.log(negative + 1e-10))


def test_value_and_gradients_equal_the_dense_definition():
    z, centers, dense, edges, weights = problem()
    assert len(jnp.unique(jnp.argmax(soft_assignment(z, centers), 1))) == K

    def expected(z, centers, dense):
        distance = jnp.sum((z[:, None] - centers[None]) ** 2, -1)
        q = 1 / (1 + distance)
        q = q / q.sum(1, keepdims=True)
        p = q**2 / q.sum(0)
        p = jax.lax.stop_gradient(p / p.sum(1, keepdims=True))
        return 2.0 * jnp.sum(p * jnp.log(p / q)) / N + 0.7 * dense_contrast(z, q, dense, TAU)

    def got(z, centers, weights):
        return pamc_loss(z, soft_assignment(z, centers), edges, weights, tau=TAU, alpha=0.7, beta=2.0)

    value, grads = jax.jit(jax.value_and_grad(got, (0, 1, 2)))(z, centers, weights)
    reference, wanted = jax.jit(jax.value_and_grad(expected, (0, 1, 2)))(z, centers, dense)
    np.testing.assert_allclose(value, reference, rtol=1e-6)
    for a, b in zip(grads, (*wanted[:2], wanted[2][edges[0], edges[1]])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_one_node_per_cluster_gives_all_pairs():
    z, _, dense, edges, weights = problem()
    unit = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    cosine = (unit @ unit.T) * (1 - jnp.eye(N))
    positive = jnp.sum(dense * jnp.exp(TAU * cosine), axis=1)
    all_pairs = jnp.mean(jnp.log(jnp.sum(jnp.exp(TAU * cosine), 1))) - jnp.mean(jnp.log(positive))
    np.testing.assert_allclose(pamc_contrast(z, jnp.eye(N), edges, weights, TAU), all_pairs, rtol=1e-5)


def test_an_empty_cluster_and_a_given_target():
    z, centers, _, edges, weights = problem()
    far = jnp.concatenate([centers, jnp.full((1, D), 1e3)])

    @jax.jit
    def loss(z):
        q = soft_assignment(z, far)
        given = pamc_loss(z, q, edges, weights, tau=TAU, target=sharpened(q))
        return pamc_loss(z, q, edges, weights, tau=TAU), given

    (value, given), slope = jax.jvp(loss, (z,), (jnp.ones_like(z),))
    assert jnp.isfinite(value) and jnp.isfinite(slope[0])
    np.testing.assert_allclose(given, value, rtol=1e-6)


def test_memory_is_linear_in_nodes_and_edges():
    n, e = 20_000, 60_000
    z, centers = jax.ShapeDtypeStruct((n, 8), jnp.float32), jax.ShapeDtypeStruct((6, 8), jnp.float32)
    edges, weights = jax.ShapeDtypeStruct((2, e), jnp.int32), jax.ShapeDtypeStruct((e,), jnp.float32)

    def loss(z, centers, edges, weights):
        return pamc_loss(z, soft_assignment(z, centers), edges, weights, tau=TAU)

    found = compiled_bytes(jax.jit(jax.grad(loss)).lower(z, centers, edges, weights).compile())
    assert found.temp < 4 * (6 * e * 8 + 20 * n * 8) < 4 * n * n / 20


def test_shapes_that_do_not_fit():
    z, centers, _, edges, weights = problem()
    with pytest.raises(ValueError, match=r"edges \[2, E\]"):
        pamc_contrast(z, soft_assignment(z, centers), edges.T, weights, TAU)
    with pytest.raises(ValueError, match=r"q \[N, K\]"):
        pamc_contrast(z, centers, edges, weights, TAU)
