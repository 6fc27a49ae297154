"""StreamingLLM's mask, Linformer, ALISA and SpargeAttn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import (
    alisa_mask,
    attend,
    linformer_attention,
    linformer_init,
    masks,
    sparge_select,
)
from tests.attention.naive import causal, naive, operands, same, weights
from tests.random_views import array


def test_streaming_llm_is_sinks_and_a_window():
    mask = (masks.sink(4) | masks.window(1023, 0)) & masks.causal()
    table = np.asarray(mask.table(1500, 1500))[0, 0]
    assert table.sum(-1).tolist() == [min(i + 1, 1024 + min(4, max(0, i - 1023))) for i in range(1500)]
    assert table[1400, :4].all() and not table[1400, 4:377].any() and table[1400, 377:1401].all()


def test_linformer():
    q, k, v = operands(12, 20)
    E, F = array(5, 2, 24, 6), array(6, 24, 6)

    def expected(q, k, v, E, F):
        k, v = jnp.einsum("bthd,htr->brhd", k, E[:, :20]), jnp.einsum("bthd,tr->brhd", v, F[:20])
        return naive(q, k, v, np.ones((12, 6), bool))

    same(linformer_attention, expected, q, k, v, E, F)
    dense = jax.jit(naive)(q, k, v, np.ones((12, 20), bool))
    basis = jnp.linalg.qr(array(7, 20, 20))[0]
    ranks = [jnp.eye(20), basis[:, :4], basis[:, :12]]
    run = jax.jit(lambda m: linformer_attention(q, k, v, m, m, implementation="reference"))
    equal, *errors = [float(jnp.linalg.norm(run(m) - dense)) for m in ranks]
    assert equal < 1e-4 < errors[1] < errors[0]
    E, F = linformer_init(jax.random.key(0), 24, 16)
    assert E.shape == F.shape == (24, 16) and 0.2 < jnp.abs(E).max() <= 0.25 and (E != F).any()
    with pytest.raises(ValueError, match="rank"):
        linformer_attention(q, k, v, E[:19], F)
    with pytest.raises(ValueError, match="mixtures"):
        linformer_attention(q, k, v, E, F, mask=masks.causal())


def test_alisa_keeps_the_window_and_the_heaviest_keys():
    q, k, v = operands(40)
    k = k.at[:, 7].mul(4).at[:, 19].mul(4)
    choose = jax.jit(functools.partial(alisa_mask, local=5, heavy=3), static_argnames="rows")
    for rows in (None, 16):
        mask = choose(q, k, rows=rows)
        asked = jax.jit(weights)(q, k, causal(40, 40))[:, :, 0 if rows is None else -rows :]
        sums = np.asarray(asked.sum(2).reshape(2, 2, 2, 40).sum(2))
        heavy = np.zeros((2, 2, 40), bool)
        np.put_along_axis(heavy, np.argsort(-sums)[..., :3], True, -1)
        near = np.arange(40) > np.arange(40)[:, None] - 5
        table = (heavy.repeat(2, 1)[:, :, None] | near) & causal(40, 40)
        assert (np.asarray(mask.table(40, 40)).repeat(2, 1) == table).all()
    sparse = lambda *a: attend(*a, mask=choose(*a[:2], rows=16), implementation="reference")  # noqa: E731
    same(sparse, lambda *a: naive(*a, table), q, k, v)
    share = np.asarray(jax.jit(weights)(q, k, causal(40, 40)))
    other = near | np.isin(np.arange(40), (1, 11, 30))
    assert ((share * table).sum((2, 3)) > (share * other).sum((2, 3))).all()


NAMES = ("tau", "theta", "max_blocks")


def test_sparge_keeps_the_predicted_mass_and_what_is_unlike_its_mean():
    q, k = (jnp.repeat(x[:, ::8], 8, 1) + 0.05 * x for x in operands(64)[:2])
    k = k.at[:, 24:32].set(array(9, 2, 8, 2, 8))
    q = q.at[:, 40:48].set(array(8, 2, 8, 4, 8))
    select = jax.jit(functools.partial(sparge_select, blocks=(8, 8), mask=masks.causal()), static_argnames=NAMES)
    found, overflow = select(3 * q, k, tau=0.7, theta=0.8)
    found = np.asarray(found)
    low = np.tril(np.ones((8, 8), bool))
    assert not overflow.any() and not found[..., ~low].any()
    assert found[..., 3][..., 3:].all() and found[:, :, 5, :6].all()  # blocks that are unlike their mean
    assert 0.3 < found[..., low].mean() < 0.9
    share = np.asarray(jax.jit(weights)(3 * q, k, causal(64, 64))) * found.repeat(8, 2).repeat(8, 3)
    assert (share.sum((2, 3)) / 64 > 0.6).all()
    assert (np.asarray(select(q, k, tau=1.0, theta=-1.0)[0]) == low).all()
    few, overflow = select(q, k, tau=0.9, theta=-1.0, max_blocks=1)
    assert (few.sum(-1) == 1).all() and overflow.any()
