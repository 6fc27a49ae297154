"""Every adapter by its name: defaults, whole runs, resuming, generating and merging."""

import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from memjax import adapters, models
from memjax.core.bytes import nbytes
from memjax.recipes import cli
from memjax.recipes.convert import load_adapter, merge_model
from memjax.recipes.finetuning import FinetuneSettings, finetune
from memjax.recipes.generation import generate_text
from memjax.recipes.methods import METHODS, complete, make_adapter
from memjax.weights import lift
from tests.models.checkpoints import FOLDER
from tests.models.checkpoints import checkpoint as load

QUIET = Console(quiet=True)
MODEL = "llama_bytes"
RANKED = {name: 4 for name, method in METHODS.items() if method.rank is not None}
ADAPTERS = [name for name in METHODS if name != "none"]
FEW = ("**/{q,down}_proj/kernel",)
NO_DENSE_FORM = "bias_only"


def every():
    return [name if name == "pissa" else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_made_and_comes_back(name, tmp_path):
    params = load(MODEL).params
    adapter = make_adapter(name, params, complete(name, rank=RANKED.get(name), targets=FEW))
    frozen, theta = adapter.prepare(jax.random.key(0), params)
    assert nbytes(theta) == adapter.nbytes(params).trained < nbytes(params)
    adapter.save(tmp_path, theta, frozen)
    again = adapters.load(tmp_path, params)
    assert type(again[0]) is type(adapter) and again[0].settings() == adapter.settings()
    jax.tree.map(np.testing.assert_array_equal, again[1:], (frozen, theta))


def test_settings_are_completed_and_those_of_no_use_refused():
    assert complete("lora", rank=8) == (8, 16.0, METHODS["lora"].targets, METHODS["lora"].lr)
    assert complete("ia3", lr=0.5, targets=["**/k_proj/kernel"]) == (None, None, ("**/k_proj/kernel",), 0.5)
    for arguments, message in (
        (("ia3", {"rank": 4}), "ia3 has no rank"),
        (("vera", {"alpha": 4.0}), "vera has no alpha"),
        (("nothing", {}), "unknown adapter 'nothing'; known are lora, rslora"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(arguments[0], **arguments[1])
    with pytest.raises(ValueError, match="mos has no dropout"):
        make_adapter("mos", load(MODEL).params, complete("mos"), dropout=0.1)


def test_targets_of_methods_that_treat_weights_apart():
    biased, plain = load("qwen2").params, load(MODEL).params
    ia3 = make_adapter("ia3", plain, complete("ia3", targets=["**/{up,down}_proj/kernel"]))
    assert {path: list(factors) for path, factors in ia3.init(jax.random.key(0), plain).items()} == {
        "layers/mlp/up_proj/kernel": ["column"],
        "layers/mlp/down_proj/kernel": ["row"],
    }
    chosen = complete("bias_only")
    assert set(make_adapter("bias_only", biased, chosen).init(jax.random.key(0), biased)) == {
        f"layers/self_attn/{name}_proj/bias" for name in "qkv"
    }
    assert len(make_adapter("bias_only", plain, chosen).init(jax.random.key(0), plain)) == 7


@pytest.mark.parametrize("name", every())
def test_runs_resume_and_their_adapters_are_used(name, text_file, tmp_path, monkeypatch):
    settings = FinetuneSettings(
        model=str(FOLDER / MODEL), data=str(text_file), out=str(tmp_path / "run"), adapter=name,
        rank=RANKED.get(name), targets=FEW, format="int8", group=16, batch=2, seq=16, steps=6, save_every=3,
        eval_every=0, eval_windows=2, sample_tokens=2,
    )  # fmt: skip
    whole = finetune(settings, QUIET)
    assert np.mean(whole.losses[3:]) < np.mean(whole.losses[:3])
    rows = {row["category"]: row for row in json.loads((whole.out / "report.json").read_text())["bytes"]["rows"]}
    assert (rows["adapter constants"]["formula_bytes"] > 0) == (whole.out / "start").exists()

    killed = tmp_path / "killed"  # as a kill after step 5 leaves it
    shutil.copytree(whole.out, killed, ignore=shutil.ignore_patterns("adapter", "samples.json", "6"))
    log = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(log[:5]))
    (killed / "held_out.jsonl").write_text((killed / "held_out.jsonl").read_text().splitlines(keepends=True)[0])
    monkeypatch.setattr(adapters.Pissa, "decompose", None)  # constants are those of the start and not made again
    cli.main(["finetune", "--resume", str(killed)])
    assert (killed / "metrics.jsonl").read_text() == "".join(log)
    for file in ("samples.json", "held_out.jsonl", "adapter/adapter.safetensors"):
        assert (killed / file).read_bytes() == (whole.out / file).read_bytes()

    model = load(MODEL)
    method, frozen, theta = load_adapter(model, whole.out)
    jax.tree.map(np.testing.assert_array_equal, theta, whole.theta)
    assert generate_text(model, "the cat", adapter=whole.out, max_new_tokens=4)
    if name == NO_DENSE_FORM:
        with pytest.raises(ValueError, match=r"down_proj/kernel: an output bias is no part of the weight"):
            merge_model(str(FOLDER / MODEL), whole.out, tmp_path / "merged")
        return
    merge_model(str(FOLDER / MODEL), whole.out, tmp_path / "merged", dtype="float32")
    tokens = np.arange(12)[None]
    merged = models.load(tmp_path / "merged", dtype="float32")
    expected = jax.jit(lift(model.logits))(method.attach(frozen, theta), tokens)
    np.testing.assert_allclose(jax.jit(model.logits)(merged.params, tokens), expected, atol=2e-4)
