"""Kernels of the cross-entropy: in the interpreter on a CPU, lowered for CUDA, and (marked gpu) on a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import (
    Slopes,
    exponentials,
    gradients_of_exponentials,
    kernel,
    logit_gradients,
    lse_and_target,
    slopes_of_loss,
    unsupported,
)
from pallas_kernels.linear_cross_entropy import api as linear_cross_entropy_api
from pallas_kernels.linear_cross_entropy.shapes import SHAPES, TOKENS

SCHEDULES = {
    "rows": kernel.Config(64, 64, "rows", 2, 1, 1),
    "columns": kernel.Config(64, 128, "columns", 3, 1, 2),
    "turns": kernel.Config(128, 64, "turns", 2, 1, 16),
    "cluster": kernel.Config(64, 64, "rows", 2, 2, 1),
}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"bias": True, "softcap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-2},
}


def operands(tokens, depth, vocabulary, w_axis, dtype=jnp.bfloat16, seed=0):
    """Returns random x, w, labels (the first and the last column, and none, among them), bias, and scales."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(tokens, depth)), dtype)
    w = rng.normal(size=(depth, vocabulary)) * 3 / np.sqrt(depth)
    w = jnp.asarray(w if w_axis == 0 else w.T, dtype)
    labels = rng.integers(0, vocabulary, tokens)
    labels[:6] = 0, vocabulary - 1, 63, 64, -100, vocabulary
    bias = jnp.asarray(rng.normal(size=vocabulary), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, tokens) * (labels >= 0) * (labels < vocabulary), jnp.float32)
    return x, w, jnp.asarray(labels, jnp.int32), bias, scale


def expected(x, w, labels, scale, *, w_axis, bias=None, softcap=None, label_smoothing=0.0, z_loss=0.0):
    """Returns lse, target, total, and the gradient of the loss for the products, in float64."""
    x, w, scale = (np.asarray(a, np.float64) for a in (x, w, scale))
    raw = x @ (w if w_axis == 0 else w.T) + (0 if bias is None else np.asarray(bias, np.float64))
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    peak = z.max(1, keepdims=True)
    lse = peak[:, 0] + np.log(np.exp(z - peak).sum(1))
    is_label = np.asarray(labels)[:, None] == np.arange(z.shape[1])
    slope = np.exp(z - lse[:, None]) * (1 + 2 * z_loss * lse[:, None])
    slope = slope - (1 - label_smoothing) * is_label - label_smoothing / z.shape[1]
    if softcap is not None:
        slope = slope * (1 - (z / softcap) ** 2)
    return lse, np.where(is_label, z, 0).sum(1), z.sum(1), slope * scale[:, None]


def off(actual, wanted):
    return np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)


def check(parts, w_axis, options, rounding, *, start=0, columns=None, both_at_once_only=False, **how):
    """Compares every function, or that for value and gradient at once, run as ``how`` says, with float64."""
    x, w, labels, bias, scale = parts
    options = {**options, "bias": bias if options.get("bias") else None}
    lse, target, total, dz = expected(x, w, labels, scale, w_axis=w_axis, **options)
    of_logits = {"bias": options["bias"], "softcap": options.get("softcap"), "w_axis": w_axis, **how}
    of_loss = {k: v for k, v in options.items() if k in ("softcap", "label_smoothing", "z_loss")}
    made = exponentials(x, w, labels, total=True, **of_logits)
    found = [made.statistics]
    if not both_at_once_only:
        found.append(lse_and_target(x, w, labels, **of_logits))
        assert found[1].total is None
    roundings = 3e-7 * dz.shape[1]  # one of each capped logit, all to one side
    np.testing.assert_allclose(made.statistics.total, total, rtol=1e-4, atol=1e-3 + roundings)
    for statistics in found:
        np.testing.assert_allclose(statistics.lse, lse, rtol=2e-6, atol=2e-5)
        np.testing.assert_allclose(statistics.target, target, rtol=2e-6, atol=2e-5)
    softcap = of_loss.pop("softcap", None)
    slopes = slopes_of_loss(scale, jnp.float32(lse), dz.shape[1], **of_loss)
    at_once = jax.jit(lambda made: gradients_of_exponentials(made, labels, slopes, softcap=softcap))(made)
    assert at_once.dtype == x.dtype and off(at_once, dz) < 2 * rounding
    if both_at_once_only:
        return
    slab = logit_gradients(x, w, labels, jnp.float32(lse), slopes, start=start, columns=columns, **of_logits)
    first = int(start)
    wanted = dz[:, first : None if columns is None else first + columns]
    assert slab.shape == wanted.shape and slab.dtype == x.dtype and off(slab, wanted) < rounding


@pytest.mark.parametrize("schedule, w_axis", [("rows", 0), ("columns", 1), ("turns", 0), ("cluster", 1)])
def test_every_way_to_cut_the_work_gives_the_same(schedule, w_axis, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_api, "multiprocessors", lambda: 4)
    parts = operands(75, 128, 192 if w_axis == 0 else 136, w_axis)
    how = {"implementation": "mosaic_gpu", "config": SCHEDULES[schedule], "interpret": True}
    check(parts, w_axis, {}, 3e-3, both_at_once_only=True, **how)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_equals_float64(name):
    check(operands(40, 64, 203, 1, jnp.float32), 1, OPTIONS[name], 1e-5, implementation="reference")


def test_the_interpreted_options_equal_float64(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_api, "multiprocessors", lambda: 2)
    how = {"implementation": "mosaic_gpu", "config": kernel.Config(64, 64, "rows", 2, 1, 1), "interpret": True}
    check(operands(30, 64, 320, 0), 0, OPTIONS["all"], 3e-3, start=jnp.int32(256), columns=50, **how)


def test_a_sure_label_keeps_its_gradient():
    """The label's probability minus one is not the difference of rounded numbers."""
    x = jnp.ones((4, 64), jnp.bfloat16)
    w = jnp.zeros((64, 128), jnp.bfloat16).at[:, 5].set(12 / 64)
    labels, scale = jnp.full(4, 5, jnp.int32), jnp.ones(4)
    exact = -127 / (127 + np.exp(12.0))
    how = {"implementation": "mosaic_gpu", "config": kernel.Config(64, 64, "rows", 2, 1, 1), "interpret": True}
    made = exponentials(x, w, labels, implementation="reference")
    for dz in (
        gradients_of_exponentials(made, labels, Slopes(scale, scale)),
        logit_gradients(x, w, labels, made.statistics.lse, Slopes(scale, scale), **how),
    ):
        np.testing.assert_allclose(np.asarray(dz[:, 5], np.float64), exact, rtol=4e-3)


def test_what_the_kernel_cannot_take_is_said():
    S = jax.ShapeDtypeStruct
    x = S((8, 64), jnp.bfloat16)
    assert unsupported(x, S((64, 128), jnp.bfloat16)) == []
    assert unsupported(x, S((88, 64), jnp.bfloat16), w_axis=1) == []
    assert "V = 80, which is no multiple of 64" in unsupported(x, S((64, 80), jnp.bfloat16))[0]
    assert "V = 81, which is no multiple of 8" in unsupported(x, S((81, 64), jnp.bfloat16), w_axis=1)[0]
    assert "float32" in unsupported(x, S((64, 128), jnp.float32))[0]
    assert "D is 96" in unsupported(S((8, 96), jnp.bfloat16), S((96, 128), jnp.bfloat16))[0]
    x, w, labels, _, scale = operands(8, 64, 264, 0)
    slopes = Slopes(scale, scale, scale)
    with pytest.raises(ValueError, match="cannot run: x is float32"):
        lse_and_target(x.astype(jnp.float32), w, labels, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="do not fit"):
        lse_and_target(x, w, labels, w_axis=1)
    with pytest.raises(ValueError, match="expected labels"):
        lse_and_target(x, w, labels[:3])
    with pytest.raises(ValueError, match="no slab"):
        logit_gradients(x, w, labels, scale, slopes, start=128)
    with pytest.raises(ValueError, match="number of columns"):
        logit_gradients(x, w, labels, scale, slopes, start=jnp.int32(0))
    made = exponentials(x, w, labels, softcap=60.0)
    with pytest.raises(ValueError, match="underflow"):
        gradients_of_exponentials(made, labels, slopes, softcap=60.0)


@pytest.mark.parametrize("name, options", [*((name, "plain") for name in SHAPES), ("llama-3.2-1b/tied", "all")])
def test_every_benchmark_shape_lowers_for_cuda(name, options):
    depth, vocabulary, w_axis = SHAPES[name]
    S, how = jax.ShapeDtypeStruct, {"w_axis": w_axis, "implementation": "mosaic_gpu"}
    extra = OPTIONS[options]
    logits = {"softcap": extra.get("softcap"), **how}
    if extra.get("bias"):
        logits["bias"] = jnp.zeros(vocabulary)
    w = S((depth, vocabulary) if w_axis == 0 else (vocabulary, depth), jnp.bfloat16)
    for tokens in (*TOKENS, 1003):
        config = linear_cross_entropy_api.heuristic(tokens, depth)
        assert kernel.smem_bytes(config, True) <= 232448 - 2048
        x, labels, row = S((tokens, depth), jnp.bfloat16), S((tokens,), jnp.int32), S((tokens,), jnp.float32)
        for run, arguments in (
            (lambda x, w, i: lse_and_target(x, w, i, total=True, **logits), (x, w, labels)),
            (lambda x, w, i: exponentials(x, w, i, **logits), (x, w, labels)),
            (
                lambda x, w, i, lse, s: logit_gradients(
                    x, w, i, lse, Slopes(s, s, s), start=8192, columns=8192, **logits
                ),
                (x, w, labels, row, row),
            ),
        ):
            jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("w_axis", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernels_on_a_device(name, w_axis):
    for tokens, depth, vocabulary in ((75, 128, 2112), (1000, 576, 8192 + 64), (513, 2048, 16384)):
        parts = operands(tokens, depth, vocabulary + (8 if w_axis else 0), w_axis)
        check(parts, w_axis, OPTIONS[name], 3e-3, implementation="mosaic_gpu")
        check(parts, w_axis, OPTIONS[name], 3e-3, implementation="mosaic_gpu", start=jnp.int32(1024), columns=1000)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_way_to_cut_the_work_on_a_device(schedule):
    for w_axis, dtype in ((0, jnp.bfloat16), (1, jnp.float16)):
        parts = operands(1100, 1024, 5056, w_axis, dtype)
        check(parts, w_axis, {}, 3e-3, implementation="mosaic_gpu", config=SCHEDULES[schedule])
