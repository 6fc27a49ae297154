"""CE-SSL: coins, rank plans and the semi-supervised step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from memjax import adapters, codecs, weights
from memjax.adapters import AdapterBytes, ce_ssl, concat_batches, cutmix, plan_ranks_one_shot
from memjax.core.paths import leaf_paths
from memjax.weights import lift
from tests.adapters.small import KEY, X, gradients, model, moved, params
from tests.random_views import array, assert_close

KEYS = [jax.random.key(i) for i in range(3)]


@functools.cache
def factors():
    return moved(ce_ssl(3).init(KEY, params()))


def test_without_deactivation_it_is_lora():
    adapter, lora, theta = ce_ssl(3, 6.0, deactivation=0.0), adapters.lora(3, 6.0), factors()
    for key in (None, KEYS[0]):
        jax.tree.map(
            np.testing.assert_array_equal, adapter.attach(params(), theta, key), lora.attach(params(), theta, key)
        )


def test_initial_factors():
    theta = ce_ssl(16, targets="w").init(KEY, {"w": jnp.zeros((2, 400, 50))})["w"]
    assert not np.any(theta["b"]) and np.std(theta["a"]) == pytest.approx(0.02, rel=0.03)
    assert not np.array_equal(theta["a"][0], theta["a"][1])


def coins(views):
    return np.concatenate([np.ravel(leaf.deltas[0].on) for _, leaf in leaf_paths(views)])


@pytest.mark.smoke
def test_each_layer_is_there_or_not():
    adapter, theta = ce_ssl(3, deactivation=0.5), factors()
    views = adapter.attach(params(), theta, KEYS[1])
    on = coins(views)
    assert set(on) == {False, True} and on.size == 5
    np.testing.assert_array_equal(on, coins(adapter.attach(params(), theta, KEYS[1])))
    for path, leaf in leaf_paths(views):
        there = jnp.asarray(leaf.deltas[0].on)[..., None, None]
        dense = leaf.base.array + there * theta[path]["a"] @ theta[path]["b"]
        assert_close(leaf.materialize(), dense, 2e-6)
    grads = gradients(adapter, params(), theta, KEYS[1])
    learns = np.concatenate([np.ravel(np.any(grads[path]["b"], (-2, -1))) for path, _ in leaf_paths(views)])
    np.testing.assert_array_equal(learns, on)


def test_the_merged_weight_is_the_expectation_over_coins():
    adapter, trials = ce_ssl(3, 6.0, deactivation=0.2, targets="w"), 2000
    frozen, x = {"w": array(0, 16, 8)}, array(1, 4, 16)
    theta = {"w": {"a": array(2, 16, 3), "b": array(3, 3, 8)}}

    def apply(key):
        return lift(lambda p, x: x @ p["w"])(adapter.attach(frozen, theta, key), x)

    y = jax.jit(jax.vmap(apply))(jax.random.split(jax.random.key(0), trials))
    merged, _ = adapter.merge(frozen, theta)
    full = x @ theta["w"]["a"] @ theta["w"]["b"] * 2
    share = np.mean(np.any(np.abs(y - x @ frozen["w"]) > 1e-3, (1, 2)))
    assert share == pytest.approx(0.8, abs=4 * (0.16 / trials) ** 0.5)
    assert_close(jnp.mean(y, 0), x @ frozen["w"] + share * full, 2e-5)
    assert_close(x @ merged["w"], x @ frozen["w"] + 0.8 * full, 2e-6)
    assert_close(x @ merged["w"], lift(lambda p, x: x @ p["w"])(adapter.attach(frozen, theta), x), 2e-6)


def test_a_layer_that_rests_does_no_work():
    """The delta's products sit in a conditional, alone and under scan; a vmap over layers computes them all."""
    adapter, theta = ce_ssl(3), factors()
    layers = {"w": params()["layers"]["up"]["kernel"]}
    adapter, theta = ce_ssl(3, targets="w"), {"w": theta["layers/up/kernel"]}
    views = adapter.attach(layers, theta, KEYS[0])["w"]
    x = array(0, 4, 16)

    def conditionals(fn, *args):
        return jax.jit(fn).lower(*args).as_text().count("stablehlo.case")

    apply = lift(lambda w, x: x @ w)
    assert conditionals(apply, jax.tree.map(lambda leaf: leaf[0], views), x) == 1
    scanned = lift(lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0, w)[1])
    assert conditionals(scanned, views, x) == 1
    assert conditionals(jax.vmap(apply, in_axes=(0, None)), views, x) == 0
    batched = lift(lambda w, x: jnp.einsum("ti,lio->lto", x, w))
    expected = [x @ leaf.materialize() for leaf in (jax.tree.map(lambda leaf, i=i: leaf[i], views) for i in range(2))]
    for result in (scanned(views, x), jax.vmap(apply, in_axes=(0, None))(views, x), batched(views, x)):
        assert_close(result, jnp.stack(expected), 2e-6)


def test_under_shard_map_layers_rest_together():
    adapter, frozen = ce_ssl(3, deactivation=0.5, targets="w"), {"w": params()["layers"]["up"]["kernel"]}
    theta = {"w": factors()["layers/up/kernel"]}
    assert set(coins(adapter.attach(frozen, theta, KEYS[0]))) == {False, True}

    def loss(theta, x):
        apply = lift(lambda p, x: lax.map(lambda w: jnp.sin(x @ w), p["w"]))
        return jnp.sum(apply(adapter.attach(frozen, theta, KEYS[0]), x))

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    grads, specs = jax.grad(loss, (0, 1)), (spec(), spec("data"))
    sharded = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=specs)
    assert_close(jax.jit(sharded)(theta, X), jax.jit(grads)(theta, X), 5e-6)


def test_lookups_and_convolutions_rest_too():
    tree = {"embedding": array(0, 12, 8), "kernel": array(1, 3, 8, 6)}

    def apply(p, tokens):
        return lax.conv_general_dilated(
            p["embedding"][tokens], p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    tokens = jnp.array([[1, 5, 5, 0]])
    adapter = ce_ssl(2, deactivation=0.5, targets="*", axes=weights.infer_axes(apply, tree, tokens))
    theta = moved(adapter.init(KEY, tree), 1.0)
    run, seen = jax.jit(lift(apply)), set()
    for seed in range(12):
        views = adapter.attach(tree, theta, jax.random.key(seed))
        seen |= {tuple(coins(views).tolist())}
        assert_close(run(views, tokens), apply(weights.materialize(views), tokens), 5e-6)
    assert len(seen) == 4


# ---- ranks --------------------------------------------------------------------------------------------------------


def batches():
    return [(array(10 + i, 8, 16), array(20 + i, 8, 16)) for i in range(2)]


def loss_fn(params, batch):
    return jnp.mean(jnp.square(model(params, batch[0]) - batch[1]))


@pytest.mark.parametrize("score, packed", [("taylor", True), ("fisher", False)])
def test_the_plan_ranks_layers_by_their_first_gradient(score, packed):
    frozen = weights.quantize(params(), codecs.int8(group=8)) if packed else params()
    rank, fraction = 4, 0.5
    theta = ce_ssl(rank).init(KEY, frozen)
    dense = weights.materialize(frozen)
    totals = {}
    gradient = jax.jit(jax.grad(loss_fn))
    for batch in batches():
        whole = dict(leaf_paths(gradient(dense, batch)))  # dW; dB = A^T dW
        for path, w in leaf_paths(dense):
            a = np.asarray(theta[path]["a"], np.float64)
            change = a @ (np.swapaxes(a, -1, -2) @ np.asarray(whole[path], np.float64))
            totals[path] = totals.get(path, 0) + np.mean((change * (w if score == "taylor" else 1)) ** 2, (-2, -1))
    flat = np.concatenate([np.ravel(x) for x in totals.values()])
    bar = np.sort(flat)[1]  # floor(5 matrices * 0.5) = 2 low ones
    expected = {path: np.where(x <= bar, 2, rank).tolist() for path, x in totals.items()}
    plan = plan_ranks_one_shot(loss_fn, frozen, batches(), rank, fraction=fraction, score=score, key=KEY)
    assert plan == expected
    assert sum(np.sum(np.asarray(x) == 2) for x in plan.values()) == 2
    adapter = ce_ssl(plan, targets=list(plan))
    spare = sum(
        2 * (w.shape[-2] + w.shape[-1]) * int(np.sum(np.max(plan[path]) - plan[path]) // 2)
        for path, w in leaf_paths(dense)
    )
    assert adapter.padding(frozen) == AdapterBytes(4 * spare, 0)


def test_padded_ranks_stay_padded():
    ranks = [2, 4]
    adapter = ce_ssl({"layers/up/*": ranks}, targets="layers/up/*")
    theta = adapter.init(KEY, params())
    tx = optax.adamw(1e-2)
    state = tx.init(theta)
    for _ in range(3):
        updates, state = tx.update(gradients(adapter, params(), theta), state, theta)
        theta = optax.apply_updates(theta, updates)
    for layer, r in enumerate(ranks):
        a, b = (theta["layers/up/kernel"][name][layer] for name in "ab")
        assert not np.any(a[:, r:]) and not np.any(b[r:])
        assert np.all(np.any(b[:r], -1))
    assert adapter.padding(params()) == AdapterBytes(4 * 2 * (16 + 24), 0)
    assert adapter.nbytes(params()) == AdapterBytes(4 * 2 * 4 * (16 + 24), 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fraction": 1.5}, r"expected fraction in \[0, 1\] and 1 <= low_rank <= rank, got 1.5, 2, 4"),
        ({"low_rank": 5}, "1 <= low_rank <= rank"),
        ({"score": "magnitude"}, "score must be 'taylor' or 'fisher'"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_plans_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_ranks_one_shot(loss_fn, params(), **{"batches": batches(), "rank": 4, **settings})


def test_settings_out_of_range_raise():
    with pytest.raises(ValueError, match=r"deactivation must be in \[0, 1\), got 1"):
        ce_ssl(deactivation=1)
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        ce_ssl(0)


# ---- the semi-supervised step -------------------------------------------------------------------------------------


def encoder(w, x):
    """A layer with batch normalisation in training, and its new statistics."""
    h = x @ w
    mean, var = jnp.mean(h, (0, 1)), jnp.var(h, (0, 1))
    return (h - mean) / jnp.sqrt(var + 1e-5), (mean, var)


def test_unlabelled_samples_reach_the_statistics_only():
    w, v = array(0, 3, 5), array(1, 5, 2)
    labelled, unlabelled = array(2, 4, 10, 3), array(3, 6, 10, 3) + 2

    def step(labelled, unlabelled):
        return concat_batches(lambda x: encoder(w, x), lambda h: jnp.mean(h, 1) @ v, labelled, unlabelled)

    logits, statistics = step(labelled, unlabelled)
    features, expected = encoder(w, jnp.concatenate([labelled, unlabelled]))
    assert_close((logits, statistics), (jnp.mean(features[:4], 1) @ v, expected))
    alone, _ = step(labelled, unlabelled[:0])
    assert_close(alone, jnp.mean(encoder(w, labelled)[0], 1) @ v)  # no unlabelled samples: supervised training
    assert float(jnp.max(jnp.abs(alone - logits))) > 0.1

    def direct(unlabelled):  # statistics held fixed: what is left is the way through the head
        def fixed(x):
            mean, var = lax.stop_gradient(expected)
            return (x @ w - mean) / jnp.sqrt(var + 1e-5), None

        return jnp.sum(concat_batches(fixed, lambda h: jnp.mean(h, 1) @ v, labelled, unlabelled)[0] ** 2)

    assert not np.any(jax.grad(direct)(unlabelled))
    assert np.any(jax.grad(lambda u: jnp.sum(step(labelled, u)[0] ** 2))(unlabelled))


def test_cutmix_moves_one_stretch_and_its_share_of_the_label():
    n, time = 6, 50
    x = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32)[:, None, None], (n, time, 2))
    y = jnp.eye(n)
    run, shares = jax.jit(cutmix), []
    for seed in range(15):
        mixed, labels = run(jax.random.key(seed), x, y)
        mixed, labels = np.asarray(mixed), np.asarray(labels)
        foreign = mixed != np.asarray(x)
        assert np.array_equal(foreign[..., 0], foreign[..., 1])
        for i in range(n):
            at = np.flatnonzero(foreign[i, :, 0])
            partner = int(mixed[i, at[0], 0]) if at.size else i
            assert np.all(mixed[i, at, 0] == partner)
            assert at.size == 0 or at[-1] - at[0] + 1 == at.size
            expected = np.zeros(n)
            expected[i] += 1 - at.size / time
            expected[partner] += at.size / time
            np.testing.assert_allclose(labels[i], expected, atol=1e-6)
        shares.append(foreign[..., 0].mean())
    assert 0.2 < np.mean(shares) < 0.6 and np.std(shares) > 0.1
    with pytest.raises(TypeError, match="floating-point labels"):
        cutmix(jax.random.key(0), x, jnp.arange(n))
