"""Optimizers by name: each trains a tiny model, contradictions are named, settings come from TOML."""

import dataclasses
import gc
import math
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from memjax import codecs, models, optim
from memjax.core import compiled_bytes, nbytes
from memjax.recipes import cli, data, finetuning
from memjax.recipes.checkpoint import Checkpoints, read_metrics
from memjax.recipes.finetuning import finetune, make_loss, make_parts
from memjax.recipes.methods import Settings, make_adapter
from memjax.recipes.optimizers import OPTIMIZERS, make_training
from memjax.recipes.settings import FinetuneSettings, checked, read_toml, with_defaults
from memjax.recipes.train import check_finite, init_state

QUIET = Console(quiet=True)
IN_CI = ("frugal", "badam", "mezo", "adamw8bit")


@pytest.fixture(scope="module")
def tiny(tiny_model, text_file):
    model = models.load(tiny_model, dtype="float32")
    windows, _ = data.load(text_file, model.tokenizer, 16)
    return model, data.Loader(windows, 4, 0)


def train(tiny, steps=12, **choices):
    """Returns the losses of a run, its state at the end, and the step."""
    settings = checked(FinetuneSettings(model="tiny", seq=16, batch=4, steps=steps, **choices))
    model, loader = tiny
    if settings.dtype == "bfloat16":
        model = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    chosen = Settings(settings.rank, settings.alpha, settings.targets, settings.lr)
    adapter = make_adapter(settings.adapter, model.params, chosen)
    frozen, theta = adapter.prepare(jax.random.key(0), model.params)
    loss = make_loss(model, adapter, settings, dropout=False)
    training = make_training(settings, loss, make_parts(model, settings), model.config.num_layers)
    state, losses = init_state(jax.tree.map(jnp.copy, theta), training), []
    for i in range(steps):
        state, metrics = training.step(state, frozen, loader.batch_at(i))
        check_finite(jax.device_get(metrics), i)
        losses.append(float(metrics.loss))
    return np.array(losses), state, settings


WIDE = models.LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    tie_embeddings=True,
    max_positions=64,
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_making_a_state_takes_no_room_beside_it(name):
    params = models.abstract(WIDE, jnp.bfloat16)
    settings = checked(FinetuneSettings(model="wide", adapter="none", optimizer=name, lr=1e-3))
    parts = make_parts(models.Model(WIDE), settings)
    training = make_training(settings, lambda *args: None, parts, WIDE.num_layers)
    made = jax.jit(lambda theta: init_state(theta, training).opt_state).lower(params).compile()
    state = jax.eval_shape(training.init, params)
    assert compiled_bytes(made).temp <= 0.02 * nbytes(state) + 2**12
    assert compiled_bytes(made).output <= nbytes(state) + 2**12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_is_saved_and_restored(name, tmp_path):
    config = dataclasses.replace(WIDE, vocab_size=256, num_layers=2, intermediate_size=256)
    settings = checked(FinetuneSettings(model="wide", adapter="none", optimizer=name, lr=1e-3))
    training = make_training(settings, lambda *args: None, make_parts(models.Model(config), settings), 2)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), models.abstract(config, jnp.bfloat16))
    state = init_state(params, training)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    restored = checkpoints.restore(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_run_of_forward_passes_goes_to_its_end(tiny_model, text_file, tmp_path):
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path / "run"), optimizer="mezo", rank=2, batch=2,
        seq=16, steps=2, eval_windows=2, sample_tokens=2,
    )  # fmt: skip
    finetune(settings, QUIET)
    assert Checkpoints(tmp_path / "run").steps() == [2]


@pytest.mark.parametrize("name", ["frugal8bit", "adamw4bit", "badam"])
def test_a_state_is_what_its_optimizer_starts_with(tiny, name):
    settings = checked(FinetuneSettings(model="tiny", adapter="none", optimizer=name, lr=1e-3))
    model, params = tiny[0], tiny[0].params
    training = make_training(settings, lambda *args: None, make_parts(model, settings), model.config.num_layers)
    made, expected = init_state(params, training).opt_state, training.init(params)
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    assert nbytes(made) == nbytes(expected)


def test_a_run_holds_the_weights_once(tiny_model, text_file, tmp_path, monkeypatch):
    shape = models.load(tiny_model, dtype="float32").params["embed_tokens"]["embedding"].shape
    gc.collect()

    def count():
        return sum(x.shape == shape for x in jax.live_arrays())

    before, found = count(), []

    def counted(theta, training):
        gc.collect()
        found.append(count() - before)
        raise InterruptedError

    monkeypatch.setattr(finetuning, "init_state", counted)
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path / "run"), adapter="none", batch=4, seq=16, steps=2,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        finetune(settings, QUIET)
    assert found == [1]


def test_only_arrays_that_are_held_elsewhere_are_copied():
    a, b = jnp.ones(3), jnp.zeros(3)
    own = finetuning._own([a, b, b], {"frozen": a})
    assert own[0] is not a and own[1] is b and own[2] is not b
    jax.tree.map(np.testing.assert_array_equal, own, [a, b, b])


TRAIN = [name for name in OPTIMIZERS if name != "q_galore"]  # whose groups are larger than this model's matrices


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in IN_CI)) for n in TRAIN])
def test_every_optimizer_trains_the_weights(tiny, name):
    lr = {"mezo": 1e-3, "lion8bit": 1e-3}.get(name, 3e-3)
    losses, state, settings = train(tiny, 24, adapter="none", optimizer=name, lr=lr)
    assert losses[-4:].mean() < losses[:4].mean() - (0.001 if name == "mezo" else 0.1)
    assert int(state.step) == 24 and settings.lr == lr


@pytest.mark.parametrize("name", ["mezo", pytest.param("frugal", marks=pytest.mark.slow)])
def test_optimizers_train_adapters_too(tiny, name):
    losses, _, settings = train(tiny, 24, adapter="lora", rank=4, optimizer=name)
    assert losses[-4:].mean() < losses[:4].mean() - (0.0001 if name == "mezo" else 0.05)
    assert settings.lr == pytest.approx(2e-3 * OPTIMIZERS[name].rate)


@pytest.mark.parametrize("remat", ["full", pytest.param("linear", marks=pytest.mark.slow)])
def test_updating_layer_by_layer_is_updating_at_once(tiny, remat):
    choices = {"adapter": "none", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.01, "remat": remat}
    whole, state, _ = train(tiny, 6, **choices)
    fused, fused_state, _ = train(tiny, 6, fused=True, **choices)
    np.testing.assert_allclose(fused, whole, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(fused_state.theta), jax.tree.leaves(state.theta), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_weights_move_by_less_than_they_can_hold(tiny, fused):
    """Rounded to nearest, steps of a 2000th of a weight would all be lost."""
    choices = {"adapter": "none", "dtype": "bfloat16", "lr": 1e-5, "fused": fused}
    _, state, _ = train(tiny, 24, **choices)
    start = tiny[0].params["layers"]["mlp"]["up_proj"]["kernel"].astype(jnp.bfloat16)
    end = state.theta["layers"]["mlp"]["up_proj"]["kernel"]
    assert end.dtype == jnp.bfloat16
    moved = np.asarray(end != start).mean()
    assert 0.01 < moved < 0.9
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


def test_a_run_of_all_weights_writes_a_model(tiny_model, text_file, tmp_path):
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path / "run"), adapter="none", optimizer="frugal",
        fused=True, density=0.5, lr=3e-3, batch=4, seq=16, steps=8, eval_windows=2, sample_tokens=2, eval_every=0,
    )  # fmt: skip
    result = finetune(settings, QUIET)
    assert result.after.nll < result.before.nll
    written = models.load(tmp_path / "run" / "model", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, written.params, result.theta)
    rows = {row.category: row for row in result.report.rows}
    assert rows["packed weights"].formula_bytes == rows["dense weights"].formula_bytes == 0
    state = optim.init_bytes(optim.frugal(1e-3, density=0.5), result.theta)
    assert rows["optimizer state"].formula_bytes == pytest.approx(state, abs=64)
    assert all("grad_norm" in row for row in read_metrics(result.out / "metrics.jsonl"))


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'; known are adamw"),
        ({"density": 0.1}, "adamw has no density"),
        ({"optimizer": "badam"}, "badam goes through the layers .* adapter=lora"),
        ({"fused": True, "adapter": "none", "targets": ("**/kernel",)}, "fused goes through .*kernel"),
        ({"fused": True, "adapter": "none", "optimizer": "mezo"}, "mezo has a step of its own"),
        ({"fused": True, "adapter": "none", "accumulate": 2}, "fused keeps no sum of gradients"),
        ({"optimizer": "mezo", "dropout": 0.1}, "dropout would differ"),
        ({"optimizer": "mezo", "remat": "4bit"}, "mezo has no backward pass; leave remat=4bit out"),
        ({"adapter": "none", "rank": 4}, "none has no rank"),
        ({"warmup": 50, "steps": 50}, "warmup=50 must be less than steps=50"),
        ({"optimizer": "galore", "density": 0.0}, "density=0.0 must be above 0 with optimizer=galore"),
        ({"group": 16}, "format=keep packs nothing; leave group=16 out"),
        ({"group": 64, "format": "q4_0"}, "format=q4_0 has groups of 32; leave group=64 out"),
        ({"group": 0, "format": "int4"}, "group=0 must be at least 1"),
        ({"adapter": "none", "format": "int4"}, "adapter=none trains all weights.*format=int4 packs them"),
    ],
)
def test_choices_that_contradict_each_other_are_named(choices, message):
    with pytest.raises(ValueError, match=message):
        checked(FinetuneSettings(model="tiny", **choices))


def test_every_number_has_its_range():
    numbers = {name for name, hint in get_type_hints(FinetuneSettings).items() if float in (hint, *get_args(hint))}
    assert numbers == {"alpha", "dropout", "density", "lr", "weight_decay", "clip", "held_out", "temperature"}
    for name in numbers:
        for value in (math.nan, math.inf, -1.0):
            with pytest.raises(ValueError, match=f"^{name}={value} must be "):
                checked(FinetuneSettings(model="tiny", **{name: value}))
    counts = {name for name, hint in get_type_hints(FinetuneSettings).items() if int in (hint, *get_args(hint))}
    from_0 = {"warmup", "eval_every", "save_every", "seed"}
    assert from_0 < counts
    for name in counts - {"group"}:  # whose range depends on the format
        below, least = (-1, 0) if name in from_0 else (0, 1)
        with pytest.raises(ValueError, match=f"^{name}={below} must be at least {least}"):
            checked(FinetuneSettings(model="tiny", **{name: below}))
    assert checked(FinetuneSettings(model="tiny", clip=None, weight_decay=0.0, temperature=0.0)).clip is None


def test_packed_weights_are_not_trained_and_some_weights_may_be(tiny):
    model = models.load(tiny[0].name, dtype="float32", weights=codecs.int8(group=16))
    with pytest.raises(TypeError, match=r"layers/.*kernel is packed .* load it dense .--format dense."):
        make_adapter("none", model.params, Settings(None, None, ("**",), 1e-3)).prepare(jax.random.key(0), model.params)
    adapter = make_adapter("none", model.params, Settings(None, None, ("**/scale",), 1e-3))
    frozen, theta = adapter.prepare(jax.random.key(0), model.params)
    assert len(jax.tree.leaves(theta)) == 3
    jax.tree.map(np.testing.assert_array_equal, adapter.attach(frozen, theta), model.params)


def test_a_run_that_began_before_a_setting_existed_has_its_default():
    recorded = dataclasses.asdict(FinetuneSettings(model="tiny", lr=1.0)) | {"data_sha256": "0"}
    older = {name: value for name, value in recorded.items() if name not in ("optimizer", "fused", "density")}
    assert with_defaults(older) == recorded
    assert with_defaults(older | {"group": 64}) == recorded
    assert with_defaults(older | {"group": 64, "format": "int4"})["group"] == 64


def test_settings_come_from_toml_and_the_command_line_goes_before(tiny_model, text_file, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{tiny_model}"\ndata = "{text_file}"\nadapter = "none"\noptimizer = "adamw8bit"\nlr = 1e-3\n'
        f'seq = 16\nsteps = 9\neval-windows = 2\nsample_tokens = 2\nout = "{tmp_path / "run"}"\n'
    )
    assert read_toml(file)["eval_windows"] == 2
    cli.main(["finetune", "--config", str(file), "--steps", "2"])
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    capsys.readouterr()
    for text, message in (
        ("ranks = 3", "no settings of a run: ranks"),
        ("rank = ", "cannot read settings from"),
        ('steps = "9"', "steps='9' must be an integer"),
        ("seq = true", "seq=True must be an integer"),
        ("lr = [1]", "lr=(1,) must be a number"),
        ("targets = [1]", "targets=(1,) must be a list of strings"),
        ('adapter = "dorra"', "adapter='dorra' must be one of lora, rslora"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            cli.main(["finetune", f"--config={file}"])
        assert message in capsys.readouterr().err.replace("\n", " ")
    every = 'lr = 1\ntargets = ["**/kernel"]\nfused = false\nclip = 0.5\nremat = "4bit"\nmesh = "data=2"'
    file.write_text(every)
    assert read_toml(file)["targets"] == ("**/kernel",)
    for how in (["--resume", str(tmp_path / "run"), "--config", str(file)], ["--config", str(file)]):
        file.write_text(f'resume = "{tmp_path / "run"}"\nseq = 7')
        with pytest.raises(SystemExit):
            cli.main(["finetune", *how])
        assert "need not be given; seq: 16 before, 7 now" in capsys.readouterr().err
