"""Selections of blocks: what is chosen, what is always, how much mass they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import attend, block_scores, block_topk, make_block_mask, masks, recall, select_mass, select_topk
from memjax.attention.select import token_blocks
from tests.attention.naive import causal, naive, operands, same, weights
from tests.random_views import array


def test_scores_are_of_means_and_a_last_block_may_be_short():
    q, k, _ = operands(20, 26)
    run = jax.jit(block_scores, static_argnames=("blocks", "pool", "scale"))
    scores = run(q, k, blocks=(8, 4), mask=masks.causal())
    q, k = np.asarray(q), np.asarray(k)
    means = [np.stack([x[:, i : i + n].mean(1) for i in range(0, x.shape[1], n)], 1) for x, n in ((q, 8), (k, 4))]
    expected = np.einsum("bqhd,bkhd->bhqk", means[0], means[1].repeat(2, 2)) / 8**0.5
    seen = np.pad(causal(20, 26), ((0, 4), (0, 2))).reshape(3, 8, 7, 4).any((1, 3))
    np.testing.assert_allclose(scores, np.where(seen, expected, -jnp.inf), 1e-5, 1e-6)
    best = run(q, k, blocks=(20, 26), pool="max", scale=1.0)
    expected = np.einsum("bhd,bhd->bh", q.max(1), k.max(1).repeat(2, 1))
    np.testing.assert_allclose(best[..., 0, 0], expected, 1e-5)
    with pytest.raises(ValueError, match="pool must be"):
        block_scores(q, k, blocks=(8, 4), pool="sum")


def test_topk_takes_the_best_and_what_is_always_taken():
    scores = jnp.asarray([[5.0, 1, 2, 9, 3, 0], [1, 1, 1, 1, -jnp.inf, -jnp.inf], [-jnp.inf] * 6])
    choose = jax.jit(select_topk, static_argnums=1, static_argnames="always")
    found = choose(scores, 3)
    assert np.asarray(found).astype(int).tolist() == [[1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0] * 6]
    found = choose(scores, 4, always=(2, 1))
    assert np.asarray(found).astype(int).tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert (choose(scores, 99) == (scores > -jnp.inf)).all()
    with pytest.raises(ValueError, match="more than k=2"):
        select_topk(scores, 2, always=(2, 1))


def test_mass_is_reached_with_the_fewest_blocks_or_overflows():
    scores = array(0, 5, 9).at[3, 4:].set(-jnp.inf).at[4].set(-jnp.inf)
    run = jax.jit(select_mass, static_argnums=(1, 2))
    found, overflow = run(scores, 0.8, 9)
    share = np.nan_to_num(np.asarray(jax.nn.softmax(scores)))
    for row, chosen in zip(share, np.asarray(found)):
        best = np.sort(row)[::-1]
        assert chosen.sum() == (0 if row.sum() == 0 else 1 + (np.cumsum(best) < 0.8).sum())
        assert row[chosen].sum() >= 0.8 or row.sum() == 0
    assert not overflow.any()
    found, overflow = run(scores, 0.8, 2)
    assert (found.sum(-1) <= 2).all()
    assert overflow.tolist() == [bool(0 < np.sort(row)[-2:].sum() < 0.8) for row in share]
    assert (run(scores, 1.0, 9)[0] == (scores > -jnp.inf)).all()
    with pytest.raises(ValueError, match="tau"):
        select_mass(scores, 0.0, 2)


def concentrated(s=128, size=16):
    """Returns q and k of blocks that attend to one block each, and their own."""
    number = np.arange(s // size)
    code = np.eye(s // size, dtype=np.float32)
    key, query = code.repeat(size, 0), code[number * 5 % 8 * (number * 5 % 8 <= number)].repeat(size, 0)
    q, k = 12 * query + 3 * key, 4 * key
    noise = np.asarray(array(0, s, 8))
    return jnp.asarray(q + 0.1 * noise)[None, :, None], jnp.asarray(k + 0.1 * noise)[None, :, None]


def test_recall_is_the_share_of_weights_and_few_blocks_hold_concentrated_attention():
    q, k = concentrated()
    shown, table = masks.causal(), np.asarray(jax.jit(weights)(q, k, causal(128, 128)))

    @jax.jit
    def selections(q, k):
        scores = block_scores(q, k, blocks=(16, 16), mask=shown)
        kept = [block_topk(q, k, n, size=(16, 16)) for n in (2, 3, 8)]
        selected, overflow = select_mass(scores, 0.95, 8)
        return [*kept, masks.blocks(selected, 16)], overflow, recall(kept[1], q, k, blocks=(16, 16))

    kept, overflow, found = selections(q, k)
    oracle = table.reshape(8, 16, 8, 16).sum((1, 3)) / 16
    best = [np.sort(oracle)[:, ::-1][:, :n].sum(-1).mean() for n in (2, 3, 8)]
    share = [float((table * np.asarray(mask.table(128, 128))).sum() / 128) for mask in kept]
    np.testing.assert_allclose(found, share[1], 1e-5)
    assert share[0] < share[1] and share[1] > 0.99 * best[1] > 0.9 and share[2] == pytest.approx(1)
    assert kept[1].density(128, 128) < 0.55 * shown.density(128, 128)
    assert not overflow.any() and share[3] > 0.9


def test_blocks_of_highest_score_are_a_mask():
    q, k, v = operands(64)
    choose = jax.jit(functools.partial(block_topk, size=(16, 16)), static_argnames="n")
    table = np.asarray(choose(q, k, n=3).table(64, 64))
    scores = np.asarray(jax.jit(functools.partial(block_scores, blocks=(16, 16)))(q, k))
    for b, h in np.ndindex(2, 4):
        rows = table[b, h].reshape(4, 16, 4, 16).any((1, 3))
        assert (rows[:3] == np.tri(3, 4, dtype=bool)).all()
        assert set(np.nonzero(rows[3])[0]) == {0, 3, 1 + int(np.argmax(scores[b, h, 3, 1:3]))}
    few = lambda q, k, v: attend(q, k, v, mask=choose(q, k, n=3), blocks=(16, 16), implementation="reference")  # noqa: E731
    same(few, lambda *a: naive(*a, table), q, k, v)
    assert (np.asarray(choose(q, k, n=4).table(64, 64)) == causal(64, 64)).all()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _mask_and_lists(chosen, size, s, t, blocks):
    mask = token_blocks(chosen, size, t, blocks=blocks)
    return mask, make_block_mask(mask, s, t, blocks=blocks)


@pytest.mark.parametrize("size,blocks", [(16, (32, 8)), (8, (16, 32)), (16, (16, 16))])
def test_blocks_that_each_token_chooses(size, blocks):
    rng = np.random.default_rng(0)
    s, t, n = 40, 52, 3
    chosen = np.argsort(rng.random((2, 2, s, -(-t // size))))[..., :n].astype(np.int32)
    chosen[:, :, :16] = [0, 1, -1]
    mask, made = _mask_and_lists(jnp.asarray(chosen), size, s, t, blocks)
    table = (np.arange(t) // size == chosen[..., None]).any(-2)
    assert (np.asarray(mask.table(s, t)) == table).all()
    grid = np.pad(table, ((0, 0), (0, 0), (0, -s % blocks[0]), (0, -t % blocks[1])))
    grid = grid.reshape(2, 2, -(-s // blocks[0]), blocks[0], -(-t // blocks[1]), blocks[1])
    assert made.elements.bits is None and (np.asarray(made.by_query.total) == grid.any((3, 5)).sum(-1)).all()
    whole = np.pad(table, ((0, 0), (0, 0), (0, -s % blocks[0]), (0, 0)), constant_values=True)
    whole = np.pad(whole, ((0, 0), (0, 0), (0, 0), (0, -t % blocks[1]))).reshape(grid.shape).all((3, 5)).sum(-1)
    assert (np.asarray(made.by_query.full) == whole).all()
    with pytest.raises(ValueError, match="divide"):
        token_blocks(jnp.asarray(chosen), 12, t, blocks=blocks)
