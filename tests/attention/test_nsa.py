"""NSA: three gated branches against a naive reference, and which blocks are selected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import nsa_attention, nsa_init
from memjax.attention.nsa import nsa_blocks
from tests.attention.naive import causal, naive, operands, same, shapes_of, weights
from tests.random_views import array

SIZES = {"stride": 4, "block": 16, "top_n": 4, "window": 9}
LENGTH, C = 8, 5


def parameters(dim=8, value_dim=12):
    params = nsa_init(jax.random.key(0), features=C, heads=4, dim=dim, value_dim=value_dim, length=LENGTH)
    return params._replace(gate=array(8, C, 4, 3), gate_bias=array(9, 4, 3))


def compressed(network, x, n):
    parts = [x[:, i * 4 : i * 4 + LENGTH] + network.position[:, None] for i in range(n)]
    flat = jnp.stack([part.swapaxes(1, 2).reshape(*x.shape[:1], x.shape[2], -1) for part in parts], 1)
    return jax.nn.gelu(flat @ network.hidden + network.bias) @ network.out


def selected(q, small, t):
    """Returns the keys in the blocks that the importance formula selects, by loops over what overlaps."""
    s, n = q.shape[1], small.shape[1]
    seen = np.arange(n) * 4 + LENGTH - 1 <= np.arange(s)[:, None] + t - s
    p = np.asarray(jax.jit(weights)(q, small, seen)).reshape(2, 2, 2, s, n).sum(2)
    table = np.zeros((2, 2, s, t), bool)
    for b, h, i in np.ndindex(2, 2, s):
        own = (i + t - s) // 16
        share = np.zeros(own + 1)
        for j in range(own + 1):
            for m in range(4):
                share[j] += sum(p[b, h, i, 4 * j + m - o] for o in range(2) if 0 <= 4 * j + m - o < n)
        share[[0, max(0, own - 1), own]] = np.inf
        for j in np.argsort(-share, kind="stable")[:4]:
            table[b, h, i, 16 * j : 16 * (j + 1)] = True
    return table & causal(s, t)


@pytest.mark.parametrize("s,t", [(40, 102), pytest.param(96, 96, marks=pytest.mark.slow)])
def test_naive_reference(s, t):
    q, k, v = operands(s, t)
    x, params, n = array(5, 2, s, C), parameters(), (t - LENGTH) // 4 + 1
    seen = np.arange(n) * 4 + LENGTH - 1 <= np.arange(s)[:, None] + t - s
    small = jax.jit(compressed, static_argnums=2)(params.key, k, n)
    chosen = selected(q, small, t).repeat(2, 1)
    assert chosen[..., -1, :].sum(-1).max() < t
    near = causal(s, t) & (np.arange(t) > np.arange(s)[:, None] + t - s - 9)

    def expected(params, x, q, k, v):
        small = compressed(params.key, k, n), compressed(params.value, v, n)
        branches = naive(q, *small, seen), naive(q, k, v, chosen), naive(q, k, v, near)
        gates = jax.nn.sigmoid(jnp.einsum("bsc,chn->bshn", x, params.gate) + params.gate_bias)
        return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))

    fn = lambda *a: nsa_attention(*a, **SIZES, blocks=(32, 16), implementation="reference")  # noqa: E731
    _, gradients = same(fn, expected, params, x, q, k, v, tolerance=1e-4)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_all_blocks_and_a_wide_window_are_causal_attention():
    q, k, v = operands(24, 24)
    params = parameters()._replace(gate=jnp.zeros((C, 4, 3)), gate_bias=jnp.asarray([[-99.0, 0, 0]] * 4))
    fn = jax.jit(functools.partial(nsa_attention, stride=4, block=16, top_n=4, window=24))
    out = fn(params, jnp.zeros((2, 24, C)), q, k, v)
    np.testing.assert_allclose(out, naive(q, k, v, causal(24, 24)), 1e-5, 1e-5)
    short = functools.partial(nsa_attention, stride=4, block=16, window=5, implementation="reference")
    found = jax.jit(short)(params, jnp.zeros((2, 5, C)), q[:, :5], k[:, :5], v[:, :5])
    np.testing.assert_allclose(found, out[:, :5], 1e-5, 1e-5)
    with pytest.raises(ValueError, match="must divide"):
        nsa_attention(params, jnp.zeros((2, 24, C)), q, k, v, stride=3)


def test_no_program_holds_all_scores():
    s = 16384
    q, k, v, x = (jax.ShapeDtypeStruct((1, s, *n), jnp.bfloat16) for n in ((2, 64), (1, 64), (1, 64), (64,)))
    params = jax.eval_shape(lambda: nsa_init(jax.random.key(0), features=64, heads=2, dim=64))
    fn = jax.grad(lambda *a: nsa_attention(*a).astype(jnp.float32).sum(), tuple(range(5)))
    assert max(shapes_of(fn, params, x, q, k, v)) < s * s / 100


def test_heads_of_a_group_share_what_attends_most():
    small = jnp.zeros((1, 15, 1, 4)).at[0, 9, 0].set(9.0)
    q = jnp.stack([jnp.ones((64, 4)), -jnp.ones((64, 4)) * 0.1], 1)[None]
    select = jax.jit(
        functools.partial(nsa_blocks, length=8, stride=4, block=8, top_n=3, always=(1, 1), scale=1.0), static_argnums=2
    )
    chosen = select(q, small, 64)
    assert chosen.shape == (1, 1, 64, 3) and set(np.asarray(chosen)[0, 0, 63].tolist()) == {0, 7, 4}
