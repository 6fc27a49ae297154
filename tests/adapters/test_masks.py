"""Pruning, bit masks, and optimizers that respect them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import adapters, codecs, weights
from memjax.core.bytes import nbytes
from tests.random_views import array


def params():
    return {"layers": {"kernel": array(0, 2, 12, 10)}, "head": {"kernel": array(1, 12, 5), "bias": array(2, 5)}}


def bools(masks, tree):
    leaves = {"layers/kernel": tree["layers"]["kernel"], "head/kernel": tree["head"]["kernel"]}
    return {path: np.asarray(adapters.unpack_mask(bits, leaves[path].shape[-1])) for path, bits in masks.items()}


def test_unstructured_pruning_takes_the_smallest_of_every_matrix():
    dense = params()
    pruned, masks = adapters.prune(dense, 0.75)
    assert nbytes(masks) == 2 * 12 * 2 + 12  # ceil(n / 8) bytes a row
    for path, keep in bools(masks, dense).items():
        w = np.asarray(dense[path.split("/")[0]]["kernel"])
        for matrix, kept in zip(w.reshape(-1, *w.shape[-2:]), keep.reshape(-1, *w.shape[-2:])):
            assert kept.sum() == round(0.25 * matrix.size)
            assert np.abs(matrix[kept]).min() > np.abs(matrix[~kept]).max()
        np.testing.assert_array_equal(pruned[path.split("/")[0]]["kernel"], np.where(keep, w, 0))
    assert pruned["head"]["bias"] is dense["head"]["bias"]
    np.testing.assert_array_equal(adapters.prune(dense, 0.0)[0]["head"]["kernel"], dense["head"]["kernel"])


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:3", 1, 3)])
def test_n_of_every_m_inputs_stay(pattern, n, m):
    dense = params()
    keep = bools(jax.jit(lambda tree: adapters.prune(tree, pattern)[1])(dense), dense)["layers/kernel"]
    groups = keep.reshape(2, 12 // m, m, 10)
    np.testing.assert_array_equal(groups.sum(2), n)
    w = np.abs(dense["layers"]["kernel"]).reshape(groups.shape)
    assert (np.where(groups, w, np.inf).min(2) > np.where(groups, 0, w).max(2)).all()


def test_groups_run_along_the_named_inputs_and_a_score_decides():
    w = array(0, 6, 8)
    along = jax.jit(lambda w: adapters.prune({"w": w}, "2:4", "w", axes={"w": (-1, -2)})[1]["w"])
    kept = adapters.unpack_mask(along(w), 8)
    np.testing.assert_array_equal(np.asarray(kept).reshape(6, 2, 4).sum(-1), 2)
    rms = jnp.where(jnp.arange(8) < 4, 100.0, 1.0)
    by_score = jax.jit(lambda w: adapters.prune({"w": w}, 0.5, "w", score=lambda path, w: jnp.abs(w) * rms)[0]["w"])(w)
    assert np.all(by_score[:, :4] != 0) and not np.any(by_score[:, 4:])


def test_pruning_more_keeps_what_was_pruned():
    dense = params()
    fewer, masks = adapters.prune(dense, "2:4", "layers/kernel", fraction=0.5)
    keep = bools(masks, dense)["layers/kernel"]
    pruned = keep.reshape(2, 3, 4, 10).sum(2) == 2
    np.testing.assert_array_equal(pruned.sum((1, 2)), 15)
    more = adapters.prune(array_like(fewer), "2:4", "layers/kernel", fraction=0.8, masks=masks)[1]
    again = bools(more, dense)["layers/kernel"]
    assert not (again & ~keep).any()
    np.testing.assert_array_equal((again.reshape(2, 3, 4, 10).sum(2) == 2).sum((1, 2)), 24)
    fewer = adapters.prune(array_like(dense), "2:4", "layers/kernel", fraction=0.1, masks=masks)[1]
    np.testing.assert_array_equal(bools(fewer, dense)["layers/kernel"], keep)
    _, masks = adapters.prune(dense, 0.3)
    for amount in (0.6, 0.1):
        more = adapters.prune(array_like(dense), amount, masks=masks)[1]
        for path, keep in bools(masks, dense).items():
            assert not (bools(more, dense)[path] & ~keep).any()


def array_like(tree):
    """Returns other weights of the same shapes."""
    return jax.tree.map(lambda w: array(7, *w.shape), tree)


def loss(p, x):
    return jnp.mean(
        jnp.square(
            jnp.tanh(jnp.tanh(x @ p["layers"]["kernel"][0]) @ jnp.ones((10, 12)) / 10) @ p["head"]["kernel"]
            + p["head"]["bias"]
            - 1
        )
    )


def train(tx, p, steps):
    state = tx.init(p)

    def step(carry, x):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p, x), state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    return jax.jit(lambda p, state, xs: jax.lax.scan(step, (p, state), xs))(p, state, array(3, steps, 4, 12))


def test_masked_entries_stay_exactly_zero_through_100_steps():
    p, masks = adapters.prune(params(), 0.75)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.05, weight_decay=0.1), adapters.masked_updates(masks)
    )
    _, path = train(tx, p, 100)
    assert np.abs(np.asarray(path["head"]["kernel"][-1] - p["head"]["kernel"])).max() > 0.1
    for name, keep in bools(masks, p).items():
        w = np.asarray(path[name.split("/")[0]]["kernel"])
        assert not w[:, ~keep].any()
    # Weights that a new mask prunes go to exactly zero in one step, whatever they were.
    _, path = train(tx, params(), 1)
    assert not np.asarray(path["head"]["kernel"])[0][~bools(masks, p)["head/kernel"]].any()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_gradual_masks_follow_the_schedule(pattern):
    schedule = adapters.cubic(0.79, 10, 50)
    tx = optax.chain(optax.adamw(0.01), adapters.gradual(schedule, pattern=pattern, every=10))
    (_, state), path = train(tx, params(), 60)
    w = np.asarray(path["head"]["kernel"])
    pruned = w == 0
    assert not (pruned[:-1] & ~pruned[1:]).any()
    counts = pruned.reshape(60, -1).sum(1)
    for step in (0, 10, 20, 30, 40, 59):
        share = 0.79 - 0.79 * (1 - np.clip((step // 10 * 10 - 10) / 40, 0, 1)) ** 3
        assert counts[step] == (round(share * 60) if pattern is None else 2 * round(share * 15)), step
    assert nbytes(state[1].masks) == 2 * 12 * 2 + 12
    if pattern:
        assert set((w[-1].reshape(3, 4, 5) == 0).sum(1).ravel()) == {0, 2}


def test_refusals():
    p = params()
    for amount in (1.0, -0.1, "4:2", "2x4"):
        with pytest.raises(ValueError, match="expected a"):
            adapters.prune(p, amount)
    with pytest.raises(ValueError, match="head/kernel: groups of 5 do not divide the 12 inputs"):
        adapters.prune(p, "2:5", "head/kernel")
    for prune in (adapters.prune, lambda p, _, **settings: adapters.gradual(lambda _: 0.5, **settings).init(p)):
        with pytest.raises(ValueError, match="pattern 'tail' matches no leaf"):
            prune(params(), 0.5, axes={"tail": (0, 1)})
    with pytest.raises(ValueError, match="is for 'n:m' patterns"):
        adapters.prune(p, 0.5, fraction=0.5)
    with pytest.raises(TypeError, match="head/kernel: expected a dense array"):
        adapters.prune(weights.quantize(p, codecs.int4(group=4), "head/kernel"), 0.5, "head/kernel")
    with pytest.raises(ValueError, match="no leaf of the trained tree"):
        adapters.masked_updates({"tail": jnp.zeros(1, jnp.uint8)}).init(p)
    with pytest.raises(ValueError, match="expected mask bits"):
        adapters.masked_updates({"head/kernel": jnp.ones((12, 5), bool)}).init(p)
    with pytest.raises(ValueError, match="0 <="):
        adapters.cubic(0.5, 10, 10)
