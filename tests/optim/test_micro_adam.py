"""MicroAdam: beside a transcription, its limit cases, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, optim
from memjax.core import nbytes

SHAPE, DENSITY, WINDOW, GROUP = (40, 120), 0.05, 3, 64
OPTIONS = {"density": DENSITY, "window": WINDOW, "group": GROUP}


def gradient(step):
    rng = np.random.default_rng(step)
    return (rng.normal(size=SHAPE) * np.exp(rng.normal(size=SHAPE))).astype(np.float32)


def quantized(x):
    return np.asarray(codecs.int4(GROUP, symmetric=False).encode(jnp.asarray(x), -1).decode())


def test_fifty_steps_are_those_of_a_transcription():
    tx = optim.scale_by_micro_adam(**OPTIONS)
    state = tx.init({"w": jnp.zeros(SHAPE)})
    step = jax.jit(tx.update)
    block = 4800
    k = int(np.ceil(block * DENSITY))
    error, window = np.zeros(block, np.float32), []
    for t in range(1, 51):
        updates, state = step({"w": jnp.asarray(gradient(t))}, state)
        whole = gradient(t).reshape(-1) + error
        places = np.argsort(-np.abs(whole), kind="stable")[:k]
        window = [*window[-(WINDOW - 1) :], (places, np.float32(jnp.asarray(whole[places], jnp.bfloat16)))]
        rest = whole.copy()
        rest[places] = 0
        error = quantized(rest)
        m, v = np.zeros(block), np.zeros(block)
        for age, (where, values) in enumerate(reversed(window)):
            m[where] += 0.1 * 0.9**age * values
            v[where] += 0.001 * 0.999**age * values.astype(np.float64) ** 2
        expected = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        if t in (1, 7, 50):
            found = np.asarray(updates["w"]).reshape(-1)
            same = np.abs(found - expected) < 1e-5 * np.maximum(np.abs(expected), 1)
            # Where rounding of the error parts, few other elements are the largest.
            assert same.mean() > 0.995, (t, same.mean())
            assert ((found != 0).sum() <= WINDOW * k) and (found != 0).sum() >= k


def test_density_one_and_the_whole_window_are_adam():
    """With every element taken nothing is left out, and a window longer than the run forgets nothing."""
    tx = optim.scale_by_micro_adam(density=1.0, window=4, group=GROUP)
    state = tx.init({"w": jnp.zeros(SHAPE)})
    m = v = 0.0
    for t in range(1, 4):
        g = np.asarray(jnp.asarray(gradient(t), jnp.bfloat16), np.float32)
        updates, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.astype(np.float64) ** 2
        expected = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-6)
    assert (state.leaves["w"].error.decode() == 0).all()


def test_state_bytes_are_the_formula():
    params = {"w": jnp.zeros((200, 300)), "b": jnp.zeros(10)}
    state = optim.scale_by_micro_adam(window=10, group=256).init(params)
    blocks, block = 4, 15104  # 60000 elements in 4 blocks, each filled up to 59 groups
    expected = 4 + 80 + blocks * (block // 2 + block // 64 + 10 * 4 * 152)
    assert nbytes(state) == optim.micro_adam_state_bytes(params) == expected
    assert expected < 1.0 * 60000


def test_what_cannot_be_raises():
    for options in ({"density": 0.0}, {"window": 0}, {"group": 3}):
        with pytest.raises(ValueError, match="expected a density"):
            optim.scale_by_micro_adam(**options)
