"""Runs on several devices: losses of one device, bytes by formula, resumed runs, contradictions by name."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from memjax.recipes import cli
from memjax.recipes.checkpoint import read_metrics
from memjax.recipes.finetuning import FinetuneSettings, finetune
from memjax.recipes.settings import checked

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tiny_model, text_file, tmp_path_factory):
    """Returns a function that trains and returns the result; one run for the same choices."""
    done = {}

    def train(**choices):
        key = tuple(sorted(choices.items()))
        if key not in done:
            settings = FinetuneSettings(
                **{"model": str(tiny_model), "data": str(text_file), "out": str(tmp_path_factory.mktemp("run")),
                   "rank": 4, "batch": 8, "seq": 16, "steps": 4, "eval_windows": 3, "eval_every": 0, "save_every": 0,
                   "sample_tokens": 2, **choices}
            )  # fmt: skip
            done[key] = finetune(settings, QUIET)
        return done[key]

    return train


PACKED = {"format": "int4", "group": 8}
WHOLE = {"adapter": "none", "rank": None}
RUNS = {
    "data=2": PACKED,
    "fsdp=4": PACKED | {"remat": "none"},
    "model=2": PACKED,
    "fsdp=2": WHOLE | {"optimizer": "frugal", "lr": 3e-3},
    "data=2,fsdp=2,model=2": WHOLE | {"remat": "linear", "lr": 3e-3, "accumulate": 2},
}


@pytest.mark.parametrize("mesh", RUNS)
def test_losses_are_those_of_one_device(run, mesh):
    one, many = run(**RUNS[mesh]), run(**RUNS[mesh], mesh=mesh)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-4)
    assert one.losses[-1] < one.losses[0]
    np.testing.assert_allclose(many.after.nll, one.after.nll, rtol=1e-4)
