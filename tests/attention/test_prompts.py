"""MInference's patterns and Video-XL-2's chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import (
    attend,
    choose_pattern,
    make_block_mask,
    masks,
    vertical_slash,
    video_layout,
    video_xl_attention,
    video_xl_mask,
)
from tests.attention.naive import causal, naive, operands, same, weights
from tests.random_views import array


def test_vertical_slash_is_what_the_last_queries_attend_to():
    s, t, rows, size = 48, 56, 8, (8, 4)
    q, k, v = operands(s, t, b=1)
    k = k.at[:, 0].mul(6)  # a sink: far diagonals hold no more than one query each has for it
    mask = jax.jit(lambda q, k: vertical_slash(q, k, 3, 2, size=size, rows=rows))(q, k)
    share = np.asarray(jax.jit(weights)(q, k, causal(s, t)))[:, :, -rows:]
    distance = np.arange(t - rows, t)[:, None] - np.arange(t)
    slash = np.stack([share[:, :, distance == d].sum(-1) for d in range(t)], -1)
    slash[..., 0] = np.inf
    table = np.zeros((1, 4, s, t), bool)
    every = np.arange(s)[:, None] + t - s - np.arange(t)
    for h in range(4):
        table[0, h, :, np.argsort(-share.sum(2)[0, h])[:3]] = True
        for d in np.argsort(-slash[0, h])[:2]:
            passed = (every == d).reshape(6, 8, 14, 4).any((1, 3))
            table[0, h] |= passed.repeat(8, 0).repeat(4, 1)
    table &= causal(s, t)
    assert (np.asarray(mask.table(s, t)) == table).all() and table.any(-1).all()
    same(
        lambda *a: attend(*a, mask=mask, blocks=size, implementation="reference"),
        lambda *a: naive(*a, table),
        q,
        k,
        v,
    )
    whole = jax.jit(lambda q, k: vertical_slash(q, k, 99, 99, size=size))(q, k)
    assert (np.asarray(whole.table(s, t)) == causal(s, t)).all()


def test_each_head_gets_the_pattern_that_keeps_most_at_equal_cost():
    s, size = 64, (16, 16)
    far = np.asarray(array(0, s, 8))
    near = np.stack([np.cos(np.outer(np.arange(s), [0.2, 0.5])), np.sin(np.outer(np.arange(s), [0.2, 0.5]))], -1)
    near = near.reshape(s, 4)
    k = np.concatenate([near, 0 * far[:, :4]], -1)
    k[[5, 21], 4:] = 1
    q = np.zeros((s, 2, 8))
    q[:, 0, :4] = 9 * near  # what is near
    q[:, 1, 4:] = 9  # two keys, wherever the query is
    q, k = (jnp.asarray(x, jnp.float32)[None] for x in (q, k[:, None]))
    a_shape = (masks.sink(1) | masks.window(7, 0)) & masks.causal()
    patterns = [a_shape, masks.columns([5, 21]) & masks.causal()]

    @jax.jit
    def choose(q, k):
        return choose_pattern(q, k, patterns, blocks=size), vertical_slash(q, k, 2, 1, size=size)

    (chosen, kept), two = choose(q, k)
    assert chosen.tolist() == [0, 1] and (kept[[0, 1], [0, 1]] > 0.5).all()
    mask = masks.heads([a_shape, two], chosen)
    table = np.asarray(mask.table(s, s))
    assert table[0, 1, 40:, 5].all() and not table[0, 0, 40:, 5].any()
    with pytest.raises(ValueError, match="at least one"):
        choose_pattern(q, k, [])


LAYOUT = {"before": 5, "units": 7, "after": 6, "time": 2, "visual": 6, "block_size": 2}


def video_table(previous):
    """Returns the rule of Video-XL-2's prefill, token by token."""
    kind = ["text"] * 5 + (["time"] * 2 + ["visual"] * 6) * 7 + ["text"] * 6
    chunk = [0] * 5 + [u // 2 for u in range(7) for _ in range(8)] + [0] * 6
    table = np.zeros((len(kind),) * 2, bool)
    for q, k in np.ndindex(table.shape):
        near = chunk[q] - previous <= chunk[k]
        table[q, k] = k <= q and (kind[q] != "visual" or kind[k] != "visual" or near)
    return table


def test_chunks_of_a_video():
    layout = video_layout(**LAYOUT)
    table = video_table(1)
    n = len(table)
    mask = video_xl_mask(layout, 1)
    assert (np.asarray(mask.table(n, n)) == table).all()
    assert mask.density(n, n) * n * n / (n * (n + 1) / 2) == pytest.approx(table.sum() / causal(n, n).sum())
    assert (np.asarray(video_xl_mask(layout, 99).table(n, n)) == causal(n, n)).all()
    fn = functools.partial(video_xl_attention, layout=layout, previous=1, blocks=(32, 8))
    same(fn, lambda *a: naive(*a, table), *operands(n))
    with pytest.raises(ValueError, match="dropout"):
        video_xl_attention(*operands(n), layout, dropout=0.1)
    with pytest.raises(ValueError, match="66 tokens"):
        video_xl_attention(*operands(66), layout)


def test_chunks_far_away_are_skipped_but_for_timestamps():
    layout = video_layout(0, 256, 0, time=8, visual=56)
    whole = make_block_mask(video_xl_mask(layout, 1), 16384, 16384)
    apart = make_block_mask(video_xl_mask(layout._replace(times=layout.times[:0]), 1), 16384, 16384)
    assert apart.density < 0.05 and whole.density > 0.5
