"""SNELL and SNELLA against the dense formula."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memjax import adapters
from memjax.adapters import allocate_budget, init_budget, snell, snella, update_budget
from memjax.core.bytes import compiled_bytes
from memjax.core.views import Axes
from memjax.weights import lift
from tests.adapters.small import KEY, constants_of, moved
from tests.random_views import array, assert_close

N, M = 12, 20


def prepared(adapter, *batch):
    frozen, theta = adapter.prepare(KEY, {"w": array(0, *batch, N, M)})
    return frozen, moved(theta, 0.3)


def delta_of(adapter, frozen, theta):
    return adapter.attach(frozen, theta)["w"].deltas[0]


def dense(adapter, factors, count):
    """Returns the delta of one matrix and its entries before the competition."""
    kernels = {
        "pl2": lambda p, q: jnp.linalg.norm(p[:, None] - q[None], axis=-1),
        "rbf": lambda p, q: jnp.exp(-jnp.sum((p[:, None] - q[None]) ** 2, -1)),
        "linear": lambda p, q: p @ q.T,
    }
    kernel = kernels.get(adapter.kernel, adapter.kernel)
    delta = adapter.scale * sum((-1) ** h * kernel(factors["p"][h], factors["q"][h]) for h in range(adapter.heads))
    if adapter.softmax:
        a, g, b = factors["mix"]
        delta = delta + a * jax.nn.softmax(delta / g, axis=1) + b
    magnitude = lax.stop_gradient(jnp.abs(delta))
    kept = delta * (magnitude >= jnp.sort(magnitude.ravel())[delta.size - count])
    if adapter.mode == "released":
        kept = kept * magnitude
    return kept * factors.get("gate", 1), delta


CASES = {
    "tiles": {"tile": 7},
    "tiles, released, gated": {"kernel": "rbf", "mode": "released", "tile": 10, "zero_init": True, "heads": 1},
    "tiles, softmax": {"softmax": True, "tile": 8, "keep": 0.5},
    "own kernel, all kept": {"kernel": lambda p, q: jnp.tanh(p @ q.T), "keep": 1, "heads": 4},
}
SLOW = {"tiles", "own kernel, all kept"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_values_and_gradients_equal_the_dense_formula(case):
    """In float64, of x W, x W^T and rows and columns of W."""
    with jax.enable_x64(True):
        adapter = snell(**{"rank": 4, "keep": 0.3, "scale": 1.0, "targets": "w", "dtype": jnp.float64, **CASES[case]})
        frozen, theta = prepared(adapter)
        count = int(constants_of(frozen)["w"]["count"])
        rows, columns = jnp.array([3, 3, 0]), jnp.array([[19, 1]])
        inputs = array(1, 5, N, dtype=jnp.float64), array(2, 5, M, dtype=jnp.float64)

        def products(theta, x, z):
            delta = delta_of(adapter, frozen, theta)
            dot = functools.partial(delta.dot, axes=Axes(), dtype=jnp.float64)
            take = functools.partial(delta.take, axes=Axes(), dtype=jnp.float64)
            return (
                dot(x, transpose=False),
                dot(z, transpose=True),
                take(rows, axis=-2),
                take(columns, axis=-1),
                delta.materialize(Axes()),
            )

        def reference(theta, x, z):
            w, _ = dense(adapter, theta["w"], count)
            return x @ w, z @ w.T, w[rows], w.T[columns], w

        @jax.jit
        def both(theta):
            results = []
            for fn in (products, reference):
                y, back = jax.vjp(fn, theta, *inputs)
                results.append((y, back(jax.tree.map(jnp.cos, y))))
            return results

        actual, expected = both(theta)
        assert_close(actual, expected, 1e-12)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(actual))


def test_a_gated_adapter_starts_as_the_base():
    adapter = snell(4, zero_init=True, targets="w")
    frozen, theta = adapter.prepare(KEY, {"w": array(0, N, M)})
    np.testing.assert_array_equal(adapter.attach(frozen, theta)["w"].materialize(), array(0, N, M))


def test_equal_points_have_no_derivative():
    adapter = snell(4, keep=1, heads=1, targets="w")
    frozen, theta = prepared(adapter)
    theta["w"]["q"] = theta["w"]["q"].at[0, 1].set(theta["w"]["p"][0, 2])
    grad = jax.jit(jax.grad(lambda theta: delta_of(adapter, frozen, theta).materialize(Axes())[2, 1]))(theta)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("tile", [7, 256])
def test_as_many_entries_are_kept_as_asked(tile):
    adapter = snell(8, keep=0.1, tile=tile, targets="w")
    frozen, theta = prepared(adapter, 2)
    assert constants_of(frozen)["w"]["count"].tolist() == [24, 24]  # ceil(0.1 * 12 * 20)

    @jax.jit
    def materialize(frozen):
        return delta_of(adapter, frozen, theta).materialize(Axes())

    every = materialize(adapter.with_counts(frozen, {"w": [N * M, N * M]}))
    for counts in ([1, 2], [24, 200], [239, 240]):
        w = np.asarray(materialize(adapter.with_counts(frozen, {"w": counts})))
        assert np.count_nonzero(w, (1, 2)).tolist() == counts
        for i in range(2):
            bar = np.sort(np.abs(every[i]).ravel())[-counts[i]]
            np.testing.assert_array_equal(w[i], np.where(np.abs(every[i]) >= bar, every[i], 0))
    for keep in (1e-9, 0.37, 0.99):
        sizes = constants_of(snell(8, keep=keep, targets="w").prepare(KEY, {"w": every})[0])
        assert sizes["w"]["count"].tolist() == [math.ceil(keep * (N * M))] * 2


def test_ties_are_kept_together():
    adapter = snell(2, "linear", 0.5, heads=1, scale=1.0, targets="w")
    frozen, theta = prepared(adapter)
    theta = {"w": {"p": jnp.ones((1, N, 2)), "q": jnp.ones((1, M, 2)).at[:, : M // 4].set(2.0)}}
    w = delta_of(adapter, frozen, theta).materialize(Axes())
    assert np.all(w == jnp.where(jnp.arange(M) < M // 4, 4.0, 2.0))  # half would cut the 2s apart
    few = adapter.with_counts(frozen, {"w": 3})
    w = delta_of(adapter, few, theta).materialize(Axes())
    assert np.all(w == jnp.where(jnp.arange(M) < M // 4, 4.0, 0.0))


def test_the_short_threshold_keeps_a_little_more():
    settings = {"rank": 8, "keep": 0.4, "targets": "w"}
    exact, short = snell(**settings), snell(**settings, threshold="bfloat16")
    frozen, theta = prepared(exact)
    count = int(constants_of(frozen)["w"]["count"])
    _, every = dense(exact, theta["w"], count)
    kept = np.asarray(delta_of(short, frozen, theta).materialize(Axes())) != 0
    magnitudes = np.abs(np.asarray(every))
    bar = np.sort(magnitudes.ravel())[-count]
    assert np.all(kept[magnitudes >= bar]) and not np.any(kept[magnitudes < bar * (1 - 1 / 128)])


def test_a_linear_kernel_with_all_entries_is_lora():
    rank = 6
    adapter = snell(rank, "linear", 1, heads=2, scale=0.5, targets="w")
    frozen, theta = prepared(adapter, 2)
    p, q = theta["w"]["p"], theta["w"]["q"]
    a = jnp.concatenate([p[:, 0], p[:, 1]], -1)
    b = jnp.swapaxes(jnp.concatenate([q[:, 0], -q[:, 1]], -1), -1, -2)
    lora = adapters.lora(rank, 3, targets="w")
    expected = lora.attach({"w": array(0, 2, N, M)}, {"w": {"a": a, "b": b}})["w"].materialize()
    assert_close(adapter.attach(frozen, theta)["w"].materialize(), expected)


@pytest.mark.parametrize("kernel", ["pl2", "rbf"])
def test_the_rank_is_above_that_of_the_factors(kernel):
    adapter = snell(4, kernel, 0.5, targets="w")
    frozen, theta = prepared(adapter)
    w = np.asarray(delta_of(adapter, frozen, theta).materialize(Axes()), np.float64)
    assert np.linalg.matrix_rank(w, tol=1e-3 * np.linalg.norm(w)) == N


def test_a_convolution_uses_the_delta():
    tree, x = {"kernel": array(1, 3, 8, 6)}, array(2, 1, 5, 8)

    def apply(p, x):
        return lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    adapter = snell(4, scale=1.0, targets="*", axes={"kernel": ((0, 1), 2)})
    frozen, theta = adapter.prepare(KEY, tree)
    view = adapter.attach(frozen, moved(theta))["kernel"]
    actual, expected = jax.jit(lambda view, x: (lift(apply)({"kernel": view}, x), view.materialize()))(view, x)
    assert_close(actual, apply({"kernel": expected}, x), 5e-6)


def test_no_dense_delta_in_training():
    """Against LoRA, whose step keeps no dense delta either, a step needs some tiles more."""
    d, depth = 256, 3
    base = {"w": array(0, depth, d, d) / 16}

    def peak(adapter):
        frozen, theta = adapter.prepare(KEY, base)

        def loss(theta, frozen, x):
            apply = lift(lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0])
            return jnp.sum(apply(adapter.attach(frozen, theta), x))

        compiled = jax.jit(jax.grad(loss)).lower(theta, frozen, array(1, 4, d)).compile()
        return compiled_bytes(compiled).temp

    lora, tiled, whole = (
        peak(a) for a in (adapters.lora(4, targets="w"), *(snell(4, targets="w", tile=t) for t in (8, d)))
    )
    assert tiled - lora < 4 * d * d / 2, (tiled, lora)
    assert whole - lora > 4 * d * d, (whole, lora)


def test_initial_factors():
    adapter = snell(8, heads=2, targets="w")
    theta = adapter.init(KEY, {"w": jnp.zeros((3, 100, 400))})["w"]
    assert theta["p"].shape == (3, 2, 100, 4) and theta["q"].shape == (3, 2, 400, 4)
    for factor, d in ((theta["p"], 100), (theta["q"], 400)):
        bound = (4 * d) ** -0.5
        assert 0.95 * bound < np.abs(factor).max() <= bound and np.std(factor) == pytest.approx(
            bound / 3**0.5, rel=0.05
        )
    mixed = snella(8, targets="w", zero_init=True).init(KEY, {"w": jnp.zeros((3, 10, 10))})["w"]
    assert not np.any(mixed["gate"]) and mixed["mix"].tolist() == [[1, 1, 0]] * 3


# ---- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_follows_the_importance_of_factors():
    adapter = snella(4, targets="*")
    tree = {"w": array(0, 3, 16, 16), "v": array(1, 8, 8)}
    frozen, theta = adapter.prepare(KEY, tree)
    strength = {"w": np.array([5.0, 1.0, 0.3])[:, None, None, None], "v": 0.2}
    state, history = init_budget(theta), []
    start, update = jax.tree.map(np.asarray, theta), jax.jit(update_budget)
    for t in range(4):
        grads = {
            p: {n: s * np.asarray(array(t + i, *start[p][n].shape)) for i, n in enumerate("pq")}
            for p, s in strength.items()
        }
        state = update(state, theta, grads)
        history.append({p: {n: np.abs(start[p][n] * grads[p][n]) for n in "pq"} for p in theta})
    scores = {}
    for path in theta:
        importance = uncertainty = {"p": 0.0, "q": 0.0}
        for now in history:
            importance = {n: 0.85 * importance[n] + 0.15 * now[path][n] for n in "pq"}
            uncertainty = {n: 0.85 * uncertainty[n] + 0.15 * np.abs(now[path][n] - importance[n]) for n in "pq"}
        scores[path] = sum(np.mean(importance[n] * uncertainty[n], (-1, -2, -3)) for n in "pq")
    sizes, total_size = {"w": 256, "v": 64}, 3 * 256 + 64
    for step, keep in ((0, 0.99), (50, 0.2 + 0.79 / 8), (100, 0.2)):
        counts = allocate_budget(state, frozen, step, 100)
        total = math.floor(keep * total_size)
        assert sum(int(c.sum()) for c in counts.values()) == total
        assert all(np.all((c >= 1) & (c <= sizes[path])) for path, c in counts.items())
        assert counts["w"][0] >= counts["w"][1] >= counts["w"][2]
    free = total - 256 - 3  # at the end the first matrix is full; the others share by score, from one entry up
    rest = np.array([scores["w"][1], scores["w"][2], scores["v"]], np.float64)
    assert counts["w"][0] < 256 or np.allclose(
        [counts["w"][1], counts["w"][2], counts["v"]], 1 + free * rest / rest.sum(), atol=1
    )
    fewer = adapter.with_counts(frozen, counts)
    for path, count in counts.items():
        assert np.array_equal(constants_of(fewer)[path]["count"], count)
    assert jax.tree.structure(fewer) == jax.tree.structure(frozen)  # nothing compiles again


def test_a_budget_that_overflows_goes_to_the_others():
    from memjax.adapters.snell import _fill

    sizes = np.array([100, 100, 100, 100])
    assert _fill(np.array([1000.0, 1.0, 1.0, 2.0]), sizes, 200).tolist() == [100, 25, 25, 50]
    assert _fill(np.array([1.0, 0.0, 0.0, 0.0]), sizes, 400).tolist() == [100] * 4
    assert _fill(np.zeros(4), sizes, 100).tolist() == [25] * 4
    assert _fill(np.array([1.0, 0.0, 0.0, 0.0]), sizes, 2).tolist() == [1] * 4


# ---- messages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"heads": 3}, "heads must divide rank, got 3 and 8"),
        ({"kernel": "l1"}, "kernel must be one of .* got 'l1'"),
        ({"keep": 0}, r"keep must be in \(0, 1\], got 0"),
        ({"mode": "fast"}, "mode must be"),
        ({"threshold": "float16"}, "threshold must be"),
        ({"tile": 0}, "tile must be"),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        snell(**settings)


def test_what_does_not_fit_raises(tmp_path):
    adapter = snell(4, targets="w")
    frozen, theta = prepared(adapter, 2)
    with pytest.raises(ValueError, match=r"w: expected counts of shape \(2,\), got \(\)"):
        adapter.with_counts(frozen, {"w": 3})
    with pytest.raises(ValueError, match="w: expected the frozen tree of"):
        adapter.with_counts({"w": jnp.zeros((2, N, M))}, {"w": [3, 3]})
    with pytest.raises(ValueError, match="keep=1 keeps every entry"):
        snell(keep=1).with_counts(frozen, {"w": [3, 3]})
    with pytest.raises(ValueError, match="fewer than 2"):
        adapter.nbytes({"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)})
    own = snell(4, lambda p, q: p @ q.T, targets="w")
    with pytest.raises(ValueError, match="a kernel given as a function cannot be saved"):
        own.save(tmp_path, theta, frozen)
