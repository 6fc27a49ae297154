"""GaLore, Q-GaLore, Fira, APOLLO and LDAdam: the references' rules, limit cases, and what each is named for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import optim
from memjax.codecs import int4
from memjax.core import Axes, compiled_bytes, nbytes
from memjax.optim import low_rank
from memjax.optim.apollo import random_projection
from tests.optim import low_rank_reference as reference

STEPS, GAP, RANK = 50, 20, 4
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (12, 12), "stack": (2, 12, 20)}
FEW = {"tall": (20, 12), "stack": (2, 12, 20)}
CODEC = int4(16, symmetric=False)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def gradients(steps, shapes=FEW):
    """Float64 gradients ``[steps, ...]``: a slowly turning part of low rank and noise, so that spectra have gaps."""
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        *batch, m, n = shape
        u, v = normal(*batch, m, 6, seed=seed), normal(*batch, 6, n, seed=seed + 50)
        turn = normal(steps, *batch, m, n, seed=seed + 100)
        found[name] = (u * 1.6 ** -np.arange(6)) @ v + 0.3 * turn
    return found


def run(tx, g, params=None):
    """Updates of all steps, stacked, and the last state; one compiled scan."""
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    params = jax.tree.map(lambda x: x[0], g) if params is None else params

    def body(state, g):
        updates, state = tx.update(g, state, params)
        return state, (updates, state)

    return jax.jit(lambda g: jax.lax.scan(body, tx.init(params), g)[1])(g)


def rules(make, g):
    """Updates of one NumPy rule per matrix; ``make(name, number of the matrix)``."""
    updates, number = {}, 0
    for name in sorted(g):
        steps = g[name].reshape(len(g[name]), -1, *g[name].shape[-2:])
        slices = []
        for b in range(steps.shape[1]):
            rule = make(name, number)
            slices.append(np.stack([rule(x.T).T for x in steps[:, b]]))
            number += 1
        updates[name] = np.stack(slices, axis=1).reshape(g[name].shape)
    return updates


def assert_follows(found, wanted, tolerance=1e-5):
    for name in wanted:
        error = np.abs(np.asarray(found[name], np.float64) - wanted[name]).max() / np.abs(wanted[name]).max()
        assert error < tolerance, (name, error)


def apollo_projections(name, number, rank, shapes=SHAPES):
    projection = {p.index: p for p in low_rank.projections(shape_tree(shapes), rank, "short")}[
        sorted(shapes).index(name)
    ]
    projections = []
    for epoch in range(-(-STEPS // GAP)):
        words = low_rank.matrix_words(projection, 0, jnp.int32(epoch))
        projections.append(np.asarray(random_projection(words, projection)[number - projection.first], np.float64))
    return projections


def shape_tree(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def encode(basis):
    return np.asarray(CODEC.encode(jnp.asarray(basis, jnp.float32), axes=(-2, -1)).decode(), np.float64)


RULES = {
    "galore": (
        optim.scale_by_galore(RANK, GAP, method="svd", stagger=False),
        lambda name, number: reference.GaLore(RANK, GAP),
    ),
    "galore-eigh": (
        optim.scale_by_galore(RANK, GAP, stagger=False),
        lambda name, number: reference.GaLore(RANK, GAP),
    ),
    "q_galore": (
        optim.scale_by_q_galore(RANK, 5, codec=CODEC, window=2, method="svd", stagger=False),
        lambda name, number: reference.QGaLore(RANK, 5, encode, window=2),
    ),
    "fira": (
        optim.scale_by_fira(RANK, GAP, method="svd", stagger=False),
        lambda name, number: reference.Fira(RANK, GAP),
    ),
    "apollo": (
        optim.scale_by_apollo(RANK, GAP),
        lambda name, number: reference.Apollo(GAP, apollo_projections(name, number, RANK)),
    ),
    "apollo-mini-front": (
        optim.scale_by_apollo(1, GAP, 128.0, "tensor", scale_front=True),
        lambda name, number: reference.Apollo(GAP, apollo_projections(name, number, 1), True, 128.0, True),
    ),
    "ldadam": (
        optim.scale_by_ldadam(RANK, error_dtype=jnp.float32, method="svd"),
        lambda name, number: reference.LDAdam(RANK),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_follows_the_rule_of_its_reference_over_two_switches(name):
    tx, make = RULES[name]
    g = gradients(STEPS, SHAPES)
    updates, states = run(tx, g)
    assert_follows(updates, rules(make, g))
    if name == "q_galore":
        gaps = np.concatenate([np.asarray(basis.gap[-1]) for basis in states.basis.values()])
        assert (gaps > 5).any()


def test_galore_of_full_rank_is_the_inner_optimizer_in_the_basis():
    g = gradients(6, SHAPES)
    tx = optim.scale_by_galore(1.0, 100, 1.0, inner=optax.scale_by_adam(), method="svd")
    updates, states = run(tx, g)
    bases = {name: np.asarray(basis[0] if name == "stack" else basis[0, 0]) for name, basis in states.basis.items()}
    inner, _ = run(
        optax.scale_by_adam(),
        {name: g[name] @ p if name == "tall" else np.swapaxes(p, -1, -2) @ g[name] for name, p in bases.items()},
    )
    for name, p in bases.items():
        back = np.asarray(inner[name]) @ p.T if name == "tall" else p @ np.asarray(inner[name])
        np.testing.assert_allclose(updates[name], back, atol=2e-5)


@pytest.mark.parametrize("method", ["svd", "eigh", "subspace_iteration"])
def test_a_gradient_of_low_rank_lies_in_its_subspace(method):
    g = {name: (normal(*s[:-1], 2) @ normal(*s[:-2], 2, s[-1], seed=1))[None] for name, s in FEW.items()}
    tx = optim.scale_by_galore(2, 5, 1.0, inner=optax.identity(), method=method)
    updates, states = run(tx, g)
    for name in g:
        np.testing.assert_allclose(updates[name], g[name], atol=1e-4)
        gram = np.einsum("tbsr,tbsq->tbrq", states.basis[name], states.basis[name])
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-5)


def test_random_bases_are_orthonormal_and_differ_by_matrix_and_epoch():
    _, states = run(optim.scale_by_galore(3, 2, method="random", stagger=False), gradients(4))
    bases = np.asarray(states.basis["stack"])
    np.testing.assert_allclose(np.swapaxes(bases, -1, -2) @ bases, np.tile(np.eye(3), (4, 2, 1, 1)), atol=1e-5)
    np.testing.assert_array_equal(bases[0], bases[1])
    assert np.abs(bases[1] - bases[2]).max() > 0.1 and np.abs(bases[0, 0] - bases[0, 1]).max() > 0.1


def test_staggered_searches_come_one_by_one_once_per_gap():
    g, gap = gradients(7), 3  # as many matrices as steps in a gap
    _, states = run(optim.scale_by_galore(2, gap), g)
    bases = np.concatenate([np.asarray(states.basis[name]).reshape(7, -1, 12 * 2) for name in sorted(g)], axis=1)
    changed = np.abs(np.diff(bases, axis=0)).max(-1) > 1e-6
    np.testing.assert_array_equal(changed[:gap].sum(0), 1)
    np.testing.assert_array_equal(changed[gap:].sum(0), 1)
    np.testing.assert_array_equal(changed.sum(1), 1)

    constant = {name: np.broadcast_to(x[:1], x.shape) for name, x in g.items()}
    staggered, together = (run(optim.scale_by_galore(2, gap, stagger=s), constant)[0] for s in (True, False))
    for name in g:
        np.testing.assert_allclose(staggered[name], together[name], atol=1e-6)


def test_side_names_the_axis_that_coordinates_replace():
    for side, shape in {"short": (1, 2, 20), "long": (1, 12, 2), "input": (1, 2, 20), "output": (1, 12, 2)}.items():
        (projection,) = low_rank.projections({"w": jax.ShapeDtypeStruct((12, 20), jnp.float32)}, 2, side)
        assert projection.coordinates_shape == shape
    heads = {"q": jax.ShapeDtypeStruct((3, 16, 4, 8), jnp.float32)}
    (projection,) = low_rank.projections(heads, 0.25, "short", axes={"q": Axes((-3,), (-2, -1))})
    assert projection.basis_shape == (3, 16, 4) and projection.coordinates_shape == (3, 4, 32)


def test_kernels_with_heads_are_the_matrices_they_stand_for():
    g = gradients(3, {"stack": (2, 12, 20)})
    flat, _ = run(optim.scale_by_fira(3, 2), g)
    axes = {"stack": Axes((-3,), (-2, -1))}
    heads, _ = run(optim.scale_by_fira(3, 2, axes=axes), {"stack": g["stack"].reshape(3, 2, 12, 4, 5)})
    np.testing.assert_allclose(heads["stack"].reshape(3, 2, 12, 20), flat["stack"], atol=1e-6)


def test_fira_without_a_residual_is_galore():
    g = gradients(6, {"tall": (20, 12)})
    exact, states = run(optim.scale_by_fira(1.0, 3, exact_residual=True, method="svd"), g)
    galore, _ = run(optim.scale_by_galore(1.0, 3, method="svd"), g)
    for name in g:
        np.testing.assert_allclose(exact[name], galore[name], atol=5e-3)
        assert np.asarray(states.norm[name]).max() < 1e-2 * np.linalg.norm(galore[name][0])


@pytest.mark.parametrize("make", [optim.scale_by_fira, optim.scale_by_apollo])
def test_norms_grow_by_a_hundredth_at_most(make):
    size = 1.5 ** np.arange(10)
    g = {name: x * size.reshape(-1, *[1] * (x.ndim - 1)) for name, x in gradients(10).items()}
    _, states = run(make(3, 4), g)
    for norm in states.norm.values():
        growth = np.asarray(norm)[1:] / np.asarray(norm)[:-1]
        assert growth.max() < 1.01001 and (growth > 1.00999).sum() > 3


@pytest.mark.parametrize("make", [optim.scale_by_fira, optim.scale_by_apollo])
def test_a_step_of_zeros_does_not_stop_the_next(make):
    g = gradients(3, {"wide": (12, 20)})
    g["wide"][1] = 0
    _, states = run(make(3, 4), g)
    norms = states.norm["wide"][:, 0]
    assert norms[1] == 0 and norms[2] > 0.1 * norms[0]


def test_apollo_of_rank_one_per_matrix_is_mini():
    g = gradients(5)
    params = jax.tree.map(lambda x: jnp.asarray(x[0], jnp.float32), g)
    mini, _ = run(optim.apollo_mini(0.1, 3), g, params)
    plain, _ = run(optim.apollo(0.1, 1, 3, 128.0, "tensor"), g, params)
    for name in g:
        np.testing.assert_array_equal(mini[name], plain[name])
    column = {"w": g["tall"][:, :, :1]}
    channel, _ = run(optim.scale_by_apollo(1, 3, side="input"), column)
    tensor, _ = run(optim.scale_by_apollo(1, 3, 1.0, "tensor", side="input"), column)
    np.testing.assert_allclose(channel["w"], tensor["w"], rtol=1e-6)


def test_apollo_scales_away_the_size_of_the_gradient():
    g = gradients(4)
    small, _ = run(optim.scale_by_apollo(3, 2, eps=0.0), g)
    large, _ = run(optim.scale_by_apollo(3, 2, eps=0.0), jax.tree.map(lambda x: 1e3 * x, g))
    for name in g:
        np.testing.assert_allclose(large[name], small[name], rtol=1e-4)


def test_apollo_projects_at_random_with_variance_one_over_rank():
    (projection,) = low_rank.projections({"w": jax.ShapeDtypeStruct((64, 512, 600), jnp.float32)}, 8, "short")
    p = np.asarray(random_projection(low_rank.matrix_words(projection, 1, jnp.int32(0)), projection))
    assert p.shape == (64, 512, 8)
    assert abs(p.mean()) < 3e-3 and abs(p.var() * 8 - 1) < 1e-2 and abs((p**4).mean() * 64 / 3 - 1) < 3e-2
    assert abs(np.corrcoef(p[0].ravel(), p[1].ravel())[0, 1]) < 0.06
    again = np.asarray(random_projection(low_rank.matrix_words(projection, 1, jnp.int32(1)), projection))
    assert abs(np.corrcoef(p.ravel(), again.ravel())[0, 1]) < 0.01


def test_ldadam_applies_or_keeps_every_gradient():
    g, b1 = gradients(12), 0.908
    _, states = run(optim.scale_by_ldadam(3, error_dtype=jnp.float32), g)
    for name in g:
        basis, mu = (np.asarray(x[name], np.float64) for x in (states.basis, states.mu))
        momentum = (basis @ mu) if name == "stack" else mu @ np.swapaxes(basis, -1, -2)
        momentum = momentum.reshape(g[name].shape)
        total = momentum.sum(0) + states.error[name][-1] + b1 / (1 - b1) * momentum[-1]
        np.testing.assert_allclose(total, g[name].sum(0), atol=2e-4)


def test_ldadam_without_feedback_keeps_no_error():
    g = gradients(8)
    updates, states = run(optim.scale_by_ldadam(3, error_dtype=None, method="svd"), g)
    assert not jax.tree.leaves(states.error)
    assert_follows(updates, rules(lambda name, number: reference.LDAdam(3, feedback=False), g))


def test_ldadam_in_a_subspace_that_stays_is_adam():
    """Gradients along the axes keep every basis along the axes, where full-rank LDAdam is Adam entry by entry."""
    g = {"w": np.eye(6, 9) * (3.0 ** -np.arange(6))[:, None] * (1 + 0.3 * normal(10, 6, 1, seed=3))}
    updates, _ = run(optim.scale_by_ldadam(1.0, error_dtype=jnp.float32), g)
    adam, _ = run(optax.scale_by_adam(0.908, 0.99), g)
    np.testing.assert_allclose(updates["w"], adam["w"], atol=1e-4)


@pytest.mark.parametrize("axis", [-2, -1])
def test_moments_move_with_the_basis(axis):
    shape = (2, 3, 7) if axis == -2 else (2, 7, 3)
    mu, nu = jnp.asarray(normal(*shape), jnp.float32), jnp.asarray(4 + normal(*shape, seed=1) ** 2, jnp.float32)
    still = jnp.broadcast_to(jnp.eye(3), (2, 3, 3))
    for found, wanted in zip(optim.transport_moments(mu, nu, still, axis, 0.3, 0.2), (mu, nu)):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    swapped = still[:, jnp.array([2, 0, 1])]
    for found, wanted in zip(optim.transport_moments(mu, nu, -swapped, axis), (-mu, nu)):
        np.testing.assert_allclose(found, jnp.take(wanted, jnp.array([2, 0, 1]), axis=axis), rtol=1e-5)


def test_q_galore_searches_less_where_the_subspace_stays():
    steady = {"w": np.broadcast_to(gradients(1, {"wide": (12, 20)})["wide"], (48, 12, 20))}
    _, states = run(optim.scale_by_q_galore(4, 2, codec=CODEC, window=3), steady)
    basis = states.basis["w"]
    # Searches at 0, 2, 4, 6 fill the window; from then on the gap doubles at each.
    np.testing.assert_array_equal(np.unique(basis.gap), [2, 4, 8, 16, 32])
    np.testing.assert_array_equal(np.flatnonzero(np.diff(basis.searches[:, 0])) + 1, [2, 4, 6, 8, 16, 32])
    restless = {"w": normal(20, 12, 20)}
    _, states = run(optim.scale_by_q_galore(4, 2, codec=CODEC, window=3, threshold=0.99), restless)
    assert (np.asarray(states.basis["w"].gap) == 2).all() and states.basis["w"].searches[-1, 0] == 10


def test_q_galore_is_galore_up_to_the_codes():
    g = gradients(6, {"wide": (12, 20)})
    exact, _ = run(optim.scale_by_galore(4, 3), g)
    for group, tolerance in ((8, 0.15), (48, 0.3)):
        coded, states = run(optim.scale_by_q_galore(4, 3, codec=int4(group, symmetric=False)), g)
        for name in g:
            difference = np.linalg.norm(coded[name] - exact[name]) / np.linalg.norm(exact[name])
            assert 1e-3 < difference < tolerance, (name, group, difference)
        assert states.basis["wide"].codes.planes[0].dtype == jnp.uint8


def test_state_bytes_of_known_shapes():
    params = shape_tree({"mlp": (32, 4096, 11008), "norm": (4096,)})
    params["mlp"] = jax.ShapeDtypeStruct((32, 4096, 11008), jnp.bfloat16)
    wanted = {
        optim.galore: (optim.galore_state_bytes, 32 * 128 * (2 * 4096 + 8 * 11008) + 8 * 4096 + 8),
        optim.fira: (optim.fira_state_bytes, 32 * (128 * (2 * 4096 + 8 * 11008) + 4) + 8 * 4096 + 4),
        optim.ldadam: (
            optim.ldadam_state_bytes,
            32 * (16 * (4 * 4096 + 8 * 11008) + 2 * 4096 * 11008) + 8 * 4096 + 4,
        ),
        optim.apollo: (optim.apollo_state_bytes, 32 * (8 * 1024 * 11008 + 4) + 8 * 4096 + 4),
        optim.q_galore: (
            optim.q_galore_state_bytes,
            32 * (128 * 4096 * 33 // 64 + 128 * 8 * 11008 + 4 * 4096 + 20 + 8) + 8 * 4096 + 8,
        ),
    }
    for make, (formula, size) in wanted.items():
        assert formula(params) == optim.init_bytes(make(), params) == size, make.__name__


@pytest.mark.parametrize("make", [optim.galore, optim.fira, optim.apollo, optim.ldadam, optim.q_galore])
def test_what_cannot_be_is_refused(make):
    params = {"layer": {"w": jnp.zeros((12, 20))}}
    with pytest.raises(ValueError, match=r"rank 13 .* layer/w, 12 x 20"):
        make(0.1, 13).init(params)
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank must be"):
            make(0.1, rank)
    with pytest.raises(ValueError, match="side must be one of short, long, input, output, got 'left'"):
        make(0.1, 4, side="left")


def test_options_of_one_method_are_checked():
    with pytest.raises(ValueError, match="update_gap must be a positive integer, got 0"):
        optim.galore(0.1, 4, 0)
    with pytest.raises(ValueError, match="method must be one of eigh, svd"):
        optim.fira(0.1, 4, method="qr")
    with pytest.raises(ValueError, match="scale_type must be one of channel, tensor"):
        optim.apollo(0.1, 4, scale_type="row")
    with pytest.raises(ValueError, match="seed must be"):
        optim.apollo(0.1, 4, seed=-1)
    with pytest.raises(ValueError, match="window and gap_growth"):
        optim.q_galore(0.1, 4, window=0)
    with pytest.raises(ValueError, match="layer/w: the codec does not fit its bases of shape"):
        optim.q_galore(0.1, 4).init({"layer": {"w": jnp.zeros((12, 20))}})


def test_applying_galore_by_matrix_is_the_chain_with_one_update_at_a_time():
    p = {"stack": jnp.asarray(normal(8, 64, 96), jnp.float32), "scale": jnp.ones((8,))}
    g = jax.tree.map(lambda x: jnp.asarray(normal(*x.shape, seed=1), jnp.float32), p)
    tx = optim.galore(0.01, 8, 3, weight_decay=0.1)

    def chain(p, state, g):
        updates, state = tx.update(g, (state, *tx.init(p)[1:]), p)
        return optax.apply_updates(p, updates), state[0]

    def fused(p, state, g):
        return optim.apply_galore(p, g, state, 0.01, 8, 3, weight_decay=0.1)

    state = optim.scale_by_galore(8, 3).init(p)
    compiled = [jax.jit(f, donate_argnums=(0, 1)).lower(p, state, g).compile() for f in (chain, fused)]
    whole, by_matrix = (compiled_bytes(c).temp / nbytes(p) for c in compiled)
    assert by_matrix < 0.45 and whole > 1
    (wanted, _), (found, _) = (c(*jax.tree.map(jnp.copy, (p, state)), g) for c in compiled)
    for name in p:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-7, atol=1e-7)
