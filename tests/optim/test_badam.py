"""BAdam and LISA: which layers train when, and gradients of those only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax as mj
from memjax.core import compiled_bytes
from memjax.optim.badam import LayerBlocks, block_value_and_grad

L, D = 4, 16
RNG = np.random.default_rng(0)


def make_params(layers=L, size=D):
    return {
        "layers": {
            "w": np.float32(RNG.standard_normal((layers, size, size)) * size**-0.5),
            "bias": np.float32(RNG.standard_normal((layers, size)) * 0.1),
        },
        "embed": {"embedding": np.float32(RNG.standard_normal((8, size)))},
        "head": {"kernel": np.float32(RNG.standard_normal((size, 3)) * 0.2)},
    }


PARAMS = make_params()
PARTS = (
    lambda p, batch: p["embed"]["embedding"][batch[0]],
    lambda layer, x, batch, index: x + jnp.tanh(x @ layer["w"] + layer["bias"]),
    lambda p, x, batch: jnp.mean((x @ p["head"]["kernel"] - batch[1]) ** 2),
)
BATCHES = [(RNG.integers(0, 8, 6), np.float32(RNG.standard_normal((6, 3)))) for _ in range(12)]


def loss_of(p, batch):
    def layer(x, slices):
        return PARTS[1](slices, x, batch, 0), None

    return PARTS[2](p, jax.lax.scan(layer, PARTS[0](p, batch), p["layers"])[0], batch)


def reference(steps, active_at, *, every, outer=(), lr=1e-2, decay=0.1):
    """Adam in float64 on the layers that are active, reset at each switch; gradients from jax."""
    p = jax.tree.map(np.float64, PARAMS)
    grad = jax.jit(jax.grad(loss_of))
    names = [("layers", "w"), ("layers", "bias"), ("embed", "embedding"), ("head", "kernel")]
    m, v, local = {}, {}, {}
    for t in range(steps):
        grads = grad(jax.tree.map(np.float32, p), BATCHES[t])
        for a, b in names:
            if a != "layers" and a not in outer:
                continue
            if (a != "layers" and t == 0) or (a == "layers" and t % every == 0):
                m[b], v[b], local[b] = np.zeros_like(p[a][b]), np.zeros_like(p[a][b]), 0
            local[b] += 1
            g = np.float64(grads[a][b])
            m[b], v[b] = 0.9 * m[b] + 0.1 * g, 0.999 * v[b] + 0.001 * g**2
            u = m[b] / (1 - 0.9 ** local[b]) / (np.sqrt(v[b] / (1 - 0.999 ** local[b])) + 1e-8)
            u = u + decay * p[a][b] * (b != "bias")
            rows = active_at[t // every] if a == "layers" else slice(None)
            p[a][b][rows] -= lr * u[rows]
    return p


def chosen(blocks, epochs):
    return [np.asarray(blocks.choose(jnp.int32(e * blocks.switch_every), L)) for e in range(epochs)]


@pytest.mark.parametrize("method", ["badam", "lisa"])
def test_equal_a_transcription_with_whole_gradients_and_with_the_blocks_only(method):
    settings = {"active": 2, "weight_decay": 0.1, "seed": 3, "always": "head/**" if method == "badam" else "**"}
    blocks = LayerBlocks(4, 2, "random" if method == "badam" else "independent", settings["always"], seed=3)
    wanted = reference(12, chosen(blocks, 3), every=4, outer=("head",) if method == "badam" else ("head", "embed"))
    make, make_step = getattr(mj.optim, method), getattr(mj.optim, f"{method}_step")
    tx, (init, step) = make(1e-2, 4, **settings), make_step(PARTS, 1e-2, 4, **settings)

    @jax.jit
    def plain(p, state, batch):
        updates, state = tx.update(jax.grad(loss_of)(p, batch), state, p)
        return optax.apply_updates(p, updates), state

    p, state, q, other = PARAMS, tx.init(PARAMS), PARAMS, init(PARAMS)
    step = jax.jit(step)
    for batch in BATCHES:
        expected = loss_of(q, batch)
        p, state = plain(p, state, batch)
        q, other, loss = step(q, other, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found in (p, q):
        for (path, x), (_, y) in zip(mj.core.leaf_paths(found), mj.core.leaf_paths(wanted)):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5, err_msg=path)


def test_gradients_equal_slices_of_the_whole_gradient():
    blocks = LayerBlocks(always="**")
    whole = jax.jit(jax.grad(loss_of))(PARAMS, BATCHES[0])
    found = jax.jit(block_value_and_grad(PARTS, blocks))
    for active in ([2, 0], [3, 1]):
        _, grads, outer = found(PARAMS, jnp.int32(active), BATCHES[0])
        layers = jax.tree.map(lambda g, rows=tuple(active): g[np.array(rows)], whole["layers"])
        wanted = layers, {name: whole[name] for name in outer}
        for x, y in zip(jax.tree.leaves((grads, outer)), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_layers_that_are_not_active_stay_bit_for_bit():
    init, step = mj.optim.badam_step(PARTS, 1e-2, 3, order="ascending", weight_decay=0.1)
    p, state = jax.tree.map(jnp.asarray, PARAMS), init(PARAMS)
    step = jax.jit(step)
    for i in range(6):
        before = p
        p, state, _ = step(p, state, BATCHES[i])
        changed = np.any(np.asarray(p["layers"]["w"] != before["layers"]["w"]), axis=(1, 2))
        assert list(np.flatnonzero(changed)) == [i // 3]
        for name in ("embed", "head"):
            assert jax.tree.all(jax.tree.map(np.array_equal, p[name], PARAMS[name]))


def test_every_layer_has_its_turn():
    for order in ("random", "ascending", "descending", "mirror"):
        turns = np.concatenate(chosen(LayerBlocks(5, 2, order), 4)).reshape(2, L)
        assert (np.sort(turns) == np.arange(L)).all()
    drawn = chosen(LayerBlocks(1, 2, "independent"), 40)
    assert all(len(set(pair)) == 2 for pair in map(list, drawn))
    assert set(np.concatenate(drawn)) == set(range(L)) and len({tuple(sorted(pair)) for pair in map(list, drawn)}) > 3


def test_all_layers_active_without_a_switch_is_adam():
    tx, adam = mj.optim.badam(1e-2, 100, active=L, always="**"), optax.adam(1e-2)
    state, other = tx.init(PARAMS), adam.init(PARAMS)
    ours, theirs, grad = jax.jit(tx.update), jax.jit(adam.update), jax.jit(jax.grad(loss_of))
    for batch in BATCHES[:3]:
        g = grad(PARAMS, batch)
        found, state = ours(g, state, PARAMS)
        wanted, other = theirs(g, other, PARAMS)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_bf16_params_are_trained_on_float32_copies():
    init, step = mj.optim.badam_step(PARTS, 1e-5, 100)
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    state, step = init(p), jax.jit(step)
    assert mj.optim.state_bytes(state) == 12 * (D * D + D) + 3 * 4
    for _ in range(10):
        q, state, _ = step(p, state, BATCHES[0])
    moved = np.abs(np.asarray(state.master["layers"]["w"][0]) - np.float32(p["layers"]["w"]))
    assert moved[int(np.argmin(moved.sum((1, 2))))].max() > 5e-5
    assert q["layers"]["w"].dtype == jnp.bfloat16


def test_memory_is_that_of_the_block():
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), make_params(16, 128))
    init, step = mj.optim.badam_step(PARTS, 1e-2)
    state = jax.eval_shape(init, params)
    used = compiled_bytes(jax.jit(step, donate_argnums=(0, 1)).lower(params, state, BATCHES[0]).compile())
    assert used.temp < 0.3 * mj.core.nbytes(params["layers"])

    def whole(p, batch):
        return jax.tree.map(lambda p, g: p - g, p, jax.grad(loss_of)(p, batch))

    used = compiled_bytes(jax.jit(whole, donate_argnums=0).lower(params, BATCHES[0]).compile())
    assert used.temp > 0.9 * mj.core.nbytes(params["layers"])


def test_what_does_not_fit_is_an_error():
    for make, error, message in (
        (lambda: mj.optim.badam(1e-3, order="upwards"), ValueError, "order must be"),
        (lambda: mj.optim.badam(1e-3, 0), ValueError, "switch_every must be"),
        (lambda: mj.optim.lisa(1e-3, active=5).init(PARAMS), ValueError, "more than the 4 layers"),
        (lambda: mj.optim.badam(1e-3, layers="blocks").init(PARAMS), ValueError, "no stack of layers at 'blocks'"),
        (lambda: mj.optim.badam(1e-3, always="hea/**").init(PARAMS), ValueError, "matches no leaf"),
        (lambda: mj.optim.badam(1e-3).init([PARAMS]), TypeError, "must be a dict"),
    ):
        with pytest.raises(error, match=message):
            make()
