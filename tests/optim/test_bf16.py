"""Stochastic rounding to bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memjax as mj


def test_the_mean_of_many_draws_is_the_number():
    x = np.float32([1.003, -2.718, 1e-3, 3e38, 1e-40])
    draws = 4096
    bits = jax.vmap(lambda s: mj.core.random_bits(s, x.shape))(jnp.arange(draws))
    rounded = np.float64(np.float32(jax.vmap(lambda b: mj.optim.round_stochastic(x, b))(bits)))
    low, high = rounded.min(0), rounded.max(0)
    assert (low <= x).all() and (x <= high).all() and (low < high)[:3].all()
    sigma = np.sqrt(np.maximum((x - low) * (high - x), 0) / draws)
    assert (np.abs(rounded.mean(0) - x) <= 4 * sigma + 1e-50).all()


def test_what_bfloat16_represents_stays_and_nothing_overflows():
    exact = jnp.arange(2**16, dtype=jnp.uint16)
    values = jax.lax.bitcast_convert_type(exact, jnp.bfloat16).astype(jnp.float32)
    rounded = mj.optim.round_stochastic(values, jnp.full(values.shape, 0xFFFF, jnp.uint32)).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, values)
    largest = jnp.float32(np.finfo(np.float32).max)
    for x in (largest, -largest):
        assert jnp.isfinite(mj.optim.round_stochastic(x, jnp.uint32(0xFFFF)))


def test_small_updates_are_not_lost():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "v": jnp.ones((3,), jnp.float32), "none": None}
    updates = {"w": jnp.full((64, 64), 1e-4, jnp.bfloat16), "v": jnp.full((3,), 1e-4), "none": None}
    plain = stochastic = params
    step = jax.jit(mj.optim.apply_updates_stochastic)
    for i in range(100):
        plain = optax.apply_updates(plain, updates)
        stochastic = step(stochastic, updates, i)
    assert (plain["w"] == 1).all() and stochastic["w"].dtype == jnp.bfloat16
    assert abs(float(stochastic["w"].astype(jnp.float32).mean()) - 1.01) < 1e-3
    np.testing.assert_array_equal(stochastic["v"], plain["v"])
    twice = [step(params, updates, jax.random.key(5))["w"] for _ in range(2)]
    assert (twice[0] == twice[1]).all()
