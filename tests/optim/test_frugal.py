"""FRUGAL against a plain transcription of its reference, and what its limits must equal."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax as mj
from memjax.core import compiled_bytes
from memjax.optim import tables
from memjax.optim.splits import Orthogonal, block_quotas, block_sequence
from pallas_kernels import optim

GAP, STEPS = 20, 50
RNG = np.random.default_rng(0)
SHAPES = {"stack": (3, 12, 16), "wide": (8, 24), "tall": (24, 8), "same": (8, 24), "norm": (12,), "lm_head": (8, 6)}
PARAMS = {name: np.float32(RNG.standard_normal(shape)) for name, shape in SHAPES.items()}
GRADS = [{name: np.float32(RNG.standard_normal(shape)) for name, shape in SHAPES.items()} for _ in range(STEPS)]
ROUTED = ("stack", "wide", "tall", "same")


@functools.cache
def masks(split, **settings):
    """Per subspace in use, a leaf's share of coordinates that have state, read from the updates of a plain sum."""
    tx = mj.optim.scale_by_frugal(0.25, split=split, update_gap=1, inner=optax.scale(100.0), **settings)
    ones = jax.tree.map(np.ones_like, PARAMS)
    swap = jax.jit(lambda: jax.lax.scan(lambda state, _: tx.update(ones, state)[::-1], tx.init(PARAMS), length=3)[1])
    out = swap()
    return [{name: np.asarray(out[name][i]) == 100 for name in ROUTED} for i in range(3)]


def reference(
    mask, *, b1=0.9, b2=0.999, eps=1e-8, lr=1e-2, decay=0.1, scale=0.5, subspace=0.3, free=np.sign, reset=True
):
    """The reference's rule with full-size moments in float64, and with masks for its projectors."""
    p = {name: np.float64(x) for name, x in PARAMS.items()}
    m, v = ({name: np.zeros_like(x) for name, x in p.items()} for _ in range(2))
    local = dict.fromkeys(p, 0)
    for t in range(STEPS):
        for name in p:
            routed = name in ROUTED
            if routed and t % GAP == 0 and reset:
                m[name][:], v[name][:], local[name] = 0, 0, 0
            on = mask[t // GAP][name] if routed else np.ones_like(p[name], bool)
            g = np.float64(GRADS[t][name])
            p[name] *= 1 - lr * decay
            local[name] += 1
            stateful = np.where(on, g, 0)
            m[name] = np.where(on, b1 * m[name] + (1 - b1) * stateful, 0)
            v[name] = np.where(on, b2 * v[name] + (1 - b2) * stateful**2, 0)
            u = m[name] / (1 - b1 ** local[name]) / (np.sqrt(v[name] / (1 - b2 ** local[name])) + eps)
            p[name] -= lr * (subspace if routed else 1) * (u + (scale * free(g - stateful) if routed else 0))
    return p


def train(tx, steps=STEPS):
    def body(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *x: np.stack(x), *GRADS[:steps])
    return jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), stacked)[0])(PARAMS)


def assert_near(found, wanted, start=PARAMS, rtol=1e-5):
    for name in found:
        error = np.abs(np.asarray(found[name]) - wanted[name]).max() / np.abs(wanted[name] - start[name]).max()
        assert error < rtol, (name, error)


@pytest.mark.parametrize(
    "split, settings",
    [
        ("columns", {}),
        ("columns", {"axis": "output", "group": 2}),
        ("columns", {"shards": 2}),
        ("randk", {}),
        ("blockwise", {}),
        ("blockwise", {"block_order": "mirror"}),
    ],
    ids=str,
)
def test_equals_a_transcription_of_the_reference_over_two_switches(split, settings):
    tx = mj.optim.frugal(
        1e-2, update_gap=GAP, split=split, weight_decay=0.1, state_free_scale=0.5, subspace_scale=0.3, **settings
    )
    assert_near(train(tx)[0], reference(masks(split, **settings)))


@pytest.mark.parametrize("split", ["svd", "eigh"])
def test_singular_subspaces_equal_a_transcription(split):
    """Moments in the basis of the last switch, sign descent on what is orthogonal to it."""
    tx = mj.optim.frugal(1e-2, 0.25, update_gap=GAP, split=split, state_free_scale=0.5, rules={"lm_head": "full"})
    found = train(tx)[0]
    for name, side in (("wide", 0), ("tall", 1)):
        p, b1, b2 = np.float64(PARAMS[name]), 0.9, 0.999
        for t in range(STEPS):
            g = np.float64(GRADS[t][name])
            if side:
                g = g.T
            if t % GAP == 0:
                basis, m, v, local = np.linalg.svd(g)[0][:, :2], 0, 0, 0
            r, local = basis.T @ g, local + 1
            m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
            u = basis @ (m / (1 - b1**local) / (np.sqrt(v / (1 - b2**local)) + 1e-8))
            step = u + 0.5 * np.sign(g - basis @ r)
            p -= 1e-2 * (step.T if side else step)
        assert_near({name: found[name]}, {name: p})


def test_moments_are_carried_into_a_new_basis():
    split = Orthogonal((1, 6, 8), 6, "random")
    rotation = np.linalg.qr(RNG.standard_normal((6, 6)))[0]
    before = jnp.eye(6)[None]
    carry = split.transport(before, jnp.asarray(rotation, jnp.float32)[None])
    moment = RNG.standard_normal((1, 6, 8))
    np.testing.assert_allclose(carry(jnp.float32(moment), False)[0], rotation.T @ moment[0], atol=1e-5)
    np.testing.assert_allclose(carry(jnp.float32(moment), True)[0], rotation.T**2 @ moment[0], atol=1e-5)
    same = split.transport(before, before)
    np.testing.assert_allclose(same(jnp.float32(moment), True), moment, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_moments_in_few_bits(bits):
    """Bytes by the formula, leaves that are kept whole too, and a path near that of float32 moments."""
    params = {"layers": {"kernel": jnp.ones((2, 64, 128))}, "embed_tokens": {"embedding": jnp.ones((64, 64))}}
    settings = {"update_gap": 2, "seed": 3}
    tx = mj.optim.scale_by_frugal(0.5, state_bits=bits, **settings)
    blocks = {2 * 32 * 128: {8: 256, 4: 128}[bits], 64 * 64: 64}
    moments = sum(2 * (size * bits // 8 + 4 * size // block) for size, block in blocks.items())
    assert mj.optim.init_bytes(tx, params) == moments + 4 * 2 * 64 + 3 * 4
    exact = mj.optim.scale_by_frugal(0.5, **settings)
    state, wanted = tx.init(params), exact.init(params)
    ours, theirs = jax.jit(tx.update), jax.jit(exact.update)
    for i in range(4):
        rng = np.random.default_rng(i)
        g = jax.tree.map(lambda p, rng=rng: np.float32(rng.standard_normal(p.shape)), params)
        found, state = ours(g, state, params)
        sound, wanted = theirs(g, wanted, params)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(sound)):
            assert np.linalg.norm(x - y) < {8: 0.05, 4: 0.35}[bits] * np.linalg.norm(y)


def test_sgd_as_state_free_part_and_moments_that_stay_where_they_stay_selected():
    settings = {"state_free": "sgd", "state_free_scale": 0.5, "subspace_scale": 0.3, "weight_decay": 0.1}
    found = train(mj.optim.frugal(1e-2, update_gap=GAP, on_switch="project", **settings))[0]
    assert_near(found, reference(masks("columns"), free=lambda g: g, reset=False))
    kept = train(mj.optim.frugal(1e-2, update_gap=GAP, on_switch="keep", **settings))[0]
    reset = train(mj.optim.frugal(1e-2, update_gap=GAP, **settings))[0]
    for name in ROUTED:
        assert not np.allclose(kept[name], found[name]) and not np.allclose(reset[name], found[name])


@pytest.mark.parametrize(
    "split, inner",
    [("columns", optax.scale_by_adam()), ("blockwise", optax.scale_by_lion()), ("randk", optax.trace(0.9))],
    ids=["adam", "lion", "sgdm"],
)
def test_density_one_is_the_inner_transform_bitwise(split, inner):
    tx = mj.optim.scale_by_frugal(1.0, split=split, inner=inner, update_gap=2)
    found, state = tx.init(PARAMS), inner.init(PARAMS)
    ours, theirs = jax.jit(tx.update), jax.jit(inner.update)
    for i in range(3):
        got, found = ours(GRADS[i], found, PARAMS)
        wanted, state = theirs(GRADS[i], state, PARAMS)
        assert jax.tree.all(jax.tree.map(np.array_equal, got, wanted))


@pytest.mark.parametrize("split", ["columns", "blockwise", "randk"])
def test_density_zero_is_the_state_free_part_bitwise(split):
    routed = {name: PARAMS[name] for name in ROUTED}
    g = {name: GRADS[0][name] for name in ROUTED}
    g["wide"][0, 0] = 0
    for free, wanted in (("sign", jax.tree.map(np.sign, g)), ("sgd", g), ("none", jax.tree.map(np.zeros_like, g))):
        tx = mj.optim.scale_by_frugal(0.0, split=split, state_free=free)
        state = tx.init(routed)
        assert mj.optim.state_bytes(state) == 4 + 4
        assert jax.tree.all(jax.tree.map(np.array_equal, tx.update(g, state)[0], wanted))


def test_every_block_has_its_turn_once_in_a_pass_and_shares_are_kept():
    tx = mj.optim.scale_by_frugal(0.25, split="blockwise", update_gap=1, inner=optax.scale(100.0))
    p = {"a": jnp.ones((6, 4, 8)), "b": jnp.ones((4, 8)), "c": jnp.ones((4, 8)), "d": jnp.ones((2, 8, 8))}
    state, turns = tx.init(p), []
    assert block_quotas([8, 2], 0.25) == [2, 0]
    update = jax.jit(tx.update)
    for _ in range(8):
        out, state = update(p, state)
        turns.append(np.array([*out["a"][:, 0, 0], out["b"][0, 0], out["c"][0, 0]]) == 100)
        assert turns[-1].sum() == 2 and (out["d"] == 1).all()
    assert (np.sum(turns[:4], 0) == 1).all() and (np.sum(turns[4:], 0) == 1).all()
    assert list(block_sequence(5, "mirror")) == [0, 4, 1, 3, 2]
    assert block_quotas([5, 5, 5], 0.5) == [3, 3, 2] and block_quotas([1, 3, 7], 0.1) == [0, 0, 1]


def test_permuting_weights_and_table_permutes_the_update():
    tx = mj.optim.scale_by_frugal(0.25, update_gap=100)
    p, g = {"w": PARAMS["tall"]}, GRADS[0]["tall"]
    update = jax.jit(tx.update)
    _, state = update({"w": g}, jax.jit(tx.init)(p), p)
    mix = RNG.permutation(24)
    straight, _ = update({"w": g}, state, p)
    moved = state._replace(tables={"w": jnp.asarray(np.argsort(mix))[state.tables["w"]]})
    permuted, _ = update({"w": g[mix]}, moved, {"w": p["w"][mix]})
    np.testing.assert_array_equal(permuted["w"], straight["w"][mix])


def test_draws_differ_between_leaves_and_epochs_and_are_uniform():
    first, second, _ = masks("columns")
    assert (first["wide"] != first["same"]).any() and (first["wide"] != second["wide"]).any()
    assert all((m["stack"].mean((1, 2)) == 0.25).all() for m in (first, second))
    orders = jax.vmap(lambda e: tables.random_order(tables.leaf_words(7, 0, e), (16,)))(jnp.arange(2000))
    counts = np.bincount(np.asarray(orders[:, :4]).ravel(), minlength=16)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)
    assert (jnp.take_along_axis(orders, tables.positions(orders), -1) == jnp.arange(16)).all()


def test_staggered_leaves_switch_one_after_the_other():
    assert [tables.stagger_offset(i, 4, 10) for i in range(4)] == [0, 2, 5, 7]
    count = jnp.arange(40)
    due, epoch = tables.is_due(count, 10, 7), tables.epoch(count, 10, 7)
    assert list(count[due]) == [0, 7, 17, 27, 37]
    assert (np.cumsum(due) - 1 == epoch).all()


def test_the_lines_of_the_design_on_params_and_on_adapters():
    tx = optax.chain(optax.clip_by_global_norm(1.0), mj.optim.frugal(1e-3, density=0.25))
    params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 16, 8))}}, "embed_tokens": {"embedding": jnp.ones((10, 16))}}
    theta = mj.adapters.lora(rank=4, alpha=8, targets="**/kernel").init(jax.random.key(0), params)
    for tree, split in ((params, 2 * 16 * 8), (theta, 2 * (16 * 4 + 4 * 8))):
        updates, state = jax.jit(lambda tree: tx.update(tree, tx.init(tree), tree))(tree)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
        moments = [x.size for x in jax.tree.leaves(state[1][0].moments) if x.ndim]
        assert sum(moments) == 2 * split // 4


def test_densities_by_pattern_as_in_the_glue_setting():
    names = ("q_proj", "k_proj", "v_proj", "up_proj")
    params = {name: {"kernel": jnp.ones((768, 4))} for name in names} | {"classifier": {"kernel": jnp.ones((4, 2))}}
    tx = mj.optim.scale_by_frugal({"{q,v}_proj/kernel": 8 / 768, "**": 0.0}, state_free_scale=0.1)
    state = jax.eval_shape(tx.init, params)
    assert mj.optim.state_bytes(state.moments) == 2 * (2 * 4 * 8 * 4 + 4)
    with pytest.raises(ValueError, match="k_proj/kernel: no pattern of density"):
        mj.optim.scale_by_frugal({"{q,v}_proj/kernel": 0.25}).init(params)


@pytest.mark.parametrize("settings", [{}, {"split": "blockwise"}], ids=str)
def test_fused_apply_equals_the_chain_bitwise(settings):
    tx = mj.optim.frugal(1e-2, 0.25, weight_decay=0.1, update_gap=2, **settings)
    p, q = PARAMS, PARAMS
    chain = tx.init(p)
    state = mj.optim.scale_by_frugal(0.25, update_gap=2, **settings).init(p)

    @jax.jit
    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    @jax.jit
    def apply(p, state, g):
        return mj.optim.apply_frugal(p, g, state, 1e-2, weight_decay=0.1, density=0.25, update_gap=2, **settings)

    for i in range(3):
        p, chain = step(p, chain, GRADS[i])
        q, state = apply(q, state, GRADS[i])
        assert jax.tree.all(jax.tree.map(np.array_equal, p, q))


@pytest.mark.parametrize(
    "settings",
    [
        {"subspace_scale": 0.5, "state_free_scale": 0.3},
        {"axis": "output", "group": 4, "on_switch": "keep"},
        {"shards": 2, "group": 2, "stagger": True},
        {"split": "blockwise"},
    ],
    ids=str,
)
def test_the_kernel_gets_runs_places_and_scalars_that_give_the_same_step(settings, monkeypatch):
    """The kernel's plain form in its place; the kernel itself is compared with that form where it is tested."""
    module = importlib.import_module("memjax.optim.frugal")
    plain = functools.partial(optim.frugal_adam_step, implementation="xla")
    taken = []
    monkeypatch.setattr(module, "_step_by_kernel", lambda *args: taken.append(args[0].shape) or plain(*args))
    params = {"stack": PARAMS["stack"], "tall": PARAMS["tall"]}
    settings = {"density": 0.5, "update_gap": 2, **settings}
    found = expected = params
    state = other = mj.optim.scale_by_frugal(**settings).init(params)
    steps = {
        name: jax.jit(
            functools.partial(mj.optim.apply_frugal, weight_decay=0.1, implementation=name, **settings),
            static_argnames="learning_rate",
        )
        for name in ("mosaic_gpu", "xla")
    }
    for i in range(4):
        g = {name: GRADS[i][name] for name in params}
        found, state = steps["mosaic_gpu"](found, g, state, learning_rate=1e-2)
        expected, other = steps["xla"](expected, g, other, learning_rate=1e-2)
    assert len(taken) == (1 if settings.get("split") else 2)  # both blocks with moments are of the stack
    for x, y in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, other))):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_what_the_kernel_has_not_is_said():
    p = {"wide": PARAMS["wide"]}
    for settings, message in (
        ({"state_bits": 8, "on_switch": "project"}, "the kernel has no state_bits=8, on_switch='project'"),
        ({"split": "randk"}, "the kernel has no RandK"),
    ):
        state = jax.eval_shape(mj.optim.scale_by_frugal(**settings).init, p)
        apply = functools.partial(mj.optim.apply_frugal, implementation="mosaic_gpu", **settings)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda state, apply=apply: apply(p, p, state, 1e-2), state)


@pytest.mark.parametrize(
    "settings, most",
    [({}, 0.3), ({"axis": "output"}, 0.3), ({"split": "blockwise"}, 0.3)],
    ids=str,
)
def test_temporaries_are_a_share_of_the_params(settings, most):
    params = {"layers": {name: jax.ShapeDtypeStruct((16, 128, 256), jnp.float32) for name in ("q", "up")}}
    tx = mj.optim.frugal(1e-3, 0.25, update_gap=5, **settings)

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    used = compiled_bytes(step.lower(params, jax.eval_shape(tx.init, params), params).compile())
    assert used.temp <= most * mj.core.nbytes(params)
    assert used.alias >= 1.49 * mj.core.nbytes(params)


def test_a_schedule_of_densities_by_resizing_at_switches():
    p, state = {name: PARAMS[name] for name in ("wide", "norm")}, None
    for i in range(6):
        if i % 2 == 0:
            tx = mj.optim.scale_by_frugal(0.5 - 0.0625 * i, update_gap=2)
            state = jax.jit(tx.init)(p) if state is None else mj.optim.resize_frugal(tx, state, p)
            update = jax.jit(tx.update)
        before = state
        _, state = update({name: GRADS[i][name] for name in p}, state, p)
        assert state.count == i + 1 and state.full.count == i + 1
        assert int(state.moments["wide"].count) == i % 2 + 1
        assert state.moments["wide"].mu.shape == (1, 4 - i // 2, 24)
        assert jax.tree.structure(before) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="tables of the state have shapes"):
        mj.optim.resize_frugal(mj.optim.scale_by_frugal(1.0), state, p)


def test_settings_that_do_not_fit_are_errors():
    for settings, message in (
        ({"split": "rows"}, "split must be one of"),
        ({"density": 1.5}, "density must be in"),
        ({"split": "randk", "group": 2}, "settings of split='columns'"),
        ({"block_order": "mirror"}, "setting of split='blockwise'"),
        ({"state_free": "adam"}, "state_free must be"),
        ({"on_switch": "rotate"}, "on_switch must be"),
        ({"update_gap": 0}, "update_gap must be"),
    ):
        with pytest.raises(ValueError, match=message):
            mj.optim.frugal(1e-3, **settings)
    with pytest.raises(ValueError, match=r"same: 1 shards of groups of 5 do not divide its 8 inputs"):
        mj.optim.frugal(1e-3, group=5, rules={"stack": "full", "tall": "full"}).init(PARAMS)
    with pytest.raises(ValueError, match="acts on no leaf"):
        mj.optim.frugal(1e-3).init({"norm": jnp.ones(4)})


def test_routing():
    tree = {
        "layers": {
            "q_proj": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))},
            "input_layernorm": {"scale": jnp.ones((2, 4))},
        },
        "embed_tokens": {"embedding": jnp.ones((8, 4))},
        "lm_head": {"kernel": jnp.ones((4, 8))},
        "x/kernel": {"a": jnp.ones((2, 4, 1)), "b": jnp.ones((2, 1, 4)), "m": jnp.ones((2, 4))},
    }
    labels = dict(mj.core.leaf_paths(mj.optim.label(tree)))
    assert {path for path, name in labels.items() if name == "subspace"} == {
        "layers/q_proj/kernel",
        "x/kernel/a",
        "x/kernel/b",
    }
    labels = dict(mj.core.leaf_paths(mj.optim.label(tree, {"embed_tokens/**": "subspace", "**/q_proj/*": "full"})))
    assert labels["embed_tokens/embedding"] == "subspace" and labels["layers/q_proj/kernel"] == "full"
    for rules, message in (
        ({"nothing": "full"}, "matches no leaf"),
        ({"**": "half"}, "expected 'subspace' or 'full'"),
    ):
        with pytest.raises(ValueError, match=message):
            mj.optim.label(tree, rules)
    with pytest.raises(ValueError, match="norm: a leaf of shape"):
        mj.optim.label(PARAMS, {"norm": "subspace"})


@pytest.mark.parametrize("split", ["columns", "randk", "random"])
def test_layer_by_layer_in_a_fused_step(split):
    params = {"layers": {"kernel": 0.3 * PARAMS["stack"][:, :, :12]}, "out": 0.3 * PARAMS["wide"][:, :12].T}
    parts = (
        lambda p, batch: batch,
        lambda layer, x, batch, index: jnp.tanh(x @ layer["kernel"]) + x,
        lambda p, x, batch: jnp.sum((x @ p["out"]) ** 2),
    )
    tx = mj.optim.frugal(1e-2, 0.25, split=split, update_gap=2)
    fused = jax.jit(mj.optim.fused_step(parts, tx))

    @jax.jit
    def plain(p, state, batch):
        def loss(p):
            x = jax.lax.scan(lambda x, layer: (parts[1](layer, x, batch, 0), None), batch, p["layers"])[0]
            return parts[2](p, x, batch)

        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    p, state, q, other = params, tx.init(params), params, tx.init(params)
    for i in range(3):
        batch = np.float32(np.random.default_rng(i).standard_normal((4, 12)))
        p, state = plain(p, state, batch)
        q, other, _ = fused(q, other, batch)
    for x, y in zip(jax.tree.leaves((p, state)), jax.tree.leaves((q, other))):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_leaves_with_axes_of_their_own():
    p = {"o": {"kernel": jnp.ones((4, 6, 8))}}  # [heads, head_dim, d]
    tx = mj.optim.scale_by_frugal(0.25, axes={"o/kernel": mj.core.Axes((-3, -2), (-1,))})
    state = tx.init(p)
    assert state.moments["o"]["kernel"].mu.shape == (1, 6, 8)
    out, _ = tx.update(p, state)
    assert out["o"]["kernel"].shape == (4, 6, 8)
