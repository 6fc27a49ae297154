import json
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax.recipes.checkpoint import Checkpoints, MetricsLog, check_same, read_metrics
from memjax.recipes.train import init_state

TX = optax.adam(1e-3)


def state_at(step, size=8):
    theta = {"a": {"kernel": jnp.arange(size, dtype=jnp.float32) + step}, "b": jnp.ones((2, 3), jnp.bfloat16)}
    return init_state(theta, TX)._replace(step=jnp.int32(step))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_and_keep(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), {"lr": 0.1, "targets": ["a"], "alpha": None})
    assert checkpoints.steps() == [2, 3]
    again = Checkpoints(tmp_path)
    assert_same(again.restore(jax.eval_shape(lambda: state_at(0))), state_at(3))
    assert again.settings() == {"lr": 0.1, "targets": ["a"], "alpha": None}


def test_no_checkpoint_and_bad_keep(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        Checkpoints(tmp_path / "new").restore(state_at(0))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state_at(step, 5000), {})
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.warns(UserWarning, match="skipped a checkpoint that does not load: step 2"):
        state = checkpoints.restore(state_at(0, 5000))
    assert_same(state, state_at(1, 5000))
    # The run writes step 2 again.
    checkpoints.save(state_at(2, 5000), {})
    assert_same(Checkpoints(tmp_path).restore(state_at(0, 5000)), state_at(2, 5000))


# Orbax leaves coroutines behind when a write fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_leaves_the_checkpoint_before(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    # Random, because what is written is compressed.
    full = state_at(2)._replace(theta={"a": jax.random.normal(jax.random.key(0), (50_000,))})
    first = full._replace(step=jnp.int32(1))
    checkpoints.save(first, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(OSError, match=r"could not save the checkpoint of step 2 .* the one of step 1 is intact"):
            checkpoints.save(full, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(Checkpoints(tmp_path).restore(first), first)
    again = Checkpoints(tmp_path)
    again.save(full, {})
    assert_same(Checkpoints(tmp_path).restore(first), full)


SAVE_FOR_EVER = """
import sys
import jax
from memjax.recipes.checkpoint import Checkpoints
from memjax.recipes.train import TrainState
checkpoints = Checkpoints(sys.argv[1])
for step in range(1, 10_000):
    theta = jax.random.normal(jax.random.key(step), (1_000_000,))
    checkpoints.save(TrainState({"a": theta}, (), jax.numpy.int32(step)), {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_killed_while_saving_leaves_a_checkpoint(attempt, tmp_path):
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        saved = [int(process.stdout.readline()) for _ in range(2)]
        time.sleep(np.random.default_rng().uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        saved += [int(line) for line in process.stdout.read().split()]
    like = jax.eval_shape(lambda: state_at(0)._replace(theta={"a": jnp.zeros(1_000_000)}, opt_state=()))
    checkpoints = Checkpoints(tmp_path)
    state = checkpoints.restore(like)
    step = int(state.step)
    # What was reported as saved is there; the last one may be complete though it was not reported.
    assert step in (saved[-1], saved[-1] + 1) and checkpoints.settings() == {"step": step}
    np.testing.assert_array_equal(state.theta["a"], jax.random.normal(jax.random.key(step), (1_000_000,)))


def test_settings_that_differ_are_listed():
    before = {"lr": 0.1, "rank": 8, "out": "a", "old": 1}
    check_same(before, before | {"out": "b"}, ignore=("out",))
    with pytest.raises(ValueError) as error:
        check_same(before, {"lr": 0.2, "rank": 8, "out": "b", "new": 2}, ignore=("out",))
    message = str(error.value)
    assert "lr: 0.1 before, 0.2 now" in message and "old: 1 before, 'unset' now" in message
    assert "new: 'unset' before, 2 now" in message and "rank" not in message and "out" not in message


def test_metrics_log_goes_back_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    losses = [float(np.float32(1) / np.float32(i + 3)) for i in range(5)]
    for i, loss in enumerate(losses):
        log.append({"step": i, "loss": loss})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["loss"] for row in read_metrics(path)] == losses
    log = MetricsLog(path, steps_done=3)
    log.append({"step": 3, "loss": 7.0})
    log.sync()
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[2])["loss"] == losses[2]
    path.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_metrics(path)


def test_no_open_files_are_left(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(state_at(1), {})
        checkpoints.close()
        MetricsLog(tmp_path / "metrics.jsonl").close()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
