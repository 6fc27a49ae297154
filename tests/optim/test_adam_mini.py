"""Adam-mini: its blocks, and what they reduce to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import optim
from memjax.core import nbytes

SHAPES = {"q": (2, 12, 8), "up": (2, 12, 10), "embed_tokens": {"embedding": (16, 12)}, "norm": (12,), "bias": (7,)}
RULES = {"q": 4, "up": "neuron"}


def tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) * np.exp(rng.normal(size=s)), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(tx, steps, change=lambda g: g):
    step = jax.jit(tx.update)
    state = tx.init(change(tree(0)))
    for t in range(steps):
        updates, state = step(change(tree(t + 1)), state)
    return updates, state


def transcript(g_of, steps, mean):
    m, v = 0.0, 0.0
    for t in range(1, steps + 1):
        g = np.asarray(g_of(t), np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * mean(g**2)
    return m / (1 - 0.9**steps) / (np.sqrt(v / (1 - 0.999**steps)) + 1e-8)


def test_fifty_steps_are_those_of_a_transcription():
    updates, state = run(optim.scale_by_adam_mini(rules=RULES), 50)

    def heads(square):
        per_head = square.reshape(2, 12, 4, 2).mean((1, 3), keepdims=True)
        return np.broadcast_to(per_head, (2, 12, 4, 2)).reshape(2, 12, 8)

    means = {
        "q": heads,
        "up": lambda x: x.mean(1, keepdims=True),
        "norm": lambda x: x.mean(keepdims=True),
        "bias": lambda x: x,
    }
    for name, mean in means.items():
        expected = transcript(lambda t, name=name: tree(t)[name], 50, mean)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    expected = transcript(lambda t: tree(t)["embed_tokens"]["embedding"], 50, lambda x: x.mean(1, keepdims=True))
    np.testing.assert_allclose(updates["embed_tokens"]["embedding"], expected, rtol=1e-5, atol=1e-6)
    blocks = 2 * 4 + 2 * 10 + 16 + 1 + 7
    elements = sum(leaf.size for leaf in jax.tree.leaves(tree(0)))
    assert nbytes(state) == optim.adam_mini_state_bytes(tree(0), RULES) == 4 + 4 * elements + 4 * blocks


def test_blocks_of_one_element_are_adam():
    updates, _ = run(optim.scale_by_adam_mini(rules={"**": "element"}), 3)
    expected, _ = run(optax.scale_by_adam(), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updates, expected)


def test_heads_in_another_order_move_in_that_order():
    order = np.array([2, 0, 3, 1])
    only = {"q": 4}

    def moved(g):
        return {"q": g["q"].reshape(2, 12, 4, 2)[:, :, order].reshape(2, 12, 8)}

    plain, _ = run(optim.scale_by_adam_mini(rules=only), 2, lambda g: {"q": g["q"]})
    permuted, _ = run(optim.scale_by_adam_mini(rules=only), 2, moved)
    np.testing.assert_allclose(moved(plain)["q"], permuted["q"], rtol=1e-6)


def test_eight_bits_of_first_moment_take_a_byte():
    params = {"w": jnp.ones((64, 256))}
    tx = optim.adam_mini(1e-3, default="neuron", bits=8)
    assert optim.init_bytes(tx, params) == 4 + 64 * 256 + 4 * 64 + 4 * 256
    assert optim.adam_mini_state_bytes(params, bits=8) == optim.init_bytes(tx, params)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-5)


def test_what_is_not_said_warns_and_what_cannot_be_raises():
    with pytest.warns(UserWarning, match="blocks of up are: one per output"):
        optim.scale_by_adam_mini(rules={"q": 4}).init(tree(0))
    for rules, said in (({"q": 3}, "q: 3 heads"), ({"norm": "neuron"}, "norm"), ({"up": "column"}, "up: a block is")):
        with pytest.raises(ValueError, match=said):
            optim.scale_by_adam_mini(rules=rules, default="neuron").init(tree(0))
