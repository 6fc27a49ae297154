"""LoRA-FA: what reverse mode keeps, and the corrected gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import adapters, codecs, weights
from memjax.weights import lift
from tests.random_views import array, assert_close

T, D_IN, D_OUT, RANK = 7, 16, 12, 3
SETTINGS = {"rank": RANK, "alpha": 6, "targets": "kernel"}


def apply(p, x):
    return jnp.sin(x @ p["kernel"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_input_is_not_kept(dtype, packed):
    params = {"kernel": array(0, D_IN, D_OUT, dtype=dtype)}
    params = weights.quantize(params, codecs.int4(group=8), where="kernel") if packed else params
    x = array(1, T, D_IN, dtype=dtype)

    def kept(adapter):
        frozen, theta = adapter.prepare(jax.random.key(0), params)
        back = jax.vjp(lambda theta: lift(apply)(adapter.attach(frozen, theta), 2 * x), theta)[1]
        return [leaf.shape for leaf in jax.tree.leaves(back)]

    frozen_a, trained_a = kept(adapters.lora_fa(**SETTINGS)), kept(adapters.lora(**SETTINGS))
    assert (T, RANK) in frozen_a and (T, D_IN) not in frozen_a
    assert (T, RANK) in trained_a and (T, D_IN) in trained_a


def test_the_gradient_is_that_of_lora_with_the_same_a():
    params, x = {"kernel": array(0, D_IN, D_OUT)}, array(1, T, D_IN)
    adapter, lora = adapters.lora_fa(**SETTINGS), adapters.lora(**SETTINGS)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    theta = {"kernel": {"b": array(2, RANK, D_OUT)}}
    a = frozen["kernel"].constants["a"]

    def loss(adapter, frozen):
        return jax.grad(lambda theta: jnp.sum(lift(apply)(adapter.attach(frozen, theta), x)))

    full = loss(lora, params)({"kernel": {"a": a, **theta["kernel"]}})
    assert_close(loss(adapter, frozen)(theta)["kernel"]["b"], full["kernel"]["b"])
    bound = 1 / np.sqrt(D_IN)
    assert np.abs(a).max() <= bound and np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.3)
    embedding = adapters.lora_fa(rank=2, targets="embedding").prepare(
        jax.random.key(0), {"embedding": jnp.ones((9, 4))}
    )
    assert np.all(embedding[0]["embedding"].constants["a"])  # with A = 0 nothing would train


def test_the_correction_moves_the_weight_closest_to_its_own_gradient():
    params = {"layers": {"kernel": array(0, 2, 2, 8, D_OUT)}, "head": {"kernel": array(1, D_IN, D_OUT)}}
    axes = {"layers/kernel": ((-3, -2), -1)}
    adapter = adapters.lora_fa(rank=RANK, alpha=6, axes=axes)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    wanted, grads = {}, {}
    for path, leaf in (("layers/kernel", frozen["layers"]["kernel"]), ("head/kernel", frozen["head"]["kernel"])):
        a = np.asarray(leaf.constants["a"], np.float64).reshape(-1, D_IN, RANK)
        g = np.random.default_rng(3).standard_normal((len(a), D_IN, D_OUT))  # dL/dW
        shape = theta[path]["b"].shape
        grads[path] = {"b": jnp.asarray(2 * a.swapaxes(-1, -2) @ g, jnp.float32).reshape(shape)}
        best = np.stack([np.linalg.lstsq(2 * a_, g_)[0] for a_, g_ in zip(a, g)])
        wanted[path] = {"b": best.reshape(shape)}
    tx = optax.chain(adapters.lora_fa_correction(adapter, frozen), optax.sgd(1.0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(theta), theta)
    assert_close(jax.tree.map(jnp.negative, updates), wanted, 1e-5)
