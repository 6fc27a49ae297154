"""The ladder runs at a tiny size by the command's own settings, and fits its table."""

import pytest

from benchmarks import finetune, ladder, results
from tests.benchmarks.facts import FACTS


@pytest.mark.parametrize("rung", ["memjax: LoRA", pytest.param("all weights", marks=pytest.mark.slow)])
def test_a_tiny_rung_trains(rung, monkeypatch):
    monkeypatch.setattr(finetune, "REPEATS", 3)
    row = ladder.run_case(f"tiny/{rung}")
    assert row["loss_last"] < row["loss_first"] and row["tokens_per_s"] > 0
    assert row["stack"] == "memjax" and row["settings"] == ladder.RUNGS[f"tiny/{rung}"].settings


def test_ratios_are_with_the_first_rung_of_the_same_run():
    values = {"peak_gib": 4.0, "compiled_gib": 3.5, "tokens_per_s": 1000.0, "loss_last": 2.0, "cost": "nothing"}
    rows = [
        {"case": "a/plain_jax", "run": "monday"} | values,
        {"case": "a/less", "run": "monday"} | values | {"peak_gib": 2.0, "tokens_per_s": 900.0},
        {"case": "a/later", "run": "tuesday"} | values,
    ]
    runs = {"monday": FACTS, "tuesday": FACTS}
    text = results.render_suite({"suite": "ladder", "runs": runs, "rows": rows})
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| 2.00 | 3.5 | 900 | 0.500 | 0.900 | 2.000 |" in lines["less"]
    assert lines["later"].count(" - |") == 2


def test_every_rung_has_settings_that_go_together():
    from memjax.recipes.settings import FinetuneSettings, checked

    for name, (_, stack, settings) in ladder.RUNGS.items():
        if stack == "memjax":
            checked(FinetuneSettings(model=name, **{k: v for k, v in settings.items() if k != "rest"}))
