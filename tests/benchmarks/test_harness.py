"""The harness records what happened: numbers, failures and time-outs alike."""

import json
import math
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A suite module whose cases print, fail, hang or say nothing."""
    (tmp_path / "fake_suite.py").write_text(
        textwrap.dedent(
            """
            import sys, time
            case = sys.argv[sys.argv.index("--case") + 1]
            if case == "good":
                print("some log")
                print('{"value": 1.5}')
            elif case == "bad":
                raise ValueError("the shapes (2,) and (3,) do not fit")
            elif case == "slow":
                time.sleep(60)
            elif case == "crash":
                import ctypes
                def crash():
                    ctypes.string_at(0)
                crash()
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{harness.RESULTS.parent.parent}")
    return "fake_suite"


def test_run_process_returns_the_json_line(module):
    assert harness.run_process([module, "--case", "good"], 30) == {"value": 1.5}


def test_a_failure_is_an_error_without_its_traceback(module):
    assert harness.run_process([module, "--case", "bad"], 30) == {
        "error": "ValueError: the shapes (2,) and (3,) do not fit"
    }


def test_a_crash_says_where(module):
    error = harness.run_process([module, "--case", "crash"], 30)["error"]
    assert error.startswith("killed by SIGSEGV in string_at in ") and "crash in fake_suite.py" in error


def test_a_time_out_is_an_error(module):
    assert harness.run_process([module, "--case", "slow"], 1) == {"error": "did not finish in 1 s"}


def test_silence_is_an_error(module):
    assert "no JSON line" in harness.run_process([module, "--case", "quiet"], 30)["error"]


def test_last_exception_takes_the_last_one_and_drops_jax_notes():
    stderr = (
        "KeyError: 'first'\n\nDuring handling of the above exception, another exception occurred:\n"
        'Traceback\n  File "x.py", line 1, in f\njaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory\n'
        "-----\nFor simplicity, JAX has removed its internal frames\n"
    )
    assert harness.last_exception(stderr) == "jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory"


FACTS = {"device": "Card 9000", "driver": "1.2", "python": "3.12", "versions": {}, "ceilings": {}}


@pytest.fixture
def facts(monkeypatch):
    """Replaces the measurement of the device, which takes seconds."""
    run_process = harness.run_process
    monkeypatch.setattr(
        harness, "run_process", lambda args, s: FACTS if args == ["benchmarks.harness"] else run_process(args, s)
    )


def run(module, tmp_path, cases, **options):
    options = {"timeout_s": 30, "limit_s": 100, "keep": False} | options
    path = harness.run_suite("fake", module, cases, results=tmp_path / "results", **options)
    assert path == tmp_path / "results" / "card-9000" / "fake.json"
    return json.loads(path.read_text())


def test_run_suite_writes_every_case(module, facts, tmp_path):
    recorded = run(module, tmp_path, ["good", "bad"])
    good, bad = recorded["rows"]
    assert good["value"] == 1.5 and good["case"] == "good"
    assert bad["error"].startswith("ValueError")
    assert recorded["runs"] == {good["run"]: FACTS} and bad["run"] == good["run"]


def test_cases_past_the_limit_are_recorded_as_not_run(module, facts, tmp_path):
    (row,) = run(module, tmp_path, ["good"], limit_s=0)["rows"]
    assert row["error"] == "not run: the run's 0 s were spent"


def test_keep_keeps_other_cases_with_their_run(module, facts, tmp_path, monkeypatch):
    first = run(module, tmp_path, ["good"])
    path = tmp_path / "results" / "card-9000" / "fake.json"
    path.write_text(path.read_text().replace(first["rows"][0]["run"], "an older run"))
    second = run(module, tmp_path, ["bad"], keep=True)
    assert [(row["case"], row["run"] == "an older run") for row in second["rows"]] == [("good", True), ("bad", False)]
    assert len(second["runs"]) == 2
    third = run(module, tmp_path, ["good"])
    assert len(third["runs"]) == len(third["rows"]) == 1


def test_time_calls_leaves_the_warm_up_out():
    calls = []
    timing = harness.time_calls(lambda: calls.append(len(calls)), lambda _: None, warmup=3, repeats=5)
    assert len(calls) == 8 and timing.repeats == 5
    assert 0 <= timing.min_ms <= timing.median_ms <= timing.max_ms


@pytest.mark.parametrize("shape", [(48, 40), (3, 64, 32), (1, 96), (7, 5)])
def test_random_leaf_has_the_shape_mean_and_spread(shape):
    x = harness.random_leaf(jax.random.key(0), shape, jnp.bfloat16, 1.0, 0.5)
    assert x.shape == shape and x.dtype == jnp.bfloat16
    x = np.asarray(x, np.float32)
    assert abs(x.mean() - 1.0) < 3 * 0.5 / np.sqrt(x.size)
    assert abs(x.std() - 0.5) < 0.25
    assert len(np.unique(x)) > x.size / 10


def test_measure_training_counts_bytes_and_losses():
    def step(state, frozen, tokens):
        loss = jnp.sum((state * frozen - tokens) ** 2)
        return state - 0.01 * jax.grad(lambda s: jnp.sum((s * frozen - tokens) ** 2))(state), loss

    workload = harness.Workload(lambda key: (jnp.ones(256), jax.random.uniform(key, (256,)) + 0.5), step)
    row = harness.measure_training(workload, np.zeros(256, np.float32), seed=0, warmup=1, repeats=4)
    assert row["argument_gib"] == 3 * 1024 / harness.GIB
    total = row["argument_gib"] + row["output_gib"] + row["temp_gib"] - row["alias_gib"]
    assert row["compiled_gib"] == pytest.approx(total)
    assert row["alias_gib"] == 1024 / harness.GIB
    assert 0 < row["loss_last"] < row["loss_first"] and row["repeats"] == 4


def test_ceilings_are_rates():
    rates = harness.ceilings(64, 1)
    assert rates["matmul_tflops"] > 0 and rates["copy_tb_per_s"] > 0


def test_command_line_names_the_cases_when_none_matches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["suite", "--cases", "nothing*"])
    with pytest.raises(SystemExit):
        harness.main("suite", "benchmarks.suite", ["a/b"], lambda case: {}, default="*")
    assert "no case matches ['nothing*']; there are a/b" in capsys.readouterr().err


def test_cases_of_one_process_are_recorded_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "describe_device", lambda: FACTS)
    path = tmp_path / "card-9000" / "fake.json"
    seen = []

    def fails():
        seen.extend(row["case"] for row in json.loads(path.read_text())["rows"])
        raise ValueError("no")

    cases = {"good": lambda: {"value": 1.5}, "bad": fails}
    assert harness.run_here("fake", cases, results=tmp_path, limit_s=100, keep=False) == path
    good, bad = json.loads(path.read_text())["rows"]
    assert good["value"] == 1.5 and bad["error"] == "ValueError: no" and seen == ["good"]
    harness.run_here("fake", {"late": dict}, results=tmp_path, limit_s=0, keep=True)
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["good", "bad", "late"]
    assert json.loads(path.read_text())["rows"][2]["error"] == "not run: the run's 0 s were spent"


def test_cases_are_compiled_while_the_first_run_and_a_failure_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "describe_device", lambda: FACTS)
    runs = threading.Event()

    def compiled(name):
        if name == "b":
            raise ValueError("does not compile")
        if name == "c":
            assert runs.wait(60)
        return name.upper()

    def run(program):
        runs.set()
        return {"program": program}

    cases = {name: harness.Case(lambda name=name: compiled(name), run) for name in "abc"} | {"d": lambda: {"plain": 1}}
    path = harness.run_here("suite", cases, results=tmp_path, limit_s=math.inf, keep=False)
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert (rows["a"]["program"], rows["c"]["program"], rows["d"]["plain"]) == ("A", "C", 1)
    assert rows["b"]["error"] == "ValueError: does not compile"


def test_an_interrupted_run_compiles_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "describe_device", lambda: FACTS)
    monkeypatch.setattr(harness, "COMPILING_THREADS", 1)
    interrupted, compiled, before = threading.Event(), [], threading.enumerate()

    def waits():
        interrupted.wait(60)

    def interrupts():
        raise KeyboardInterrupt

    cases = {"first": interrupts, "a": harness.Case(waits, dict), "b": harness.Case(lambda: compiled.append("b"), dict)}
    with pytest.raises(KeyboardInterrupt):
        harness.run_here("suite", cases, results=tmp_path, limit_s=math.inf, keep=False)
    interrupted.set()
    for thread in set(threading.enumerate()) - set(before):
        thread.join(60)
    assert not compiled
