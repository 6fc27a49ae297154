"""OLoRA: what the factors and the residual are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters
from tests.random_views import array, assert_close


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_factors_are_those_of_the_transposed_weight(shape):
    params = {"kernel": array(0, *shape)}
    frozen, theta = adapters.olora(rank=3, alpha=6).prepare(jax.random.key(0), params)
    q, r = np.linalg.qr(np.asarray(params["kernel"], np.float64).T)
    a, b = theta["kernel"]["a"], theta["kernel"]["b"]
    signs = np.sign(np.sum(np.asarray(b) * q[:, :3].T, axis=1))
    assert_close(b, signs[:, None] * q[:, :3].T, 1e-5)
    assert_close(a, r[:3].T * signs, 1e-5)
    assert_close(b @ b.T, jnp.eye(3), 1e-5)
    assert_close(frozen["kernel"].base.materialize() + 2 * a @ b, params["kernel"])


def test_with_a_scale_of_one_the_first_rows_leave_the_residual():
    params = {"kernel": array(0, 2, 12, 8)}
    frozen, _ = adapters.olora(rank=3).prepare(jax.random.key(0), params)
    residual = np.asarray(frozen["kernel"].base.materialize())
    assert np.abs(residual[:, :3]).max() < 1e-5 < np.abs(residual[:, 3:]).max()
