"""LaMDA and LaMDA++ against the dense W + s A (S B - S0 B0)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from memjax import adapters, codecs, weights
from memjax.adapters import AdapterBytes, frozen_rows, lamda, lamda_plan, progressive_freeze
from memjax.core.bytes import compiled_bytes, nbytes
from memjax.core.paths import leaf_paths
from memjax.weights import lift
from tests.adapters.small import KEY, X, constants_of, gradients, model, moved, outputs, params
from tests.random_views import array, assert_close

INITS = ["svd_residual", "svd_zero", "reference"]


@functools.cache
def prepared(rank=4, alpha=6.0, init="svd_residual"):
    adapter = lamda(rank, alpha, init=init)
    return adapter, *adapter.prepare(KEY, params())


@pytest.mark.parametrize("init", ["svd_zero", "reference"])
def test_a_fresh_adapter_changes_nothing(init):
    adapter, frozen, theta = prepared(init=init)
    assert_close(outputs(adapter.attach(frozen, theta)), outputs(params()), 1e-6)


def test_a_fresh_adapter_changes_nothing_in_bfloat16_on_a_packed_base():
    frozen = weights.astype(weights.quantize({"w": array(0, 2, 16, 16)}, codecs.int4(group=8), "w"), jnp.bfloat16)
    adapter = lamda(5, 7.0, targets="w", dtype=jnp.bfloat16)
    attached = adapter.attach(*adapter.prepare(KEY, frozen))
    apply = jax.jit(lift(lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]))
    x = X.astype(jnp.bfloat16)
    np.testing.assert_array_equal(apply(attached, x), apply(frozen, x))


@pytest.mark.parametrize("init", INITS)
def test_the_start_is_the_truncated_decomposition(init):
    _, frozen, theta = prepared(init=init)
    for path, w in leaf_paths(params()):
        a, s, b = constants_of(frozen)[path]["a"], theta[path]["s"], theta[path]["b"]
        if init == "reference":
            assert not np.any(b) and np.abs(s).max() <= 0.5 and np.abs(a).max() <= w.shape[-2] ** -0.5
            continue
        u, sigma, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
        assert_close(a @ jnp.swapaxes(a, -1, -2), u[..., :4] @ np.swapaxes(u[..., :4], -1, -2), 2e-5)
        if init == "svd_zero":
            assert not np.any(s)
        else:
            best = u[..., :4] * sigma[..., None, :4] @ vt[..., :4, :]
            assert_close(1.5 * a @ s @ b, best, 2e-5)
            assert_close(s, np.eye(4) * sigma[..., None, :4] / 1.5, 2e-5)


@pytest.mark.parametrize("rows", [2, None])
def test_frozen_rows_change_neither_values_nor_gradients(rows):
    adapter, frozen, theta = prepared()
    theta = moved(theta)
    fewer_frozen, fewer, _ = adapter.freeze(frozen, theta, None, rows)
    assert_close(outputs(adapter.attach(fewer_frozen, fewer)), outputs(adapter.attach(frozen, theta)), 5e-6)
    wanted = gradients(adapter, frozen, theta)
    for path, factors in gradients(adapter, fewer_frozen, fewer).items():
        assert_close(factors["s"], wanted[path]["s"], 5e-6)
        if rows:
            assert_close(factors["b"], wanted[path]["b"][..., rows:, :], 5e-6)
        else:
            assert set(factors) == {"s"}


def test_lookups_transposes_and_convolutions_use_the_delta():
    tree = {"embedding": array(0, 12, 8), "kernel": array(1, 3, 8, 6)}

    def apply(p, tokens):
        x = p["embedding"][tokens]
        y = lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return y, x @ p["embedding"].T

    tokens = jnp.array([[1, 5, 5, 0]])
    adapter = lamda(3, targets="*", axes=weights.infer_axes(apply, tree, tokens))
    frozen, theta = adapter.prepare(KEY, tree)
    theta = moved(theta)
    views = adapter.attach(frozen, theta)
    merged, _ = adapter.merge(frozen, theta)
    assert_close(jax.jit(lift(apply))(views, tokens), apply(merged, tokens), 5e-6)
    assert float(jnp.max(jnp.abs(merged["kernel"] - tree["kernel"]))) > 0.1


def test_as_lora_fits_the_params_before():
    adapter, frozen, theta = prepared()
    frozen, theta, _ = adapter.freeze(frozen, moved(theta), None, 3)
    lora, factors = adapter.as_lora(frozen, theta)
    assert factors["head/kernel"]["a"].shape == (16, 4)
    assert_close(outputs(lora.attach(params(), factors)), outputs(adapter.attach(frozen, theta)), 5e-6)


@pytest.mark.parametrize("init", INITS)
def test_bytes_equal_the_formula(init):
    p, r = params(), 4
    adapter, frozen, theta = prepared(init=init)
    shapes = [(16, 24)] * 2 + [(24, 16)] * 2 + [(16, 16)]
    trained = sum(r * r + r * o for _, o in shapes)
    constants = sum(r * i + (r * o if init == "svd_residual" else 0) for i, o in shapes)
    assert adapter.nbytes(p) == AdapterBytes(4 * trained, 4 * constants)
    assert (nbytes(theta), nbytes(frozen) - nbytes(p)) == adapter.nbytes(p)
    assert nbytes(adapter.freeze(frozen, theta)[1]) == 4 * r * r * len(shapes)
    frozen, _ = adapter.prepare(KEY, p)
    assert all(leaf.base.array is w for (_, leaf), (_, w) in zip(leaf_paths(frozen), leaf_paths(p)))  # no second copy


# ---- freezing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, expected", [("paper", [0, 0, 1, 2, 2, 3, 4, 4]), ("released", [0] * 6 + [1, 1])])
def test_the_schedule(schedule, expected):
    assert [frozen_rows(t, 4, 20, 0.3, schedule) for t in range(8)] == expected
    np.testing.assert_array_equal(frozen_rows(jnp.arange(8), 4, 20, 0.3, schedule), expected)
    assert frozen_rows(10**6, 4, 20, 0.3, schedule) == 4


def train(adapter, tx, frozen, theta, steps):
    """Returns theta before each step and after the last."""
    step, state, history = stepper(adapter, tx), tx.init(theta), [theta]
    for _ in range(steps):
        theta, state = step(theta, state, frozen)
        history.append(theta)
    return history


def stepper(adapter, tx):
    def loss(theta, frozen):
        return jnp.mean(jnp.square(lift(model)(adapter.attach(frozen, theta), X)))

    @jax.jit
    def step(theta, state, frozen):
        updates, state = tx.update(jax.grad(loss)(theta, frozen), state, theta)
        return optax.apply_updates(theta, updates), state

    return step


def test_rows_stand_still_from_their_step_on_and_dropping_them_is_the_same():
    (adapter, frozen, theta), steps = prepared(), 8
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), progressive_freeze(steps, 0.5))
    history = train(adapter, tx, frozen, theta, steps)
    for t, (before, after) in enumerate(itertools.pairwise(history)):
        still = frozen_rows(t, 4, steps, 0.5)
        for path in theta:
            same = np.all(np.asarray(before[path]["b"] == after[path]["b"]), -1)
            assert np.all(same == (np.arange(4) < still)), (t, path)
            assert not np.array_equal(before[path]["s"], after[path]["s"])

    step, state, sizes = stepper(adapter, tx), tx.init(theta), []
    for t in range(steps):
        if t in (2, 4):
            frozen, theta, state = adapter.freeze(frozen, theta, state, frozen_rows(t, 4, steps, 0.5))
        sizes.append((nbytes(theta), nbytes(state)))
        theta, state = step(theta, state, frozen)
    assert set(theta["head/kernel"]) == {"s"}
    assert_close(theta, {path: {"s": factors["s"]} for path, factors in history[-1].items()}, 1e-5)
    for path, constants in constants_of(frozen).items():
        assert_close(constants["fixed"], history[-1][path]["b"], 1e-5)
    outputs = 2 * 24 + 2 * 16 + 16
    b, s = 4 * 4 * outputs, 4 * 16 * 5
    assert [size for size, _ in sizes] == [b + s] * 2 + [b // 2 + s] * 2 + [s] * 4
    assert [state - 2 * size for size, state in sizes] == [8] * steps  # two moments, two counters


def test_gradient_bytes_fall_with_the_rows():
    adapter, (depth, d, r, rows) = lamda(32, targets="w"), (4, 128, 32, 2)
    frozen, theta = adapter.prepare(KEY, {"w": array(0, depth, d, d) / 12})

    def loss(theta, frozen, x):
        apply = lift(lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0])
        return jnp.sum(apply(adapter.attach(frozen, theta), x))

    def total(frozen, theta):
        compiled = jax.jit(jax.grad(loss)).lower(theta, frozen, array(1, rows, d)).compile()
        sizes = compiled_bytes(compiled)
        return sizes.output + sizes.temp

    before = total(frozen, theta)
    after = total(*adapter.freeze(frozen, theta)[:2])
    assert before - after >= 0.9 * 4 * depth * r * d, (before, after)


def test_the_input_is_no_residual():
    """With A frozen only x A is kept: between two products the input of the second is used by nothing else."""
    rows, d, r = 64, 32, 4
    lora, spectral = adapters.lora(r, targets="w"), lamda(r, targets="w")

    def kept(adapter):
        frozen, theta = adapter.prepare(KEY, {"w": array(0, 3, d, d), "v": array(1, d, d)})

        def layers(theta, x):
            view = adapter.attach(frozen, theta)
            return lift(lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0])(view, x)

        leaves = jax.tree.leaves(jax.vjp(layers, theta, array(2, rows, d))[1])
        return sorted({leaf.shape for leaf in leaves if rows in leaf.shape})

    assert kept(spectral) == [(3, rows, r)]
    assert (3, rows, d) in kept(lora)


def test_freezing_needs_what_it_moves():
    adapter, frozen, theta = prepared()
    with pytest.raises(ValueError, match="expected the frozen tree of"):
        adapter.freeze(params(), theta)
    odd = {path: {"s": f["s"], "b": f["b"][..., :1]} for path, f in theta.items()}
    with pytest.raises(ValueError, match=r"expected optimizer state of b of shape .* initialise the optimizer anew"):
        adapter.freeze(frozen, theta, (odd,))
    tx = progressive_freeze(10)
    with pytest.raises(TypeError, match="path -> factor name -> array"):
        tx.update([jnp.ones(3)], tx.init(None))


# ---- ranks --------------------------------------------------------------------------------------------------------


def spectra(*decays, d=16):
    """Returns a stack of matrices whose singular values fall as exp(-decay i)."""
    left, right = (np.linalg.qr(np.asarray(array(i, len(decays), d, d)))[0] for i in (0, 1))
    return jnp.asarray(left * np.exp(-np.outer(decays, np.arange(d)))[:, None] @ right, jnp.float32)


def test_the_plan_gives_flat_spectra_more():
    p = {"w": spectra(2.0, 0.01, 0.5, 0.05), "v": spectra(3.0)[0]}
    plan = lamda_plan(p, 4, targets="*")
    assert plan == {"v": 2, "w": [2, 8, 2, 6]} or sum([plan["v"], *plan["w"]]) == 20
    assert plan["w"][1] == 8 and plan["v"] == 2 and plan["w"][0] == 2
    assert {plan["v"], *plan["w"]} <= {2, 4, 8}
    for mean, candidates in ((3, range(1, 9)), (5, (1, 5, 9)), (4, (4,))):
        plan = lamda_plan(p, mean, list(candidates), targets="*")
        assert sum([plan["v"], *plan["w"]]) == 5 * mean
    with pytest.raises(ValueError, match="no choice of ranks among"):
        lamda_plan(p, 4, [3, 6], targets="*")


def test_without_gaps_the_plan_rounds_by_largest_remainder():
    from memjax.adapters.lamda import _nearest_ranks

    ideal = np.array([1.2, 3.7, 5.6, 1.5])
    got = _nearest_ranks(ideal, 12, range(1, 13), np.full(4, 99))
    assert got.tolist() == [1, 4, 6, 1] and got.sum() == 12


@pytest.mark.parametrize("init", ["svd_residual", "reference"])
def test_padded_ranks_stay_padded(init):
    ranks = [2, 5]
    adapter = lamda({"layers/up/*": ranks}, targets="layers/up/*", init=init)
    frozen, theta = adapter.prepare(KEY, params())
    factors = train(adapter, optax.adamw(1e-2), frozen, theta, 3)[-1]["layers/up/kernel"]
    a = constants_of(frozen)["layers/up/kernel"]["a"]
    for layer, r in enumerate(ranks):
        assert not np.any(a[layer, :, r:]) and not np.any(factors["b"][layer, r:])
        assert not np.any(factors["s"][layer, r:]) and not np.any(factors["s"][layer, :, r:])
        assert np.all(np.any(factors["b"][layer, :r], -1))
    uniform = lamda(5, targets="layers/up/*", init=init)
    assert adapter.nbytes(params()) == uniform.nbytes(params())
    constants = 3 * 16 + (3 * 24 if init == "svd_residual" else 0)
    assert adapter.padding(params()) == AdapterBytes(4 * (25 - 4 + 3 * 24), 4 * constants)
    assert uniform.padding(params()) == AdapterBytes(0, 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": [1, 2]}, "rank must be a positive integer"),
        ({"rank": {"**": [2, 0]}}, "rank must be a positive integer"),
        ({"init": "svd"}, "init must be one of .* got 'svd'"),
        ({"dtype": jnp.int8}, "dtype must be floating point"),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        lamda(**settings)


@pytest.mark.parametrize(
    "rank, message",
    [
        ({"**": [1, 2, 3]}, r"head/kernel: expected ranks of shape \(\), got shape \(3,\)"),
        ({"head/*": 17, "**": 2}, "head/kernel: rank 17 is larger than the matrix"),
        ({"layers/**": 2}, "head/kernel: no pattern of rank="),
        ({"tail": 2, "**": 2}, "pattern 'tail' matches no leaf"),
    ],
)
def test_ranks_that_do_not_fit_raise(rank, message):
    with pytest.raises(ValueError, match=message):
        lamda(rank).prepare(KEY, params())
