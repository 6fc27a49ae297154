"""Whole runs on a tiny model, and the command."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from memjax import adapters, models
from memjax.recipes import cli
from memjax.recipes.checkpoint import Checkpoints, read_metrics
from memjax.recipes.finetuning import FinetuneSettings, finetune, make_loss
from memjax.recipes.generation import generate_text

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def text_run(tiny_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    for name in ("metrics", "held_out"):  # of a run that died before its first checkpoint
        (out / f"{name}.jsonl").write_text('{"step": 0, "loss": 99.0, "nll": 99.0, "tokens": 1.0}\n')
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(out), format="int8", group=16,
        rank=4, batch=4, seq=32, accumulate=2, steps=12, lr=3e-2, eval_windows=3, eval_every=6, save_every=0,
        sample_tokens=8,
    )  # fmt: skip
    return settings, finetune(settings, QUIET)


def test_a_run_learns_and_writes_everything(text_run):
    _, result = text_run
    assert result.after.nll < result.before.nll - 0.1
    assert len(result.losses) == 12 and result.losses[-1] < result.losses[0]
    assert abs(result.before.nll - result.losses[0]) < 0.5
    assert [row["step"] for row in read_metrics(result.out / "metrics.jsonl")] == list(range(12))
    assert [row["step"] for row in read_metrics(result.out / "held_out.jsonl")] == [0, 6, 12]
    summary = json.loads((result.out / "report.json").read_text())
    assert summary["held_out"]["after"]["nll"] == result.after.nll
    assert [row["category"] for row in summary["bytes"]["rows"]][-1] == "total"
    assert summary["settings"]["dtype"] == "float32" and summary["settings"]["data_sha256"]
    assert (result.out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((result.out / "samples.json").read_text())["after"] == result.sample_after
    assert Checkpoints(result.out).steps() == [12]


def test_the_saved_adapter_is_the_trained_one(text_run):
    settings, result = text_run
    model = models.load(settings.model, dtype="float32")
    adapter, frozen, theta = adapters.load(result.out / "adapter", model.params)
    assert frozen is model.params
    jax.tree.map(np.testing.assert_array_equal, theta, result.theta)
    loss = make_loss(model, adapter, dataclasses.replace(settings, format="dense"), dropout=False)
    from memjax.recipes import data
    from memjax.recipes.evaluate import make_evaluate

    _, held_out = data.load(settings.data, model.tokenizer, settings.seq)
    after = make_evaluate(loss)(theta, model.params, data.take(held_out, slice(3)), 3)
    # Of int8 weights and of dense ones.
    np.testing.assert_allclose(after.nll, result.after.nll, atol=0.02)


def test_generate_takes_the_run_or_its_adapter(text_run):
    settings, result = text_run
    model = models.load(settings.model, dtype="float32")
    options = {"max_new_tokens": 8}
    plain = generate_text(model, "the cat", **options)
    adapted = generate_text(model, "the cat", adapter=result.out, **options)
    assert adapted == generate_text(model, "the cat", adapter=result.out / "adapter", **options) != plain
    drawn = [generate_text(model, "a", temperature=5.0, top_k=50, seed=seed, **options) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate_text(model, "hello", chat=True, **options)


def resume_arguments(tiny_model, jsonl_file, out):
    options = "--rank 4 --dropout 0.1 --batch 4 --seq 24 --steps 20 --lr 0.01 --schedule cosine --warmup 5"
    paths = ["--model", str(tiny_model), "--data", str(jsonl_file), "--out", str(out)]
    return ["finetune", *paths, *options.split(), *["--eval-windows", "2", "--sample-tokens", "2", "--save-every", "4"]]


def test_kill_and_resume_give_the_same_losses_bit_by_bit(tiny_model, jsonl_file, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    jsonl_file = shutil.copy(jsonl_file, tmp_path)
    cli.main(resume_arguments(tiny_model, jsonl_file, whole))
    want = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in want] == list(range(20))

    kill_after = random.randrange(5, 18)
    command = [sys.executable, "-c", "from memjax.recipes.cli import main; main()"]
    with subprocess.Popen(
        command + resume_arguments(tiny_model, jsonl_file, killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        log = killed / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < kill_after:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    steps_logged = len(read_metrics(log))
    assert kill_after <= steps_logged < 20, f"killed after {steps_logged} steps, too late to test anything"

    # The settings need not be typed again; those that are typed must agree.
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["finetune", "--resume", str(killed), "--lr", "0.02", "--rank", "8"])
    assert exit_status.value.code == 2
    message = capsys.readouterr().err
    assert "cannot resume" in message and "before" in message
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--resume", str(killed), "--lr", "0.02"])
    assert "lr: 0.01 before, 0.02 now" in capsys.readouterr().err

    cli.main(["finetune", "--resume", str(killed)])
    assert read_metrics(log) == want, f"killed after {steps_logged} steps"
    assert read_metrics(killed / "held_out.jsonl") == read_metrics(whole / "held_out.jsonl")
    samples = [json.loads((folder / "samples.json").read_text()) for folder in (whole, killed)]
    assert samples[0] == samples[1]

    # A finished one is not advised what would be refused, and changed data are named.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--resume", str(killed)])
    assert capsys.readouterr().err.endswith("20 steps are done; schedule=cosine bound it to its length\n")
    with open(jsonl_file, "a") as file:
        file.write(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--resume", str(killed)])
    assert f"the data {jsonl_file} has changed since the run began" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(text_run, tmp_path):
    out = str(text_run[1].out)
    resumed = f"go on after step 12 with: memjax finetune --resume {out}"
    assert cli.how_to_go_on(cli.Finetune(model="m", out=out, steps=12), began=0.0) == resumed
    assert cli.how_to_go_on(cli.Finetune(model="m", resume=out, steps=12), time.time()) == resumed
    assert cli.how_to_go_on(cli.Finetune(model="m", resume=out, steps=40), time.time()) == f"{resumed} --steps 40"
    for folder in (out, str(tmp_path / "a run")):  # another's, and none
        said = cli.how_to_go_on(cli.Finetune(model="m", out=folder), time.time())
        assert said.startswith(f"there is no checkpoint of it in {folder} yet")


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, text_file, tmp_path):
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path), rank=2, seq=16, steps=5, lr=1e38,
        eval_windows=2, sample_tokens=2, save_every=1,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 1: loss is .*; the gradient of '.*kernel.*' is not finite"):
        finetune(settings, QUIET)
    assert Checkpoints(tmp_path).steps() == [1]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such-model"}, "no model 'no-such-model'"),
        ({"data": "no-such.txt"}, "no data file"),
        ({"seq": 65}, "the model's context is 64 tokens"),
        ({"rank": 33}, "rank"),
        ({"targets": "**/nothing"}, "matches no leaf"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 3, "accumulate": 2}, "accumulate=2 does not divide"),
        ({"sample-tokens": 64}, "exceed the model's context of 64"),
        ({"keep": 0}, "keep=0"),
        ({"resume": "no-such-run"}, "no-such-run holds no checkpoints"),
        ({"format": "int4", "group": 7}, "7"),
        ({"out": __file__}, "is a file; give the name of a folder"),
    ],
)
def test_mistakes_get_one_line_and_status_2(tiny_model, text_file, tmp_path, capsys, changes, message):
    options = {"model": tiny_model, "data": text_file, "out": tmp_path / "out", "seq": 16, "steps": 1} | changes
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["finetune", *arguments])
    assert exit_status.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(tiny_model):
    with pytest.raises(ValueError, match="no data file"):
        cli.main(["finetune", "--model", str(tiny_model), "--data", "no-such.txt", "--debug"])


def test_a_folder_with_a_run_is_not_overwritten(text_run):
    settings, _ = text_run
    with pytest.raises(ValueError, match="holds a run already; go on with it by --resume"):
        finetune(settings, QUIET)


def test_a_finished_run_and_another_folder_are_not_resumed(text_run, tmp_path):
    settings, result = text_run
    written = (result.out / "report.json").read_bytes()
    again = dataclasses.replace(settings, resume=settings.out, out=None)
    with pytest.raises(ValueError, match="is finished: 12 steps are done; --steps with more"):
        finetune(again, QUIET)
    with pytest.raises(ValueError, match="resumes in its own folder"):
        finetune(dataclasses.replace(again, out=str(tmp_path)), QUIET)
    other = tmp_path / "other.txt"
    other.write_text("other text " * 200)
    with pytest.raises(ValueError, match=f"the data {other} is not what the run began with, {settings.data}"):
        finetune(dataclasses.replace(again, data=str(other)), QUIET)
    assert (result.out / "report.json").read_bytes() == written


def test_a_finished_run_made_longer_is_the_longer_run(tiny_model, text_file, tmp_path):
    settings = FinetuneSettings(
        model=str(tiny_model), data=str(text_file), out=str(tmp_path / "long"), rank=2, seq=16, steps=4, batch=2,
        dropout=0.1, eval_windows=2, sample_tokens=2, save_every=3,
    )  # fmt: skip
    long = finetune(settings, QUIET)
    short = dataclasses.replace(settings, out=str(tmp_path / "short"), steps=2)
    finetune(short, QUIET)
    again = finetune(dataclasses.replace(settings, out=None, resume=short.out), QUIET)
    assert again.losses == long.losses and again.after == long.after
    jax.tree.map(np.testing.assert_array_equal, again.theta, long.theta)
    for change, message in (
        ({"schedule": "linear"}, "of 4 steps and cannot be made one of 6: schedule=linear would"),
        ({"adapter": "lamda", "optimizer": "frugal", "dropout": 0.0}, "adapter=lamda and optimizer=frugal would"),
        ({"rank": 4}, "rank: 2 before, 4 now"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(dataclasses.replace(settings, out=None, resume=short.out, **({"steps": 6} | change)), QUIET)


def test_remat_changes_what_is_kept_and_not_the_first_loss(text_run, tmp_path, capsys):
    settings, result = text_run
    options = {"model": settings.model, "data": settings.data, "format": "int8", "group": 16, "rank": 4, "batch": 4}
    options |= {"seq": 32, "accumulate": 2, "steps": 1, "lr": 3e-2, "eval-windows": 2, "sample-tokens": 2}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    cli.main(["finetune", *arguments, "--out", str(tmp_path), "--remat", "full-8bit"])
    assert "remat full-8bit keeps of each layer: the block's input, in 8 bits" in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(result.losses[0], rel=1e-5)
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["remat"] == "full-8bit"
    with pytest.raises(ValueError, match="remat='9bit' is not one of none, full, dots"):
        finetune(dataclasses.replace(settings, remat="9bit"), QUIET)
    with pytest.raises(SystemExit):
        cli.main(["finetune", *arguments, "--remat", "9bit"])
    assert "offload-4bit" in capsys.readouterr().err


def test_inspect_and_generate_commands(tiny_model, text_run, capsys):
    cli.main(["inspect", str(tiny_model), "--format", "int8", "--group", "16"])
    printed = capsys.readouterr().out
    assert "layers/mlp/up_proj/kernel" in printed and "int8, group 16" in printed
    out = str(text_run[1].out)
    cli.main(["generate", "--model", str(tiny_model), "--adapter", out, "--prompt", "the", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", ["finetune", "generate", "inspect"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main([command, "--help"])
    assert exit_status.value.code == 0
    assert "--format" in capsys.readouterr().out
