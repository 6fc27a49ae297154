"""The rotary embedding: gradients, and that nothing of what is rotated is kept."""

import jax
import jax.numpy as jnp
import pytest

from memjax import ops
from tests.ops.checks import assert_matches, kept_beside
from tests.random_views import array


def rotated(x, angles):
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
def test_values_and_gradients(batch, dtype, tolerance):
    x, angles = array(0, 2, 5, 3, 8, dtype=dtype), array(1, batch, 5, 4)
    assert_matches(ops.rope, rotated, (x, angles), tolerance)


def test_keeps_nothing_of_what_it_rotates():
    x, angles = array(0, 2, 5, 3, 8), array(1, 1, 5, 4)
    _, back = jax.vjp(lambda x: ops.rope(x, angles), x)
    assert [leaf.shape for leaf in jax.tree.leaves(back)] == [angles.shape]
    assert not kept_beside(ops.rope, (x, angles))[1]


def test_forward_mode():
    x, angles = array(0, 2, 5, 3, 8), array(1, 1, 5, 4)
    y, dy = jax.jvp(lambda x: ops.rope(x, angles), (x,), (2 * x,))
    assert jnp.allclose(dy, 2 * y)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"angles \[B or 1, S, Dh/2\]"):
        ops.rope(jnp.zeros((2, 5, 3, 8)), jnp.zeros((1, 5, 8)))
