"""Transforms by factor: labels, patterns and LoRA+."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import adapters
from tests.random_views import array, assert_close


def theta():
    return {
        "layers/q_proj/kernel": {"a": array(0, 2, 6, 3), "b": array(1, 2, 3, 4), "m": array(2, 2, 4)},
        "embed/embedding": {"a": array(3, 9, 3), "b": array(4, 3, 6)},
    }


GRADS = jax.tree.map(lambda x: jnp.cos(3 * x), theta())


def test_labels_are_factor_names():
    assert adapters.labels(theta()) == {
        "layers/q_proj/kernel": {"a": "a", "b": "b", "m": "m"},
        "embed/embedding": {"a": "a", "b": "b"},
    }
    tx = optax.multi_transform({"a": optax.set_to_zero(), "b": optax.sgd(1.0), "m": optax.sgd(2.0)}, adapters.labels)
    updates = tx.update(GRADS, tx.init(theta()))[0]["layers/q_proj/kernel"]
    expected = GRADS["layers/q_proj/kernel"]
    assert not np.any(updates["a"])
    assert_close((updates["b"], updates["m"]), (-expected["b"], -2 * expected["m"]))


def steps(tx, count=3):
    def step(carry, _):
        p, state = carry
        updates, state = tx.update(GRADS, state, p)
        return (optax.apply_updates(p, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=count)[0][0])(theta())


@pytest.mark.parametrize("scheduled", [False, True])
def test_lora_plus_is_one_optimizer_per_rate(scheduled):
    lr = optax.linear_schedule(1e-2, 0.0, 5) if scheduled else 1e-2
    fast = (lambda step: 8 * lr(step)) if scheduled else 8e-2
    factory = lambda lr: optax.adamw(lr, weight_decay=0.1)  # noqa: E731
    actual = steps(adapters.lora_plus(factory, lr, 8.0, embedding_lr=1e-3))
    slow, fast, embedding = (steps(factory(rate)) for rate in (lr, fast, 1e-3))
    expected = {
        "layers/q_proj/kernel": {name: (slow if name == "a" else fast)["layers/q_proj/kernel"][name] for name in "abm"},
        "embed/embedding": embedding["embed/embedding"],
    }
    assert_close(actual, expected)
    whole = steps(adapters.lora_plus(factory, lr, 1.0, embedding_lr=lr))
    assert_close(whole, slow)  # with a ratio of 1 it is the optimizer itself


def test_patterns_choose_transforms():
    tx = adapters.by_label({"**/embedding/*": optax.set_to_zero(), "**/{b,m}": optax.sgd(0.5), "**": optax.sgd(0.1)})
    updates = tx.update(GRADS, tx.init(theta()), theta())[0]
    assert not any(np.any(leaf) for leaf in updates["embed/embedding"].values())
    rates = {"a": 0.1, "b": 0.5, "m": 0.5}
    assert_close(
        updates["layers/q_proj/kernel"],
        {name: -rates[name] * grad for name, grad in GRADS["layers/q_proj/kernel"].items()},
    )
    with pytest.raises(ValueError, match=r"matches layers/q_proj/kernel/m; add '\*\*'"):
        adapters.by_label({"**/a": optax.sgd(0.1), "**/b": optax.sgd(0.1)}).init(theta())
    with pytest.raises(ValueError, match=r"pattern '\*\*/z' matches no leaf"):
        adapters.by_label({"**/z": optax.sgd(0.1), "**": optax.sgd(0.1)}).init(theta())
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        adapters.lora_plus(optax.sgd, 0.1, 0.5)
