"""What hides keys is measured with its loss and density, beside dense attention, and written down."""

import json

import numpy as np
import pytest

from benchmarks import attention_quality, harness, quality, results
from tests.benchmarks.facts import FACTS

S, BLOCK = attention_quality.TINY_CONTEXT, attention_quality.TINY_BLOCK


def run(tmp_path, monkeypatch, *cases):
    monkeypatch.setattr(harness, "describe_device", lambda: FACTS)
    arguments = ["--tiny", "--results", str(tmp_path), "--cases", *cases]
    path = quality.main("attention_quality", attention_quality.cases_of, arguments)
    recorded = json.loads(path.read_text())
    assert not [row["error"] for row in recorded["rows"] if "error" in row]
    return recorded


def causal_fraction(shown):
    """Returns the fractions of causal elements, and of blocks with one of them, in a table [S, S]."""
    q, k = np.ix_(np.arange(S), np.arange(S))
    shown = shown(q, k) & (k <= q)
    blocks = shown.reshape(S // BLOCK, BLOCK, S // BLOCK, BLOCK).any((1, 3))
    return shown.sum() / (S * (S + 1) / 2), blocks.sum() / (len(blocks) * (len(blocks) + 1) / 2)


def test_policies_are_measured_beside_dense_and_rendered(tmp_path, monkeypatch):
    recorded = run(tmp_path, monkeypatch, "dense", "window 64*", "block top-k, 16 of 16")
    dense, window, every = recorded["rows"]
    assert dense["shown"] == dense["visited"] == 1 and dense["increase"] == 0
    assert 5 < dense["nll"] < 6 and np.mean(dense["nll_by_part"]) == pytest.approx(dense["nll"])
    expected = causal_fraction(lambda q, k: (q - k < 64) | (k < 4))
    assert (window["shown"], window["visited"]) == pytest.approx(expected, rel=1e-6)
    assert window["increase_by_part"][0] == pytest.approx(0, abs=1e-3)  # 64 tokens, all of which the window shows
    assert max(map(abs, window["increase_by_part"][1:])) > 3e-3
    assert every["shown"] == every["visited"] == 1
    assert every["increase_by_part"] == pytest.approx([0] * 8, abs=1e-3)
    text = results.render_suite(recorded)
    assert f"**2 layers, 1 x {S} tokens**" in text and "| first 64 | 64 to 256 | last 256 |" in text
    assert f"| {window['case']} | {expected[0]:.3f} | {expected[1]:.3f} | {window['nll']:.4f} |" in text


@pytest.mark.slow
def test_selections_show_more_the_more_they_may(tmp_path, monkeypatch):
    rows = run(tmp_path, monkeypatch, "block top-k*", "block mass*", "vertical-slash*")["rows"]
    for name in ("block top-k", "block mass", "vertical-slash"):
        of_kind = [row for row in rows if row["case"].startswith(name)]
        assert len(of_kind) >= 3
        for kind in ("shown", "visited"):
            density = [row[kind] for row in of_kind]
            assert density == sorted(density) and 0 < density[0] < 1
        assert all(row["shown"] <= row["visited"] + 1e-6 and np.isfinite(row["nll"]) for row in of_kind)


def test_tables_hold_rows_of_one_size():
    sizes = {"layers": 30, "windows": [4, 8192], "block": 128, "shown": 0.25, "visited": 0.5, "nll": 2.0}
    row = {"increase": 0.1, "increase_by_part": [0.0] * 4 + [0.2] * 4, "increase_by_window": [0.0, 0.2]} | sizes
    rows = [{"case": "a", "run": "r"} | row, {"case": "b", "run": "r"} | row | {"layers": 1}]
    text = results.render_suite({"suite": "attention_quality", "runs": {"r": FACTS}, "rows": rows})
    line = "0.250 | 0.500 | 2.0000 | +0.1000 (+0.0000 to +0.2000) | +0.0000 | +0.0000 | +0.2000 |"
    whole, cut = text.split("**1 layers")
    assert f"| a | {line}" in whole and f"| b | {line}" in cut and "| first 1024 | 1024 to 4096 | last 4096 |" in whole
