"""Dropout from a counter: the same mask forward and backward, its rate, and that no mask is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import ops
from tests.ops.checks import kept_beside
from tests.random_views import array


@pytest.mark.parametrize("seed", [3, jax.random.key(3), jnp.uint32(3), jnp.asarray([1, 2], jnp.int32)])
def test_backward_finds_the_same_mask(seed):
    x, dy = array(0, 50, 40), array(1, 50, 40)
    y, back = jax.jit(
        lambda x, dy: (ops.dropout(x, 0.25, seed), jax.vjp(lambda x: ops.dropout(x, 0.25, seed), x)[1](dy))
    )(x, dy)
    stays = y != 0
    np.testing.assert_allclose(y, jnp.where(stays, x / 0.75, 0), 1e-6)
    np.testing.assert_allclose(back[0], jnp.where(stays, dy / 0.75, 0), 1e-6)


def test_rate_and_seeds():
    ones = jnp.ones((400, 500), jnp.bfloat16)
    masks = [np.asarray(ops.dropout(ones, 0.1, seed) != 0) for seed in (1, 2)]
    for mask in masks:
        assert abs(mask.mean() - 0.9) < 4 * np.sqrt(0.09 / mask.size)
        assert np.abs(mask.mean(0) - 0.9).max() < 5 * np.sqrt(0.09 / 400)
    assert abs((masks[0] & masks[1]).mean() - 0.81) < 0.005
    assert ops.dropout(ones, 0.0, 1) is ones


def test_nothing_but_the_seed_is_kept():
    x = array(0, 50, 40)
    _, kept = kept_beside(lambda x: ops.dropout(x, 0.5, jax.random.key(0)), (x,))
    assert sum(leaf.nbytes for leaf in kept) <= 8


def test_layers_of_a_scan_have_their_own_masks_and_keep_none():
    def net(x, seeds):
        return jax.lax.scan(lambda x, seed: (ops.dropout(x, 0.5, seed) + 1, None), x, seeds)[0]

    x, seeds = jnp.ones((4, 4096)), jnp.arange(8, dtype=jnp.uint32)
    compiled = jax.jit(jax.grad(lambda x: net(x, seeds).sum())).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * x.size / 8 + 4 * x.nbytes
    expected = jnp.ones_like(x)
    for seed in range(8):
        expected = expected * (ops.dropout(jnp.ones_like(x), 0.5, jnp.uint32(seed)))
    np.testing.assert_array_equal(compiled(x), expected)


def test_forward_mode_and_arguments_that_do_not_fit():
    x = array(0, 8, 8)
    y, dy = jax.jvp(lambda x: ops.dropout(x, 0.5, 1), (x,), (2 * x,))
    np.testing.assert_allclose(dy, 2 * y)
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        ops.dropout(x, 1.0, 1)
    with pytest.raises(TypeError, match="seed"):
        ops.dropout(x, 0.5, 0.5)
