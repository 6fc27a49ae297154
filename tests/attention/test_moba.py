"""MoBA: the tokens' own choice of chunks, against a table of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import attend, masks, moba_attention
from memjax.attention.moba import moba_chunks
from tests.attention.naive import causal, naive, operands, same, shapes_of


def table(q, k, chunk, top_k):
    """Returns what MoBA shows each query of each head."""
    (B, s, H, _), t = q.shape, k.shape[1]
    k = np.repeat(np.asarray(k), H // k.shape[2], 2)
    found = np.zeros((B, H, s, t), bool)
    for b, h, i in np.ndindex(B, H, s):
        own = (i + t - s) // chunk
        gates = [np.dot(q[b, i, h], k[b, c * chunk : (c + 1) * chunk, h].mean(0)) for c in range(own)]
        for c in [own, *np.argsort(gates)[::-1][: top_k - 1]]:
            found[b, h, i, c * chunk : (c + 1) * chunk] = True
    return found & causal(s, t)


CASES = [(48, 48, 8, 3, (16, 8), "xla"), (30, 41, 16, 2, None, "reference")]


@pytest.mark.parametrize("s,t,chunk,top_k,blocks,how", CASES)
def test_naive_reference(s, t, chunk, top_k, blocks, how):
    q, k, v = operands(s, t)
    shown = table(q, k, chunk, top_k)
    moba = lambda *a: moba_attention(*a, chunk=chunk, top_k=top_k, blocks=blocks, implementation=how)  # noqa: E731
    same(moba, lambda *a: naive(*a, shown), q, k, v)


def test_all_chunks_are_causal_attention_and_rows_are_chosen_in_tiles(monkeypatch):
    q, k, v = operands(40)

    @jax.jit
    def both(*args):
        dense = attend(*args, mask=masks.causal(), blocks=(16, 8))
        return moba_attention(*args, chunk=8, top_k=5, blocks=(16, 8)), dense

    np.testing.assert_array_equal(*both(q, k, v))
    chunks = lambda: jax.jit(lambda q, k: moba_chunks(q, k, chunk=8, top_k=2))(q, k)  # noqa: E731
    whole = chunks()
    monkeypatch.setattr("memjax.attention.select._ROWS", 16)
    assert (chunks() == whole).all()


def test_no_program_holds_all_scores():
    s = 16384
    shapes = [jax.ShapeDtypeStruct((1, s, n, 64), jnp.bfloat16) for n in (2, 1, 1)]
    fn = jax.grad(lambda *a: moba_attention(*a, chunk=512).astype(jnp.float32).sum(), (0, 1, 2))
    assert max(shapes_of(fn, *shapes)) < s * s / 100


def test_no_gradient_flows_through_the_gate():
    q, k, _ = operands(32)
    gates = lambda q, k: moba_chunks(q, k, chunk=8, top_k=2).astype(jnp.float32).sum()  # noqa: E731
    assert all((g == 0).all() for g in jax.jit(jax.grad(gates, (0, 1)))(q, k))
    with pytest.raises(ValueError, match="top_k"):
        moba_attention(q, k, k, chunk=8, top_k=0)
