"""Runs on several devices: losses of one device, bytes by formula, resumed runs, contradictions by name."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from memjax import codecs, models, parallel, weights
from memjax.core.bytes import nbytes
from memjax.core.paths import leaf_paths
from memjax.recipes import data
from memjax.recipes.checkpoint import read_metrics
from memjax.recipes.finetuning import FinetuneSettings, finetune, make_loss, make_parts
from memjax.recipes.methods import Settings, make_adapter
from memjax.recipes.optimizers import make_training
from memjax.recipes.settings import checked
from memjax.recipes.train import check_finite, init_on_mesh, init_state

STEPS = 5


@pytest.fixture(scope="module")
def tiny(tiny_model, text_file):
    model = models.load(tiny_model, dtype="float32")
    windows, _ = data.load(text_file, model.tokenizer, 16)
    return model, data.Loader(windows, 8, 0)


def train(tiny, mesh=None, base=None, **choices):
    """Returns the losses of a run, its frozen weights and its state at the end."""
    settings = checked(FinetuneSettings(model="tiny", seq=16, batch=8, steps=STEPS, mesh=mesh, chunk=16, **choices))
    model, loader = tiny
    params = model.params if base is None else weights.quantize(model.params, base, where="layers/**/kernel")
    chosen = Settings(settings.rank, settings.alpha, settings.targets, settings.lr)
    adapter = make_adapter(settings.adapter, params, chosen)
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    devices = None if mesh is None else parallel.make_mesh(mesh)
    loss = make_loss(model, adapter, settings, dropout=False, mesh=devices)
    training = make_training(settings, loss, make_parts(model, settings), model.config.num_layers)
    if devices is None:
        state = init_state(jax.tree.map(jnp.copy, theta), training)
    else:
        places = parallel.shardings((frozen, theta), devices, attach=adapter.attach)
        frozen, theta = jax.device_put((frozen, theta), places)
        state, training = init_on_mesh(jax.tree.map(jnp.copy, theta), training)
    losses = []
    for i in range(STEPS):
        state, metrics = training.step(state, frozen, loader.batch_at(i))
        check_finite(jax.device_get(metrics), i)
        losses.append(float(metrics.loss))
    return np.array(losses), frozen, state


INT4, INT8 = {"base": codecs.int4(group=8), "rank": 4}, {"base": codecs.int8(group=8), "rank": 4}
WHOLE = {"adapter": "none", "lr": 3e-3}
RUNS = {
    "fsdp=4": INT4 | {"remat": "none"},
    "model=2": INT8 | {"attention": "window=6,sinks=2", "mlp_chunk": 48},
}
MORE = {
    "data=2": INT4,
    "fsdp=2": WHOLE | {"optimizer": "frugal", "update_gap": 2},
    "data=4": WHOLE,
    "fsdp=8": WHOLE | {"remat": "8bit"},
    "data=2,fsdp=4": INT8 | {"remat": "linear", "accumulate": 1},
    "fsdp=2,model=2": INT4 | {"adapter": "lora_fa", "accumulate": 2},
    "data=2,fsdp=2,model=2": WHOLE | {"remat": "linear", "accumulate": 2, "optimizer": "adam_mini"},
}


def on_one_device(tree):
    """Returns the bytes that the first device really holds."""
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def share(tree, parts):
    """Returns the bytes of a device when matrices are split into ``parts`` and vectors are whole."""
    flat = ((path.startswith("layers"), part) for path, leaf in leaf_paths(tree) for part in jax.tree.leaves(leaf))
    return sum(part.nbytes / (parts if part.ndim - stacked >= 2 else 1) for stacked, part in flat)


@pytest.mark.parametrize("mesh", [*RUNS, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE)])
def test_losses_are_those_of_one_device(tiny, mesh):
    choices = {**RUNS, **MORE}[mesh]
    one, frozen, state = train(tiny, **choices)
    many, frozen_here, state_here = train(tiny, mesh, **choices)
    # Packed residuals are off by their codes, on fewer arrays where a device's part is too small to pack.
    np.testing.assert_allclose(many, one, rtol=1e-3 if choices.get("remat") == "8bit" else 1e-4)
    assert one[-1] < one[0]
    trees = {"frozen": (frozen, frozen_here), "theta": (state.theta, state_here.theta)}
    for name, (whole, here) in trees.items():
        assert parallel.device_bytes(here) == on_one_device(here), name
        if "model" not in mesh:
            expected = share(whole, parallel.make_mesh(mesh).shape.get("fsdp", 1))
            assert on_one_device(here) == pytest.approx(expected, rel=0.05), name
    if "model" not in mesh and choices.get("optimizer", "adamw") == "adamw":
        assert on_one_device(state_here.opt_state) == pytest.approx(2 * on_one_device(state_here.theta), rel=0.05)
    elif "fsdp" in mesh:
        assert on_one_device(state_here.opt_state) < 0.6 * nbytes(state.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        WHOLE | {"optimizer": "frugal", "update_gap": 2, "fused": True},
        INT4 | {"mesh": "fsdp=4", "remat": "none"},
    ],
    ids=["fused", "fsdp"],
)
def test_mlps_in_chunks_train_as_whole_ones(tiny, choices):
    whole, *_ = train(tiny, **choices)
    parts, *_ = train(tiny, **choices, mlp_chunk=24)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert whole[-1] < whole[0]


@pytest.mark.slow
def test_a_run_is_resumed_on_its_mesh(tiny_model, text_file, tmp_path):
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path), format="int4", group=8, rank=4, batch=4, seq=16,
        steps=4, eval_windows=2, eval_every=0, save_every=2, sample_tokens=2, mesh="fsdp=2", dropout=0.1,
    )  # fmt: skip
    console = Console(record=True, quiet=True)
    whole = finetune(settings, console)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    resumed = finetune(FinetuneSettings(**{**vars(settings), "resume": str(tmp_path), "out": None}), console)
    assert resumed.losses == whole.losses == [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.theta), jax.device_get(whole.theta))
    leaves = jax.tree.leaves(resumed.theta)
    assert all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in leaves)
    rows = {row.category: row.formula_bytes for row in whole.report.rows}
    assert rows["trained weights"] == nbytes(whole.theta) // 2
    with pytest.raises(ValueError, match="mesh: 'fsdp=2' before, 'data=2' now"):
        finetune(FinetuneSettings(**{**vars(settings), "mesh": "data=2", "resume": str(tmp_path)}), console)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"mesh": "rows=2"}, "unknown axis 'rows'; known are data, fsdp, model"),
        ({"mesh": "data"}, "must be like 'data=2'"),
        ({"mesh": "data=2,data=2"}, "gives the axis data twice"),
        ({"mesh": "data=0"}, "must be at least 1"),
        ({"mesh": "data=4,model=4"}, "but there are 8; XLA_FLAGS=--xla_force_host_platform_device_count=16"),
        ({"mesh": "data=2,fsdp=2", "batch": 6}, "among 4 devices; batch=6 and accumulate=1 make microbatches of 6"),
        ({"mesh": "data=4", "batch": 8, "accumulate": 4}, "make microbatches of 2"),
        ({"mesh": "data=2", "optimizer": "mezo"}, "mezo runs on one device"),
        ({"mesh": "data=2", "optimizer": "badam", "adapter": "none"}, "badam runs on one device"),
        ({"mesh": "data=2", "fused": True, "adapter": "none"}, "fused runs on one device"),
    ],
)
def test_contradictions_are_named(choices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked(FinetuneSettings(model="tiny", **choices))


def test_heads_that_no_mesh_splits_are_named(tiny_model, text_file, tmp_path):
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path), rank=4, seq=16, mesh="model=4"
    )
    with pytest.raises(ValueError, match=r"mesh=model=4 splits heads, but .* has 2 heads of keys"):
        finetune(settings, Console(quiet=True))
