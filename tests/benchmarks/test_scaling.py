"""Steps on a mesh learn, count the tokens of all devices, and hold less on each."""

import pytest

from benchmarks import finetune, scaling


@pytest.mark.parametrize("sizes", ["fsdp=2", pytest.param("model=2", marks=pytest.mark.slow)])
def test_case_runs_and_learns(sizes, monkeypatch):
    monkeypatch.setattr(finetune, "REPEATS", 3)
    name = f"{finetune.TINY.name}/memjax"
    one, two = (scaling.run_case(f"{name} {mesh}") for mesh in ("data=1", sizes))
    assert one["loss_last"] < one["loss_first"] and two["loss_last"] < two["loss_first"]
    assert one["devices"] == 1 and two["devices"] == 2
    batch = 2 * finetune.TINY.batch if sizes == "fsdp=2" else finetune.TINY.batch
    assert two["tokens_per_s"] == pytest.approx(batch * finetune.TINY.length / two["median_ms"] * 1e3)
    if sizes == "fsdp=2":
        for held in ("weights_gib", "trained_gib", "optimizer_gib"):
            assert two[held] == pytest.approx(one[held] / 2, rel=0.05)
    else:
        assert two["loss_first"] == pytest.approx(one["loss_first"], rel=1e-2)
        assert two["weights_gib"] < 0.8 * one["weights_gib"]
