"""(IA)^3: which vectors scale what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters
from tests.random_views import array, assert_close


def params():
    return {
        "k_proj": {"kernel": array(0, 2, 6, 4), "bias": array(1, 2, 4)},
        "v_proj": {"kernel": array(2, 2, 6, 4)},
        "down_proj": {"kernel": array(3, 2, 5, 6), "bias": array(4, 2, 6)},
    }


def test_outputs_with_their_bias_and_inputs_without():
    adapter = adapters.ia3()
    theta = adapter.init(jax.random.key(0), params())
    assert {path: (*factors,) for path, factors in theta.items()} == {
        "k_proj/kernel": ("column",),
        "v_proj/kernel": ("column",),
        "down_proj/kernel": ("row",),
    }
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(theta))
    theta = {path: {n: array(9, *v.shape) for n, v in factors.items()} for path, factors in theta.items()}
    attached = adapter.attach(params(), theta)
    column, row = theta["k_proj/kernel"]["column"], theta["down_proj/kernel"]["row"]
    assert_close(attached["k_proj"]["bias"], params()["k_proj"]["bias"] * column)
    np.testing.assert_array_equal(attached["down_proj"]["bias"], params()["down_proj"]["bias"])
    merged, _ = adapter.merge(params(), theta)
    assert_close(merged["k_proj"]["kernel"], params()["k_proj"]["kernel"] * column[:, None])
    assert_close(merged["k_proj"]["bias"], params()["k_proj"]["bias"] * column)
    assert_close(merged["down_proj"]["kernel"], params()["down_proj"]["kernel"] * row[..., None])


def test_a_bfloat16_bias_keeps_its_dtype():
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    adapter = adapters.ia3(targets="k_proj/kernel", feedforward=())
    assert adapter.attach(tree, adapter.init(jax.random.key(0), tree))["k_proj"]["bias"].dtype == jnp.bfloat16


def test_settings_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"feedforward='\*\*/down_proj/kernel' selects weights that targets="):
        adapters.ia3(targets="k_proj/kernel").init(jax.random.key(0), params())
    with pytest.raises(ValueError, match="pattern 'up_proj/kernel' matches no leaf"):
        adapters.ia3(feedforward="up_proj/kernel").init(jax.random.key(0), params())
    adapter = adapters.ia3()
    theta = adapter.init(jax.random.key(0), params())
    tree = params()
    tree["k_proj"]["bias"] = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"k_proj/bias: expected a bias of shape \(2, 4\), got \(2, 3\)"):
        adapter.attach(tree, theta)
