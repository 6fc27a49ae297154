import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax.remat import allocate, allocate_bits
from tests.remat.relative import relative_error

T, D, F = 128, 64, 128


def block(p, x):
    """Four residuals of unlike weight: x and the outputs of tanh, of which one is scaled down."""
    small = jnp.tanh(x @ p["a"]) * 0.05
    large = jnp.tanh(x @ p["b"])
    return x + jnp.sin(small + large) @ p["c"]


def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (D, F), "b": (D, F), "c": (F, D)}
    params = {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items())}
    return params, jax.random.normal(keys[3], (T, D))


POLICY = mj.remat.ResidualPolicy(group=64, inputs="**")


def squares(bits, sensitivities):
    return sum((c / (2**b - 1)) ** 2 for b, c in zip(bits, sensitivities))


@pytest.mark.parametrize("choices", [(2, 4, 8), (2, 3, 4, 6, 8)])
def test_bits_are_those_that_trying_all_finds(choices):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = [{b: int(n) * b // 8 for b in choices} for n in rng.integers(200, 3000, 4)]
        sensitivities = rng.lognormal(0, 2, 4)
        budget = rng.uniform(sum(s[2] for s in sizes), sum(s[8] for s in sizes))
        every = [
            bits
            for bits in itertools.product(choices, repeat=4)
            if sum(size[b] for size, b in zip(sizes, bits)) <= budget
        ]
        got = tuple(allocate_bits(sizes, sensitivities, budget))
        assert got in every
        assert squares(got, sensitivities) == min(squares(bits, sensitivities) for bits in every)


def test_many_arrays_stay_within_the_budget_and_near_the_bound():
    rng = np.random.default_rng(1)
    counts, sensitivities = rng.integers(10**6, 10**7, 60), rng.lognormal(0, 2, 60)
    sizes = [{b: int(n) * b // 8 for b in (2, 4, 8)} for n in counts]
    budget = int(sum(counts) * 4 / 8)
    got = allocate_bits(sizes, sensitivities, budget)
    assert sum(size[b] for size, b in zip(sizes, got)) <= budget
    # Lagrange's bound: no choice within the budget has a smaller error than this.
    bound = max(
        sum(min((c / (2**b - 1)) ** 2 + price * size[b] for b in size) for size, c in zip(sizes, sensitivities))
        - price * budget
        for price in np.geomspace(1e-12, 1, 300)
    )
    assert squares(got, sensitivities) < 1.05 * bound


@pytest.fixture(scope="module")
def allocations():
    report = mj.remat.report(block, *problem(), policy=mj.remat.ResidualPolicy(4, 64, inputs="**", input_bits=4))
    return {share: allocate(block, problem(), int(share * report.nbytes), policy=POLICY) for share in (0.6, 1.0)}


def gradient(policy):
    f = block if policy is None else mj.remat.compress_residuals(block, policy)
    slopes = jax.random.normal(jax.random.key(9), (T, D))
    return jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) * slopes), (0, 1)))(*problem())


def test_predicted_error_is_near_the_measured_one_and_below_that_of_the_same_bits_for_all(allocations):
    exact = gradient(None)
    measured = {share: relative_error(gradient(a.policy), exact) for share, a in allocations.items()}
    for share, allocation in allocations.items():
        assert allocation.error / 2 < measured[share] < allocation.error * 2
    uniform = mj.remat.ResidualPolicy(4, 64, inputs="**", input_bits=4)
    assert measured[1.0] < relative_error(gradient(uniform), exact)
    assert allocations[1.0].error < allocations[0.6].error
    assert len(set(allocations[1.0].bits.values())) > 1


def test_bytes_are_those_of_the_report_and_within_the_budget(allocations):
    uniform = mj.remat.report(block, *problem(), policy=mj.remat.ResidualPolicy(4, 64, inputs="**", input_bits=4))
    for share, allocation in allocations.items():
        assert allocation.stored_bytes <= share * uniform.nbytes
        assert mj.remat.report(block, *problem(), policy=allocation.policy).nbytes == allocation.stored_bytes


def test_what_cannot_be_allocated():
    with pytest.raises(ValueError, match=r"budget_bytes=100 is less than the \d+ bytes that 2 bits take"):
        allocate(block, problem(), 100, policy=POLICY)
    with pytest.raises(ValueError, match="nothing is packed"):
        allocate(block, problem(), 100, policy=mj.remat.ResidualPolicy(min_size=10**9))
    with pytest.raises(ValueError, match="per_leaf already"):
        allocate(block, problem(), 100, policy=mj.remat.ResidualPolicy(per_leaf={"*": 8}))
    with pytest.raises(ValueError, match="choices must be among 2, 3, 4, 6 and 8"):
        allocate(block, problem(), 100, choices=(4, 32))
    with pytest.raises(ValueError, match="less than the 2 that the fewest bits take"):
        allocate_bits([{2: 1, 4: 2}] * 2, [1, 1], 1)
