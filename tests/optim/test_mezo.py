import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfinv

import memjax as mj
from memjax.core import compiled_bytes
from memjax.optim.fused_step import LossParts
from memjax.optim.mezo import mezo, noise

L, D, B = 3, 8, 4


def problem(layers=L, features=D, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "bias": jax.random.normal(keys[0], (features,)),
        "layers": {
            "b": jax.random.normal(keys[2], (layers, features)) / 8,
            "w": jax.random.normal(keys[1], (layers, features, features)) / features**0.5,
        },
    }
    return jax.tree.map(lambda x: x.astype(dtype), params), jax.random.normal(keys[3], (B, features), dtype)


PARTS = LossParts(
    lambda params, batch: batch + params["bias"],
    lambda layer, x, batch, index: x + jnp.tanh(x @ layer["w"] + layer["b"]),
    lambda params, x, batch: jnp.mean((x * params["bias"] - 1.0) ** 2),
)


def numpy_loss(params, batch):
    x = batch + params["bias"]
    for w, b in zip(params["layers"]["w"], params["layers"]["b"]):
        x = x + np.tanh(x @ w + b)
    return np.mean((x * params["bias"] - 1.0) ** 2)


def numpy_mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x


def numpy_words(*words):
    a, b = np.array([0x9E3779B9], np.uint32), np.array([0x85EBCA6B], np.uint32)
    for word in words:
        a = numpy_mix(a ^ np.uint32(word))
        b = numpy_mix(b + a)
    return a, b


def numpy_noise(seed, step, sample, leaf, layer, shape):
    first = numpy_words(seed)
    a, b = numpy_words(first[0][0], first[1][0], step, sample, leaf, layer)
    bits = numpy_mix(numpy_mix(np.arange(np.prod(shape), dtype=np.uint32) ^ a) + b)
    centered = 2 * (bits >> 8) / 2**24 + 2**-24 - 1
    return np.sqrt(2) * erfinv(centered).reshape(shape)


def numpy_z(params, step, sample):
    """The noise of a whole tree; leaves in tree order: bias, layers/b, layers/w."""
    stack = params["layers"]
    return {
        "bias": numpy_noise(7, step, sample, 0, 0, params["bias"].shape),
        "layers": {
            name: np.stack([numpy_noise(7, step, sample, leaf, i, stack[name].shape[1:]) for i in range(L)])
            for leaf, name in ((1, "b"), (2, "w"))
        },
    }


def numpy_run(params, slopes, rule, lr, decay):
    """MeZO by its definition: all noise as arrays, moments of all steps."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    m = v = jax.tree.map(np.zeros_like, params)
    for t, row in enumerate(slopes):
        g = jax.tree.map(np.zeros_like, params)
        for sample, slope in enumerate(row):
            part = jax.tree.map(lambda z, c=slope: c * z, numpy_z(params, t, sample))
            g = jax.tree.map(lambda g, z, n=row.size: g + z / n, g, part)
        if rule == "sgd":
            u = g
        elif rule == "momentum":
            u = m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        else:
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, g)
            mean, square = (jax.tree.map(lambda x, c=1 - b ** (t + 1): x / c, x) for x, b in ((m, 0.9), (v, 0.99)))
            u = jax.tree.map(lambda m, v: m / (np.sqrt(v) + 1e-8), mean, square)
        params = jax.tree.map(lambda p, u: p - lr * (u + decay * p), params, u)
    return params


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rule", "samples"), [("sgd", 2), ("momentum", 1), ("adam", 1)])
def test_equals_the_numpy_transcription(rule, samples):
    params, batch = problem()
    settings = {"eps": 1e-2, "rule": rule, "samples": samples, "b2": 0.99, "weight_decay": 0.1, "seed": 7}
    method = mezo(PARTS, 1e-2, **settings)
    step, state, new = jax.jit(method.step), method.init(params), params
    log = []
    for t in range(6):
        double = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
        new, state, metrics = step(new, state, batch)
        log.append(np.asarray(metrics.slopes))
        for sample, slope in enumerate(log[-1]):
            z = numpy_z(double, t, sample)
            above, below = (
                numpy_loss(jax.tree.map(lambda p, z, e=e: p + e * z, double, z), np.asarray(batch, np.float64))
                for e in (1e-2, -1e-2)
            )
            assert slope == pytest.approx((above - below) / 2e-2, rel=1e-3, abs=1e-3)
    assert_close(new, numpy_run(params, log, rule, 1e-2, 0.1), 1e-5)
    assert_close(jax.jit(method.replay)(params, jnp.stack(log)), new, 1e-6)
    if rule != "sgd":
        # Moments made again from the log are those that were kept.
        again = mezo(PARTS, 1e-2, window=6, **settings)
        assert_close(jax.jit(again.replay)(params, jnp.stack(log)), new, 1e-5)
        assert mj.core.nbytes(again.init(params)) == 4 + 4 * 6
        moments = {"momentum": 1, "adam": 2}[rule]
        assert mj.core.nbytes(method.init(params)) == 4 + moments * mj.core.nbytes(params)
    else:
        assert mj.core.nbytes(method.init(params)) == 4


def test_noise_is_normal_and_the_estimate_points_along_the_gradient():
    z = np.asarray(noise(3, 1, 0, 2, 5, (256, 256)), np.float64)
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5 and np.abs(z).max() < 5.5
    others = [noise(3, *place, (256, 256)) for place in ((2, 0, 2, 5), (1, 1, 2, 5), (1, 0, 3, 5), (1, 0, 2, 6))]
    assert max(abs(np.mean(z * other)) for other in others) < 4 / n**0.5

    # For a quadratic loss the estimate is z z^T gradient, of which the mean is the gradient.
    target, params = jnp.arange(4.0), {"w": jnp.zeros(4)}
    method = mezo(lambda params, batch: jnp.sum((params["w"] - target) ** 2), 1.0, samples=256, eps=0.5)
    slopes = jax.jit(method.step)(params, method.init(params), None)[2].slopes
    zs = jax.vmap(lambda sample: noise(0, 0, sample, 0, 0, (4,)))(jnp.arange(256))
    np.testing.assert_allclose(slopes, zs @ (-2 * target), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jnp.mean(slopes[:, None] * zs, 0), -2 * target, atol=4 * 9 / 16)


def test_the_loss_falls():
    params, batch = problem()
    method = mezo(PARTS, 1e-2, rule="adam", b2=0.99)
    step, state = jax.jit(method.step, donate_argnums=(0, 1)), method.init(params)
    losses = []
    for _ in range(150):
        params, state, metrics = step(params, state, batch)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-10:]) < 0.4 * losses[0]


def test_memory_is_that_of_inference():
    layers = 8
    params, batch = problem(layers, 64)
    method = mezo(PARTS, 1e-2, rule="momentum", window=4)
    layer = mj.core.nbytes(params["layers"]) // layers

    def forward(params, batch):
        numbers = jnp.arange(layers, dtype=jnp.int32)
        x, _ = jax.lax.scan(
            lambda x, s: (PARTS.block(s[0], x, batch, s[1]), None),
            PARTS.embed(params, batch),
            (params["layers"], numbers),
        )
        return PARTS.head(params, x, batch)

    arguments = (params, method.init(params), batch)
    found = compiled_bytes(jax.jit(method.step, donate_argnums=(0, 1)).lower(*arguments).compile())
    plain = compiled_bytes(jax.jit(forward).lower(params, batch).compile())
    assert found.alias >= mj.core.nbytes(params)
    assert found.temp < plain.temp + 2 * layer + 2048 < layers * layer


def test_an_adapter_on_a_packed_base():
    keys = jax.random.split(jax.random.key(0), 3)
    frozen = mj.weights.quantize(
        {"layers": {"kernel": jax.random.normal(keys[0], (2, 16, 16)) / 4}}, mj.codecs.nf4(block=16), where="**"
    )
    adapter = mj.adapters.lora(rank=2, targets="**/kernel")
    theta = adapter.init(keys[1], frozen)

    def value(params, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0] ** 2)

    def loss(theta, batch):
        frozen, x = batch
        return mj.lift(value)(adapter.attach(frozen, theta), x)

    method = mezo(loss, 1e-2, eps=1e-2, rule="adam", samples=2)
    batch = (frozen, jax.random.normal(keys[2], (4, 16)))
    step, state, start = jax.jit(method.step), method.init(theta), theta
    log = []
    for _ in range(40):
        theta, state, metrics = step(theta, state, batch)
        log.append(metrics)
    assert log[-1].loss < log[0].loss
    replayed = jax.jit(method.replay)(start, jnp.stack([metrics.slopes for metrics in log]))
    assert_close(replayed, theta, 1e-5)


def test_a_step_that_is_not_finite_and_one_of_slope_zero_change_nothing():
    params, batch = problem(dtype=jnp.bfloat16)
    batch = batch.astype(jnp.bfloat16)
    method = mezo(PARTS, 1e-2, weight_decay=0.1)
    new, state, metrics = jax.jit(method.step)(params, method.init(params), batch * jnp.nan)
    assert not jnp.isfinite(metrics.slopes).any() and state.step == 1
    flat = mezo(lambda params, batch: jnp.float32(1), 1e-2)
    unmoved, _, metrics = jax.jit(flat.step)(params, flat.init(params), batch)
    assert metrics.slopes == 0
    for a, b, c in zip(jax.tree.leaves(params), jax.tree.leaves(new), jax.tree.leaves(unmoved)):
        assert a.dtype == b.dtype == c.dtype
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))
        np.testing.assert_array_equal(a.astype(jnp.float32), c.astype(jnp.float32))


def test_mask_and_schedule():
    params = {"decays": jnp.ones(3), "stays": jnp.ones(3)}
    method = mezo(
        lambda params, batch: jnp.float32(1),
        lambda step: 0.1 * (step + 1),
        weight_decay=1.0,
        mask={"decays": True, "stays": False},
    )
    new = method.replay(params, jnp.zeros((2, 1)))
    np.testing.assert_allclose(new["decays"], 0.9 * 0.8, rtol=1e-6)
    np.testing.assert_array_equal(new["stays"], 1)


def test_bad_input():
    for settings, message in (
        ({"rule": "lion"}, "rule must be"),
        ({"eps": 0}, "eps > 0"),
        ({"window": 3}, "has no moments"),
    ):
        with pytest.raises(ValueError, match=message):
            mezo(PARTS, 1.0, **settings)
    with pytest.raises(TypeError, match="w: trained leaves must be floats"):
        mezo(lambda p, b: 0.0, 1.0).init({"w": jnp.arange(3)})
    with pytest.raises(ValueError, match="no key 'layers'"):
        mezo(PARTS, 1.0).init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"expected slopes \[steps, 1\]"):
        mezo(lambda p, b: 0.0, 1.0).replay({"w": jnp.ones(3)}, jnp.zeros(3))
    with pytest.raises(ValueError, match="mask has 1 leaves, but params have 2"):
        mezo(lambda p, b: 0.0, 1.0, mask=[True]).replay({"a": jnp.ones(3), "b": jnp.ones(3)}, jnp.zeros((1, 1)))
