"""PiSSA: what the factors and the residual are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters, codecs, weights
from memjax.weights import Rescaled, lift
from tests.random_views import array, assert_close

CODEC = codecs.int4(group=4)


def decaying(seed, *shape):
    """Returns matrices whose singular values halve."""
    u, _, v = np.linalg.svd(np.asarray(array(seed, *shape), np.float64), full_matrices=False)
    return jnp.asarray((u * 2.0 ** -np.arange(u.shape[-1])) @ v, jnp.float32)


def product(factors):
    return jnp.einsum("...ir,...ro->...io", factors["a"], factors["b"], precision="highest")


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (2, 12, 8)])
def test_the_largest_singular_values_are_trained_and_the_rest_is_frozen(shape):
    params = {"kernel": array(0, *shape)}
    adapter = adapters.pissa(rank=3, alpha=6)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    residual, factors = frozen["kernel"].base.materialize(), theta["kernel"]
    singular = jnp.linalg.svd(params["kernel"], compute_uv=False)
    assert_close(residual + 2 * product(factors), params["kernel"])
    assert_close(jnp.linalg.svd(residual, compute_uv=False)[..., :5], singular[..., 3:], 1e-5)
    assert_close(jnp.linalg.svd(product(factors), compute_uv=False)[..., :3], singular[..., :3] / 2, 1e-5)
    assert_close(jnp.linalg.norm(factors["a"], axis=-2), jnp.linalg.norm(factors["b"], axis=-1), 1e-5)


def test_the_randomized_decomposition_is_close_where_the_spectrum_decays():
    params = {"kernel": decaying(0, 32, 24)}
    exact, fast = (adapters.pissa(rank=4, niter=niter).init(jax.random.key(0), params) for niter in (None, 2))
    assert_close(product(fast["kernel"]), product(exact["kernel"]), 1e-4)
    w = array(0, 32, 24)
    rough = adapters.pissa(rank=4, niter=0).init(jax.random.key(0), {"kernel": w})
    best = float(jnp.linalg.norm(np.linalg.svd(w, compute_uv=False)[4:]))
    assert 1.01 * best < float(jnp.linalg.norm(w - product(rough["kernel"]))) < float(jnp.linalg.norm(w))


def test_the_residual_of_a_packed_stack_is_packed_by_the_same_codec():
    params = weights.quantize({"kernel": array(0, 2, 12, 8)}, CODEC)
    adapter = adapters.pissa(rank=3)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    base = frozen["kernel"].base
    assert base.packed.codec == CODEC and base.packed.dtype == params["kernel"].dtype
    wanted = params["kernel"].materialize() - product(theta["kernel"])
    expected = CODEC.encode(wanted, (-2,)).decode()
    off = np.abs(np.asarray(base.materialize() - expected))
    assert np.mean(off > 1e-5) < 0.02  # codes at a rounding edge may fall either way


def test_axes_and_dtype_of_a_heads_kernel():
    params = {"kernel": array(0, 2, 6, 8, dtype=jnp.bfloat16)}
    adapter = adapters.pissa(rank=3, axes={"kernel": ((0, 1), 2)})
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    assert theta["kernel"]["a"].shape == (2, 6, 3) and theta["kernel"]["a"].dtype == jnp.float32
    assert frozen["kernel"].dtype == jnp.bfloat16
    start = adapter.attach(frozen, theta)["kernel"].materialize()
    assert_close(start.astype(jnp.float32), params["kernel"].astype(jnp.float32), 0.01)


@pytest.mark.parametrize("method", [adapters.pissa, adapters.olora])
def test_as_lora_attaches_to_the_original_weights(method):
    params = {"layers": {"kernel": array(0, 2, 12, 8)}, "head": {"kernel": array(1, 8, 12)}}
    adapter = method(rank={"head/*": 2, "**": 3}, alpha=6, scaling="rslora")
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    theta = jax.tree.map(lambda x: x + 0.1 * array(x.size, *x.shape), theta)
    lora, both = adapter.as_lora(frozen, theta)
    assert isinstance(lora, adapters.Lora) and both["layers/kernel"]["a"].shape == (2, 12, 6)
    before, after = adapter.attach(frozen, theta), lora.attach(params, both)
    for name in params:
        assert_close(after[name]["kernel"].materialize(), before[name]["kernel"].materialize(), 5e-6)
    unchanged, nothing = adapter.as_lora(frozen, adapter.init(jax.random.key(0), params))
    assert_close(unchanged.merge(params, nothing)[0], params)
    with pytest.raises(ValueError, match="give the tree that prepare returned"):
        adapter.as_lora(params, theta)


def test_deltas_that_were_attached_before_stay():
    params = {"kernel": array(0, 12, 8)}
    lora = adapters.lora(rank=2)
    first = jax.tree.map(lambda x: x + 0.1, lora.init(jax.random.key(1), params))
    attached = lora.attach(params, first)
    adapter = adapters.pissa(rank=3)
    frozen, theta = adapter.prepare(jax.random.key(0), attached)
    view = adapter.attach(frozen, theta)["kernel"]
    assert len(view.deltas) == 2
    assert_close(view.materialize(), attached["kernel"].materialize())
    assert_close(
        product(theta["kernel"]), product(adapter.init(jax.random.key(0), lora.merge(params, first)[0])["kernel"])
    )


def test_what_cannot_be_split_is_refused():
    params = {"kernel": array(0, 12, 8)}
    with pytest.raises(ValueError, match="niter must be None or a number of iterations, got -1"):
        adapters.pissa(niter=-1)
    with pytest.raises(ValueError, match="kernel: rank 9 is larger than the matrix, which is 12 x 8"):
        adapters.pissa(rank=9).prepare(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"kernel: expected a positive alpha, got a scale of -0\.5"):
        adapters.pissa(rank=2, alpha=-1).prepare(jax.random.key(0), params)
    ia3 = adapters.ia3(targets="kernel", feedforward=())
    scaled = ia3.attach(params, ia3.init(jax.random.key(0), params))
    assert isinstance(scaled["kernel"], Rescaled)
    with pytest.raises(ValueError, match="kernel: expected a dense or packed weight to split, got Rescaled"):
        adapters.pissa(rank=2).prepare(jax.random.key(0), scaled)
    frozen, _ = adapters.pissa(rank=2).prepare(jax.random.key(0), params)
    with pytest.raises(TypeError, match=r"prepared for pissa: use it as adapter\.attach"):
        lift(lambda p, x: x @ p["kernel"])(frozen, array(1, 2, 12))
