"""RESULTS.md and its pictures hold what the recorded files say, and only compare rows of one run."""

import argparse
import json
import re

import numpy as np
import pytest

from benchmarks import activation_quality, attention_quality, formats, full_finetuning, ladder, results
from benchmarks.plots import activations_svg, ladder_svg

FACTS = {
    "device": "Card 9000",
    "driver": "1.2",
    "python": "3.12",
    "versions": {"jax": "0.11.2"},
    "ceilings": {"matmul_size": 8192, "matmul_tflops": 500.0, "copy_mib": 1, "copy_tb_per_s": 2.5},
}


def row(stack, run="monday", **values):
    return {
        "case": f"small/{stack}",
        "run": run,
        "shape": "small",
        "stack": stack,
        "tokens_per_s": 1000.0,
        "flops_per_token": 1e11,
        "median_ms": 10.0,
        "min_ms": 9.0,
        "max_ms": 12.0,
        "peak_gib": 4.0,
        "peak_after_compile_gib": 3.0,
        "compiled_gib": 3.9,
        "compile_s": 20.0,
        "loss_first": 5.0,
        "loss_last": 4.5,
    } | values


def render(*rows):
    runs = {name: FACTS for name in dict.fromkeys(row["run"] for row in rows)}
    return results.render_suite({"suite": "finetune", "runs": runs, "rows": list(rows)})


def line(text, stack):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {stack} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_ratios_are_with_plain_jax_of_the_same_run():
    text = render(row("plain_jax"), row("memjax", tokens_per_s=990.0, peak_gib=4.04))
    assert line(text, "memjax")[2] == "0.990" and line(text, "memjax")[6] == "1.010"
    text = render(row("plain_jax"), row("memjax", run="tuesday"))
    assert line(text, "memjax")[2] == "-" and line(text, "memjax")[6] == "-"


def test_peaks_that_the_step_did_not_set_are_bounds():
    text = render(row("plain_jax"), row("memjax", peak_after_compile_gib=4.0))
    assert line(text, "plain_jax")[5] == "4.00" and line(text, "memjax")[5] == "<= 4.00"


def test_share_of_the_matmul_ceiling():
    assert line(render(row("plain_jax")), "plain_jax")[4] == "20 %"


def test_failures_are_shown():
    text = render(row("plain_jax"), {"case": "small/peft", "run": "monday", "error": "RuntimeError: out of memory"})
    assert "- `small/peft`: RuntimeError: out of memory" in text


def test_missing_numbers_are_dashes():
    assert line(render(row("peft", peak_gib=None, compile_s=None, compiled_gib=None)), "peft")[5:9] == ["-"] * 4


def test_page_is_up_to_date():
    if not results.PAGE.exists():
        pytest.skip("no results are recorded yet")
    assert results.PAGE.read_text() == results.render(), "run `make results`"


NUMBER = re.compile(r"-?\d+\.?\d*")


@pytest.mark.parametrize("suite", results.PLOTS)
def test_plots_are_up_to_date(suite):
    recorded = json.loads((results.PLOTTED / f"{suite}.json").read_text())
    plot, again = results.PAGE.with_name(f"{suite}.svg").read_text(), results.PLOTS[suite](recorded)
    assert NUMBER.sub("#", plot) == NUMBER.sub("#", again), "run `make results`"
    np.testing.assert_allclose(*(np.array(NUMBER.findall(text), float) for text in (plot, again)), atol=0.01)
    rungs = ladder.LADDERS["8B LoRA, 2 x 2048"][1] if suite == "ladder" else ("plain_jax none", "linear-4bit")
    for rung in rungs:
        assert f">{rung.removeprefix('memjax: ')}</text>" in plot


def test_plot_of_policies_takes_the_run_of_the_baseline():
    rows = [
        row(stack, run, peak_gib=gib, tokens_per_s=1000.0) | {"case": f"small/{stack} {policy}", "stack": stack}
        for stack, policy, run, gib in [
            ("plain_jax", "full", "monday", 9.0),
            ("memjax", "4bit", "monday", 6.0),
            ("memjax", "old", "sunday", 5.0),
        ]
    ]
    recorded = {"runs": {"monday": FACTS, "sunday": FACTS}, "rows": rows}
    assert ">4bit</text>" in activations_svg(recorded) and ">old</text>" not in activations_svg(recorded)
    with pytest.raises(ValueError, match="plain_jax"):
        activations_svg(recorded | {"rows": rows[1:]})


def rung(name, run="monday", **values):
    return row(name.partition(":")[0], run, peak_gib=8.0, **values) | {"case": f"small/{name}"}


def test_plot_refuses_rungs_of_two_runs():
    rows = [rung("plain_jax", tokens_per_s=900.0), rung("memjax: less"), rung("peft"), rung("memjax: least")]
    recorded = {"runs": {"monday": FACTS, "tuesday": FACTS}, "rows": rows}
    assert ">least</text>" in ladder_svg(recorded, "small")
    with pytest.raises(ValueError, match=r"one run, they are of \['monday', 'tuesday'\]"):
        ladder_svg(recorded | {"rows": [*rows, rung("peft", "tuesday")]}, "small")
    with pytest.raises(ValueError, match="one run"):
        ladder_svg(recorded, "large")


def test_render_reads_every_file(tmp_path):
    (tmp_path / "card-9000").mkdir()
    recorded = {"suite": "finetune", "runs": {"monday": FACTS}, "rows": [row("plain_jax")]}
    (tmp_path / "card-9000" / "finetune.json").write_text(json.dumps(recorded))
    page = results.render(tmp_path)
    assert "## card-9000" in page and "Card 9000, driver 1.2" in page and "500 TFLOP/s" in page


def test_what_a_rung_costs_is_what_other_suites_measured():
    suites = {
        "formats": {"rows": [{"case": "nf4 b64, double", "increase": 0.02}]},
        "activation_quality": {
            "rows": [{"case": "SmolLM2, exact", "after_mean": 2.8}, {"case": "SmolLM2, 4 bits", "after_mean": 2.803}]
        },
    }
    assert results.costs({"format": "nf4", "remat": "4bit"}, suites) == "base +0.020, residuals +0.003"
    assert results.costs({"rest": "int8"}, suites) == "embedding and head not measured"
    assert results.costs({"remat": "full", "adapter": "none"}, suites) == "nothing"


def test_costs_are_of_cases_and_settings_that_there_are():
    cases = {
        "formats": set(formats.cases_of(argparse.Namespace(tiny=False))),
        "activation_quality": set(activation_quality.cases_of(argparse.Namespace(tiny=False))),
        "full_finetuning": set(full_finetuning.METHODS),
        "attention_quality": set(attention_quality.cases_of(argparse.Namespace(tiny=False))),
    }
    for suite, *named in results.COSTS.values():
        assert {case for case in named if case is not None} <= cases[suite]
    exact = {("remat", "none"), ("remat", "full"), ("adapter", "none"), ("clip", None), ("fused", True), ("rank", None)}
    exact |= {("mlp_chunk", 4096)}
    for rung in ladder.RUNGS.values():
        if rung.shape.model != "tiny":
            assert set(rung.settings.items()) <= {*results.COSTS, *exact}
