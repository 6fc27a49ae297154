"""Every kind of mask of the attention suite is measured and written down; peers are given the same elements."""

import numpy as np
import pytest

from benchmarks import flash_attention, results
from benchmarks.flash_attention import CASES, block_choice, document_ids, make_mask

FACTS = {
    "device": "Card 9000",
    "driver": None,
    "python": "3.12",
    "versions": {"jax": "0.11.2"},
    "ceilings": {"matmul_size": 512, "matmul_tflops": 0.1, "copy_mib": 64, "copy_tb_per_s": 0.01},
}


def test_cases_are_measured_and_rendered(monkeypatch):
    monkeypatch.setattr(flash_attention, "CALLS", 1)
    monkeypatch.setattr(flash_attention, "REPEATS", 1)
    monkeypatch.setattr(flash_attention.harness, "ceilings", lambda size, mib: FACTS["ceilings"])
    rows = [{"case": name, "run": "r"} | flash_attention.run_case(name) for name in ("tiny/window", "tiny/masks")]
    window, _ = rows
    for way in ("memjax", "memjax, all keys"):
        assert set(window["ways"][way]) == {"forward", "both"}
        assert all("error" not in found for found in window["ways"][way].values())
    assert window["ways"]["memjax"]["both"]["time_over_visited"] > 0
    text = results.render_suite({"suite": "flash_attention", "runs": {"r": FACTS}, "rows": rows})
    assert "| memjax, column_sums |" in text and "0.154 of elements shown" in text and "| documents | device |" in text


@pytest.mark.parametrize("name", ["tiny/causal", "tiny/window", "tiny/documents", "tiny/blocks"])
def test_peers_see_the_same_elements(name):
    shape = CASES[name]
    kind, *numbers = shape.mask
    q, k = np.ix_(np.arange(shape.length), np.arange(shape.length))
    if kind == "documents":
        ids = document_ids(shape.length, numbers[0])
        expected = (k <= q) & (ids[q] == ids[k])
        assert len(set(ids.tolist())) > 1
    elif kind == "blocks":
        expected = block_choice(shape.length, numbers[0])[q // 128, k // 128]
    else:
        expected = (k <= q) & (q - k < (numbers or [shape.length])[0])
    np.testing.assert_array_equal(np.asarray(make_mask(shape).table(shape.length, shape.length))[0, 0], expected)
