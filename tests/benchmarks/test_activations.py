"""The suites of activation policies run at a tiny size, do what they claim, and fit the tables."""

import json

import pytest

from benchmarks import activation_quality, activations, finetune, harness, quality, results
from tests.benchmarks.facts import FACTS

TINY = [name for name, (shape, *_) in activations.CASES.items() if shape == activations.TINY]


def test_there_are_tiny_cases_of_both_stacks_with_and_without_adapters():
    assert {(activations.CASES[name][1], activations.CASES[name][3] is None) for name in TINY} == {
        (stack, all_weights) for stack in ("plain_jax", "memjax") for all_weights in (False, True)
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "tiny-b2-s32/memjax 4bit")) for n in TINY]
)
def test_tiny_case_trains_and_is_rendered(name, monkeypatch):
    monkeypatch.setattr(finetune, "REPEATS", 3)
    found = activations.run_case(name)
    _, stack, remat, _ = activations.CASES[name]
    assert (found["stack"], found["remat"], found["repeats"]) == (stack, remat, 3)
    assert found["loss_last"] < found["loss_first"] and found["tokens_per_s"] > 0
    text = render("activations", {"case": name, "run": "monday"} | found)
    assert f"**{name.partition('/')[0]}**" in text
    assert line(text, f"{stack} {remat}")[7] == f"{found['loss_last']:.3f}"


def row(case, run="monday", **values):
    return {"case": case, "run": run, "peak_gib": 4.0, "tokens_per_s": 1000.0, "loss_last": 2.0} | values


def line(text, name):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def render(suite, *rows):
    runs = {name: FACTS for name in dict.fromkeys(row["run"] for row in rows)}
    return results.render_suite({"suite": suite, "runs": runs, "rows": list(rows)})


def test_ratios_are_with_plain_jax_full_of_the_same_run_and_the_same_shape():
    base, other = row("a/plain_jax full"), row("a/memjax 4bit", peak_gib=5.0, tokens_per_s=1200.0)
    text = render("activations", row("a/plain_jax none", peak_gib=9.0), base, other)
    assert line(text, "memjax 4bit")[1:7] == ["5.00", "-", "-", "1.250", "1,200", "1.200"]
    for alone in (row("a/memjax 4bit", run="tuesday"), row("b/memjax 4bit"), row("a, all weights/memjax 4bit")):
        assert line(render("activations", base, alone), "memjax 4bit")[4:7] == ["-", "1,000", "-"]


def test_rows_of_two_runs_are_all_shown():
    text = render("activations", row("a/plain_jax full"), row("a/memjax full"), row("a/memjax 4bit", run="tuesday"))
    assert [line(text, name)[4] for name in ("memjax full", "memjax 4bit")] == ["1.000", "-"]


def quality_rows(tmp_path, monkeypatch, *cases):
    monkeypatch.setattr(harness, "describe_device", lambda: FACTS)
    monkeypatch.setattr(activation_quality, "SEEDS", (0, 1))  # a deviation needs two
    arguments = ["--tiny", "--results", str(tmp_path), "--cases", *cases]
    recorded = json.loads(quality.main("activation_quality", activation_quality.cases_of, arguments).read_text())
    assert not [row["error"] for row in recorded["rows"] if "error" in row]
    return recorded


def test_quality_runs_and_is_rendered(tmp_path, monkeypatch):
    recorded = quality_rows(tmp_path, monkeypatch, "LM, 4 bits")
    (found,) = recorded["rows"]
    assert found["seeds"] == [0, 1] and found["after"][0] != found["after"][1]
    assert found["after_mean"] == pytest.approx(sum(found["after"]) / 2)
    text = results.render_suite(recorded)
    assert f"**LM** ({found['parameters']:,} trained parameters, 2 layers" in text and "seeds 0, 1)" in text
    assert line(text, "4 bits")[1:] == [f"{found['after_mean']:.4f} ± {found['after_std']:.4f}", "-"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["LM", "SmolLM2"])
def test_policies_start_alike_and_train_on_other_gradients(task, tmp_path, monkeypatch):
    exact, packed = quality_rows(tmp_path, monkeypatch, f"{task}, exact", f"{task}, 4 bits")["rows"]
    assert packed["last_losses"] == pytest.approx(exact["last_losses"], rel=0.05)
    assert packed["after"] == pytest.approx(exact["after"], rel=0.05) and packed["after"] != exact["after"]


def test_a_loss_is_compared_with_the_exact_one_of_its_own_task():
    def of(case, run="monday", mean=2.0):
        shared = {"after_std": 0.1, "parameters": 1, "layers": 1, "steps": 1, "batch": [1, 1], "seeds": [0]}
        return {"case": case, "run": run, "after_mean": mean} | shared

    text = render("activation_quality", of("A, exact"), of("A, 4 bits, stochastic", mean=2.5), of("B, 2 bits"))
    assert line(text, "4 bits, stochastic")[1:] == ["2.5000 ± 0.1000", "+0.5000"]
    assert line(text, "2 bits")[2] == "-"
    text = render("activation_quality", of("A, exact"), of("A, 4 bits", run="tuesday", mean=1.5))
    assert line(text, "4 bits")[2] == "-0.5000"
