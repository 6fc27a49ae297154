import io

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

from memjax import adapters, codecs, models, weights
from memjax.core.bytes import CompiledBytes, compiled_bytes, nbytes
from memjax.models import LlamaConfig
from memjax.ops import linear_cross_entropy
from memjax.recipes import report
from memjax.recipes.data import Windows
from memjax.recipes.optimizers import gradient_bytes
from memjax.recipes.settings import FinetuneSettings, checked
from memjax.recipes.train import TrainState, make_step

B, S, CHUNK = 2, 128, 64


def config(layers):
    return LlamaConfig(1024, 64, 192, layers, 4, 2, 16, tie_embeddings=True)


def abstract_step(layers, remat, packed=True, mlp_chunk=None):
    """Returns (loss, theta, frozen, batch, state, step) of abstract arrays."""
    model = models.Model(config(layers))
    adapter = adapters.lora(rank=4, targets="**/*_proj/kernel")
    frozen = models.abstract(model.config)
    if packed:
        frozen = jax.eval_shape(lambda p: weights.quantize(p, codecs.int4(group=32), "**/*_proj/kernel"), frozen)

    def nll(params, batch):
        hidden = model.hidden(params, batch.inputs, remat=remat, mlp_chunk=mlp_chunk)
        weight, axis = model.head(params)
        options = {"weights": batch.weights, "w_axis": axis, "reduction": "sum", "chunk": CHUNK}
        return linear_cross_entropy(hidden, weight, batch.targets, **options), batch.weights.sum()

    def loss(theta, frozen, batch, key):
        return weights.lift(nll)(adapter.attach(frozen, theta), batch)

    theta = jax.eval_shape(lambda key: adapter.init(key, frozen), jax.random.key(0))
    tx = optax.adam(1e-3)
    state = jax.eval_shape(lambda theta: TrainState(theta, tx.init(theta), jnp.int32(0)), theta)
    tokens = jax.ShapeDtypeStruct((B, S), jnp.int32)
    batch = Windows(tokens, tokens, jax.ShapeDtypeStruct((B, S), jnp.float32))
    return loss, theta, frozen, batch, state, make_step(loss, tx)


@pytest.mark.parametrize("remat", ["full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("full-8bit", "none"))])
def test_residuals_grow_with_depth_as_compiled(remat):
    residual, compiled, kept = [], [], []
    for layers in (2, 10):
        loss, theta, frozen, batch, state, step = abstract_step(layers, remat)
        residual.append(report.residual_bytes(loss, theta, frozen, batch, jax.random.key(0)))
        compiled.append(compiled_bytes(step.lower(state, frozen, batch).compile()))
        kept.append(nbytes((frozen, state.theta, state.opt_state, theta)))
    grown = residual[1] - residual[0]
    if remat != "none":
        assert grown == 8 * B * S * 64 * {"full": 4, "full-8bit": 1 + 4 / 64}[remat]
    measured = (compiled[1].total - compiled[0].total) - (kept[1] - kept[0])
    # Beside residuals, the optimizer's update holds a part of the gradients' size.
    assert abs(measured - grown) < 0.03 * grown + nbytes(theta) / 2


@pytest.mark.parametrize("mlp_chunk", [None, pytest.param(32, marks=pytest.mark.slow)])
def test_formula_is_near_and_below_what_is_compiled(mlp_chunk):
    loss, theta, frozen, batch, state, step = abstract_step(4, "full", mlp_chunk=mlp_chunk)
    compiled = compiled_bytes(step.lower(state, frozen, batch).compile())
    activations = report.residual_bytes(loss, theta, frozen, batch, jax.random.key(0))
    activations += report.working_bytes(config(4), frozen, B, S, CHUNK, mlp_chunk=mlp_chunk)
    result = report.byte_report(frozen, state, compiled, activations)
    rows = {row.category: row for row in result.rows}
    assert list(rows) == [*report.CATEGORIES, "total"]
    packed = sum(leaf.nbytes for _, leaf in report.leaf_paths(frozen) if weights.is_view(leaf))
    assert rows["packed weights"].formula_bytes == packed
    assert rows["packed weights"].formula_bytes + rows["dense weights"].formula_bytes == nbytes(frozen)
    assert rows["gradients"].formula_bytes == rows["trained weights"].formula_bytes == nbytes(theta)
    assert rows["optimizer state"].formula_bytes == nbytes(state.opt_state)
    for field in ("formula_bytes", "compiled_bytes"):
        parts = [getattr(row, field) or 0 for row in result.rows[:-1]]
        assert sum(parts) == getattr(result.total, field)
    assert result.total.compiled_bytes == compiled.total
    assert 0.4 < result.total.formula_bytes / compiled.total <= 1
    assert result.total.measured_bytes > nbytes(frozen)


@pytest.mark.parametrize(
    ("settings", "outer", "layers"),
    [
        ({}, 1, 3),
        ({"accumulate": 2}, 2, 6),
        ({"optimizer": "frugal8bit", "fused": True, "clip": None}, 1, 1),
        ({"optimizer": "badam", "clip": None}, 0, 1),
        ({"optimizer": "lisa", "clip": None}, 1, 2),
        ({"optimizer": "mezo", "clip": None}, 0, 0),
    ],
)
def test_gradients_are_of_what_is_updated_at_a_time(settings, outer, layers):
    theta = {"layers": {"kernel": jnp.ones((3, 4, 8))}, "head": jnp.ones((8, 5), jnp.bfloat16)}
    settings = checked(FinetuneSettings(model="smollm2", adapter="none", batch=2, **settings))
    assert gradient_bytes(settings, theta, 3) == outer * 80 + layers * 128


def test_residuals_count_arrays_once_and_weights_never():
    def loss(theta, w, x):
        y = jnp.sin(theta * (x @ w)) @ w
        return (y * y).sum(), None

    vector, matrix = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    # Kept: x @ w, the cosine, and y, once though it is used twice; w is kept too, but it was there before.
    assert report.residual_bytes(loss, vector, matrix, matrix) == 3 * 4 * 16


def test_packed_residuals_count_as_they_are_stored_and_those_in_host_memory_not():
    def kept(remat):
        loss, theta, frozen, batch, _, _ = abstract_step(2, remat)
        return report.residual_bytes(loss, theta, frozen, batch, jax.random.key(0))

    inputs, rest = 2 * B * S * 64, kept("offload")
    assert kept("full") - rest == 4 * inputs
    assert kept("full-8bit") - rest == (1 + 4 / 64) * inputs


def test_report_of_another_program_is_refused():
    state = TrainState({"a": jnp.ones(1000)}, (), jnp.int32(0))
    with pytest.raises(ValueError, match="takes 10 bytes, less than the 4000 bytes"):
        report.byte_report({}, state, CompiledBytes(10, 0, 0, 0, 0), 0)


def test_tables_and_units():
    assert [report.human(n) for n in (0, 1023, 1024, 3 * 2**20, 5 * 2**30)] == [
        "0 B", "1023 B", "1.00 KiB", "3.00 MiB", "5.00 GiB",
    ]  # fmt: skip
    params = {"a": {"kernel": jnp.ones((64, 32))}, "b": jnp.ones(3, jnp.bfloat16)}
    params = weights.quantize(params, codecs.int4(group=32))
    console = Console(width=100, file=io.StringIO())
    console.print(report.leaf_table(params, "tiny"))
    text = console.file.getvalue()
    assert "tiny: 2,051 weights" in text
    for words in (["a/kernel", "int4, group 32", "64x32", "1.12 KiB", "4.50"], ["b", "bfloat16", "3", "6 B", "16.00"]):
        assert any(all(word in line for word in words) for line in text.splitlines())
