"""Low-rank error correction: closed form, kept teacher, measured inputs, and what it gives back to a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from memjax import adapters, weights
from memjax.codecs.grouped import Grouped
from memjax.core.bytes import nbytes
from tests.random_views import array, assert_close

INT2 = Grouped(2, 8, True, "bfloat16")


def params():
    return {"layers": {"kernel": array(0, 2, 16, 24)}, "head": {"kernel": array(1, 2, 8, 4, 6)}}


AXES = {"head/kernel": ((-3, -2), (-1,))}


def matrices(w):
    """Returns a weight of either leaf as [2, d_in, d_out]."""
    w = np.asarray(w, np.float64)
    return w.reshape(2, -1, w.shape[-1])


@pytest.mark.parametrize("weighted", [False, True])
def test_stage_0_is_the_best_correction_of_its_rank(weighted):
    dense = params()
    packed = weights.quantize(dense, INT2, axes=AXES)
    rms = {
        "layers/kernel": jnp.exp(array(2, 2, 16)),
        "head/kernel": jnp.exp(array(3, 2, 8, 4)),
    }
    adapter, theta = adapters.lrec_init(dense, packed, 3, rms if weighted else None)
    attached = weights.materialize(adapter.attach(packed, theta))
    decoded = weights.materialize(packed)
    for path in rms:
        name = path.split("/")[0]
        before = matrices(dense[name]["kernel"]) - matrices(decoded[name]["kernel"])
        after = matrices(dense[name]["kernel"]) - matrices(attached[name]["kernel"])
        scale = np.asarray(rms[path], np.float64).reshape(2, -1, 1) if weighted else np.ones((2, 1, 1))
        tail = np.linalg.svd(scale * before, compute_uv=False)[:, 3:]
        norms = np.linalg.norm(scale * after, axis=(1, 2))
        np.testing.assert_allclose(norms, np.linalg.norm(tail, axis=1), rtol=1e-4)
        assert (norms < np.linalg.norm(scale * before, axis=(1, 2))).all()
    assert nbytes(theta) == adapter.nbytes(packed).trained == 4 * 3 * 2 * ((16 + 24) + (32 + 6))
    dense["layers"]["kernel"] = jnp.zeros_like(dense["layers"]["kernel"])
    exact = weights.quantize(dense, INT2, "layers/kernel")
    zero = adapters.lrec_init(dense, exact, 2, {"layers/kernel": jnp.zeros((2, 16))}, "layers/kernel")[1]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(zero))


def test_full_rank_gives_the_float_weights_back():
    dense = {"kernel": array(0, 8, 6)}
    packed = weights.quantize(dense, INT2, "kernel")
    adapter, theta = adapters.lrec_init(dense, packed, 6, targets="kernel")
    assert_close(weights.materialize(adapter.attach(packed, theta)), dense, 3e-6)


def test_refusals():
    dense = params()
    packed = weights.quantize(dense, INT2, "layers/kernel")
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        adapters.lrec_init(dense, packed, 0)
    with pytest.raises(ValueError, match="head/kernel: expected a quantized weight"):
        adapters.lrec_init(dense, packed, 2)
    with pytest.raises(ValueError, match="layers/kernel: rank 17 is larger"):
        adapters.lrec_init(dense, packed, 17, targets="layers/kernel")
    with pytest.raises(ValueError, match="layers/kernel: expected the float weight"):
        adapters.lrec_init(packed, packed, 2, targets="layers/kernel")
    with pytest.raises(ValueError, match=r"act_rms needs an entry of shape \(2, 16\)"):
        adapters.lrec_init(dense, packed, 2, {}, "layers/kernel")
    top = adapters.teacher_topk(array(0, 3, 5), 2, 2.0)
    with pytest.raises(ValueError, match="temperature"):
        adapters.distill_loss(array(0, 3, 5), top)
    with pytest.raises(ValueError, match="expected k in 1 to 5"):
        adapters.teacher_topk(array(0, 3, 5), 6)


@pytest.mark.parametrize("k", [3, 8, 9])
def test_divergence_from_a_kept_top_k(k):
    t, vocabulary = 2.0, 9
    student, teacher = 3 * array(0, 2, 4, vocabulary), 3 * array(1, 2, 4, vocabulary)
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 1, 1]])
    p, q = (np.exp(np.asarray(x, np.float64) / t) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    best = np.argsort(-p, axis=-1)
    p, q = np.take_along_axis(p, best, -1), np.take_along_axis(q, best, -1)
    cut = [np.concatenate([x[..., :k], x[..., k:].sum(-1, keepdims=True)], -1)[..., : min(k + 1, 9)] for x in (p, q)]
    expected = (cut[0] * np.log(cut[0] / cut[1])).sum(-1)[np.asarray(mask) != 0].mean() * t**2

    @jax.jit
    def both(student, teacher):
        kept = adapters.teacher_topk(teacher, k, t)
        run = jax.value_and_grad(lambda student, teacher: adapters.distill_loss(student, teacher, mask, t))
        return kept, run(student, kept), run(student, teacher), run(teacher, kept)[0]

    kept, (value, gradient), (full, full_gradient), same = both(student, teacher)
    assert nbytes(kept) == 2 * 4 * (8 * k + 4)
    assert_close(value, expected)
    assert value <= full + 1e-6
    if k >= vocabulary - 1:
        assert_close((value, gradient), (full, full_gradient))
    assert np.isfinite(gradient).all()
    assert abs(float(same)) < 1e-5


def net(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"]["kernel"])
    return jnp.einsum("bhd,hdo->bo", (x @ params["wide"]["kernel"]).reshape(-1, 4, 6), params["head"]["kernel"])


def test_inputs_are_measured_through_scans_checkpoints_vmaps_and_views():
    tree = {
        "layers": {"kernel": array(0, 2, 8, 8)},
        "wide": {"kernel": array(1, 8, 24)},
        "head": {"kernel": array(2, 4, 6, 5)},
    }
    packed = weights.quantize(tree, INT2, "wide/kernel")
    dense = weights.materialize(packed)
    x = array(3, 7, 8)
    first = np.tanh(x @ dense["layers"]["kernel"][0])
    second = np.tanh(first @ dense["layers"]["kernel"][1])
    expected = {
        "layers/kernel": np.stack([np.sqrt(np.mean(np.square(h), 0)) for h in (np.asarray(x), first)]),
        "wide/kernel": np.sqrt(np.mean(np.square(second), 0)),
        "head/kernel": np.sqrt(np.mean(np.square(second @ dense["wide"]["kernel"]), 0)).reshape(4, 6),
    }
    axes = {"head/kernel": ((0, 1), (2,))}
    assert_close(adapters.act_rms(net, packed, x, axes=axes), expected)
    mapped = lambda params, x: jax.vmap(net, (None, 0))(params, x[:, None])  # noqa: E731
    assert_close(adapters.act_rms(mapped, packed, x, axes=axes), expected)
    with pytest.raises(ValueError, match="pattern 'tail' matches no leaf"):
        adapters.act_rms(lambda p: p, {"kernel": jnp.ones((2, 2))}, axes={"tail": (0, 1)})
    with pytest.raises(ValueError, match="wide/kernel: the outputs of the function do not depend"):
        adapters.act_rms(lambda p, x: x @ p["layers"]["kernel"][0], tree, x, where="wide/kernel")


def language_model(params, tokens):
    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    return lax.scan(layer, params["embedding"][tokens], params["layers"])[0] @ params["head"]


def test_correction_and_distillation_bring_a_model_back_to_its_float_self():
    params = {
        "embedding": array(0, 50, 16),
        "layers": {"up": array(1, 3, 16, 32) / 4, "down": array(2, 3, 32, 16) / 6},
        "head": array(3, 16, 50) / 4,
    }
    packed = weights.quantize(params, INT2, "layers/*")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (41, 64)))
    logits = jax.jit(language_model)(params, tokens)
    kept = adapters.teacher_topk(logits[:40], 8)
    rms = adapters.act_rms(language_model, params, tokens, where="layers/*")
    adapter, theta = adapters.lrec_init(params, packed, 3, rms, "layers/*")

    def loss(theta, tokens, teacher):
        return adapters.distill_loss(weights.lift(language_model)(adapter.attach(packed, theta), tokens), teacher)

    tx = optax.adam(5e-3)

    def step(carry, batch):
        theta, state = carry
        updates, state = tx.update(jax.grad(loss)(theta, *batch), state, theta)
        return (optax.apply_updates(theta, updates), state), None

    trained = jax.jit(lambda theta: lax.scan(step, (theta, tx.init(theta)), (tokens[:40], kept))[0][0])(theta)
    far = jax.jit(lambda theta: loss(theta, tokens[40], logits[40]))
    plain, stage_0, stage_1 = (float(far(x)) for x in (jax.tree.map(jnp.zeros_like, theta), theta, trained))
    assert 0 < stage_1 < 0.8 * stage_0 < 0.8 * 0.8 * plain  # the float model is 0
