"""The suites that compare optimizers run at a tiny size and fit their table."""

import json

import pytest

from benchmarks import full_finetuning, harness, optimizers, quality, results
from tests.benchmarks.facts import FACTS


def rows(suite, module, tmp_path, monkeypatch, *cases):
    monkeypatch.setattr(harness, "describe_device", lambda: FACTS)
    monkeypatch.setattr(module, "SEEDS", (0, 1))  # a deviation needs two
    arguments = ["--tiny", "--steps", "2", "--results", str(tmp_path), "--cases", *cases]
    recorded = json.loads(quality.main(suite, module.cases_of, arguments).read_text())
    assert not [row["error"] for row in recorded["rows"] if "error" in row]
    return recorded


@pytest.mark.parametrize(
    "suite, module, cases",
    [
        ("optimizers", optimizers, ("AdamW", "FRUGAL 0")),
        pytest.param("full_finetuning", full_finetuning, ("LoRA*", "FRUGAL 0.25"), marks=pytest.mark.slow),
        pytest.param("full_finetuning", full_finetuning, ("AdamW*", "BAdam", "MeZO"), marks=pytest.mark.slow),
    ],
)
def test_methods_train_and_are_rendered(suite, module, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "METHODS", {name: method._replace(rates=method.rates[:2]) for name, method in module.METHODS.items()}
    )
    recorded = rows(suite, module, tmp_path, monkeypatch, *cases)
    for row in recorded["rows"]:
        assert row["after"][0] != row["after"][1] and len(row["rates"]) == 2 and str(row["lr"]) in row["rates"]
        assert row["state_bytes_per_parameter"] == row["state_bytes"] / row["parameters"]
    text = results.render_suite(recorded)
    first = recorded["rows"][0]
    assert f"| {first['case']} | {first['parameters']:,} |" in text and "| +0.0000 |" in text
    assert f"minus {first['case']}" in text
