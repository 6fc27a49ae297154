import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.optim.flrml import (
    Triplets,
    cayley_step,
    flrml,
    flrml_minibatch,
    objective,
    objective_grad,
    polar_retraction,
    scores,
    search_start,
    search_step,
    spectral,
    start,
)

D, N, CLASSES, DIM = 30, 90, 3, 4


def problem(noise=1.5):
    """Classes differ in three of thirty coordinates; the others hold as much."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % CLASSES
    x = rng.normal(size=(D, N)) * noise
    x[:CLASSES] += 2.0 * np.eye(CLASSES)[labels].T
    anchors = np.repeat(np.arange(N), 4)
    positive = np.array([rng.choice(np.flatnonzero(labels == labels[a])) for a in anchors])
    negative = np.array([rng.choice(np.flatnonzero(labels != labels[a])) for a in anchors])
    return x, labels, Triplets(anchors, positive, negative)


def numpy_parts(x, triplets, P, active):
    """The objective, its gradient by the dense K, and its scales, by the definition."""
    x = x / np.linalg.norm(x, axis=0)
    _, _, vt = np.linalg.svd(x, full_matrices=False)
    C = np.zeros((N, N))
    for a, p, n in zip(*triplets):
        C[p, a] += 1
        C[n, a] -= 1
    t = 1 / (1 + np.bincount(triplets.anchor, minlength=N))
    vtct = vt @ C @ np.diag(t)
    K = -vtct @ np.diag(active.astype(float)) @ vt.T
    k = -np.diag(P.T @ K @ P)
    s = np.log1p(np.exp(k))
    q = -(s + k / (1 + np.exp(-k))) / 2
    return 0.3 * active.sum() - s @ k / 2, -(K + K.T) @ P * q, (vt.T @ P) * (vtct.T @ P)


def test_objective_and_gradient_equal_the_numpy_transcription():
    x, _, triplets = problem()
    _, _, data = spectral(x, Triplets(*map(jnp.asarray, triplets)))
    rng = np.random.default_rng(1)
    P = np.linalg.qr(rng.normal(size=(D, DIM)))[0]
    active = rng.random(N) < 0.7
    # Singular vectors are known up to sign, so P is turned with them.
    vt = np.linalg.svd(x / np.linalg.norm(x, axis=0), full_matrices=False)[2]
    sign = np.sign(np.sum(np.asarray(data.v) * vt.T, axis=0))
    value, grad, score = numpy_parts(x, triplets, P, active)
    given = jnp.asarray(P * sign[:, None], jnp.float32)
    np.testing.assert_allclose(objective(data, given, active, 0.3), value, rtol=1e-4)
    got = objective_grad(data, given, active)
    np.testing.assert_allclose(got * sign[:, None], grad, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores(data, given), score, rtol=1e-3, atol=1e-5)
    auto = jax.jit(jax.grad(lambda P: objective(data, P, active, 0.3)))(given)
    np.testing.assert_allclose(got, auto, rtol=1e-3, atol=1e-5)


def test_the_search_stays_on_the_manifold_and_goes_down():
    x, _, triplets = problem()
    _, _, data = spectral(x, Triplets(*map(jnp.asarray, triplets)))
    P, margin, active = start(data, DIM, jax.random.key(0), 1.0)
    search = search_start(data, P, active, margin)
    step = jax.jit(lambda search, i: search_step(data, search, margin, i))
    first = search.value
    for i in range(15):
        before, search = search, step(search, i)
        np.testing.assert_allclose(search.P.T @ search.P, np.eye(DIM), atol=1e-5)
        # With the anchors of the step, it beats the mean of past objectives.
        assert objective(data, search.P, before.active, margin) <= before.reference + 1e-6
    assert search.value < first


def test_cayley_step_equals_its_definition_and_descends():
    rng = np.random.default_rng(0)
    P, grad = np.linalg.qr(rng.normal(size=(9, 3)))[0], rng.normal(size=(9, 3))
    A = grad @ P.T - P @ grad.T
    expected = np.linalg.solve(np.eye(9) + 0.15 * A, (np.eye(9) - 0.15 * A) @ P)
    got = cayley_step(jnp.float32(P), jnp.float32(grad), 0.3)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.sum(np.asarray(got - P) * grad) < 0
    polar = polar_retraction(jnp.float32(P + 0.1 * grad))
    np.testing.assert_allclose(polar.T @ polar, np.eye(3), atol=1e-5)


def neighbours_accuracy(points, labels):
    """k nearest neighbours, k = 5, by cosine, each point against all others."""
    unit = points / np.linalg.norm(points, axis=0)
    similar = unit.T @ unit - 2 * np.eye(points.shape[1])
    votes = labels[np.argsort(-similar, axis=1)[:, :5]]
    return np.mean([np.bincount(row).argmax() == label for row, label in zip(votes, labels)])


def test_the_metric_beats_principal_components():
    x, labels, triplets = problem()
    unit = x / np.linalg.norm(x, axis=0)
    principal = np.linalg.svd(unit)[0][:, :DIM].T @ unit
    base = neighbours_accuracy(principal, labels)
    learned = flrml(x, triplets, DIM, jax.random.key(0))
    assert learned.L.shape == (DIM, D) and learned.values[-1] < learned.values[0]
    assert neighbours_accuracy(np.asarray(learned.L) @ unit, labels) > base + 0.1
    small = flrml_minibatch(x, triplets, DIM, jax.random.key(0), batch=80)
    assert neighbours_accuracy(np.asarray(small.L) @ unit, labels) > base


def test_bad_input():
    x, _, triplets = problem()
    with pytest.raises(ValueError, match="three int arrays"):
        flrml(x, (triplets.anchor, triplets.positive, triplets.negative[:3]), DIM, jax.random.key(0))
    with pytest.raises(ValueError, match="dim=31 must be 1 to 30"):
        flrml(x, triplets, 31, jax.random.key(0))
