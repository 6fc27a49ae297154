"""Checkpoints of a training run with Orbax, the log of its losses, and resuming both at one step.

A run's folder holds ``checkpoints/<steps done>/`` and ``metrics.jsonl``. A checkpoint is written under
another name and renamed when it is complete, and older ones are removed after that: a full disk or a kill at
any moment leaves the previous checkpoint loadable. The position in the data is the step number
(`memjax.recipes.data.Loader`).
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from memjax.recipes.train import TrainState


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        """Opens the checkpoints of a run's folder, which is made with the first of them.

        Raises:
          ValueError: ``keep`` below 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, enable_async_checkpointing=False)
        self.folder = Path(folder).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "settings"))

    def steps(self) -> list[int]:
        """Returns the numbers of steps done at the checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, settings: dict[str, Any]) -> None:
        """Saves the state, with the settings of the run, under the number of steps done.

        Raises:
          OSError: it could not be written; the message names the checkpoint that is still good.
        """
        step = int(state.step)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings))
        previous = self.steps()
        if step in previous:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager.save(step, args=items, force=True)
        # A full disk surfaces as an OSError from Python or as a ValueError from the array writer.
        except (OSError, ValueError) as error:
            intact = f"the one of step {previous[-1]} is intact" if previous else "there is no earlier one"
            raise OSError(
                f"could not save the checkpoint of step {step} in {self.folder}: {error}; {intact}"
            ) from error

    def restore(self, like: TrainState) -> TrainState:
        """Returns the state of the latest checkpoint that loads.

        Later ones that do not load are skipped with a warning and removed, because the resumed run writes
        them anew.

        Args:
          like: a state of the shapes, dtypes and shardings to expect (arrays or `jax.ShapeDtypeStruct`).

        Raises:
          ValueError: there is no checkpoint, or none that loads.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.folder}")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), like
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        reasons = []
        for step in reversed(steps):
            try:
                restored = self._manager.restore(step, args=items)
            # Orbax raises whatever its readers meet in a damaged file, so any Exception means "not this one".
            except Exception as error:
                first_line = str(error).strip().partition("\n")[0][:200]
                reasons.append(f"step {step}: {type(error).__name__}: {first_line}")
                warnings.warn(f"skipped a checkpoint that does not load: {reasons[-1]}", stacklevel=2)
                continue
            for broken in steps[steps.index(step) + 1 :]:
                self._manager.delete(broken)
            return restored.state
        raise ValueError(f"no checkpoint in {self.folder} loads: " + "; ".join(reasons))

    def settings(self) -> dict[str, Any]:
        """Returns the settings of the latest checkpoint whose settings can be read.

        Raises:
          ValueError: there is none.
        """
        for step in reversed(self.steps()):
            try:
                return self._manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore())).settings
            except Exception as error:
                warnings.warn(f"skipped a checkpoint that does not load: step {step}: {error}", stacklevel=2)
        raise ValueError(
            f"no checkpoint in {self.folder}: the run stopped before it wrote one; start it again as it was started"
        )

    def close(self) -> None:
        """Waits for what Orbax does in the background and frees it."""
        self._manager.close()


def check_same(before: dict[str, Any], now: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Compares the settings of a checkpoint with those of the run that resumes it.

    Raises:
      ValueError: lists every setting that differs, with both values.
    """
    keys = [key for key in {**before, **now} if key not in ignore]
    missing = object()
    differing = [
        f"{key}: {before.get(key, 'unset')!r} before, {now.get(key, 'unset')!r} now"
        for key in keys
        if before.get(key, missing) != now.get(key, missing)
    ]
    if differing:
        problem = "cannot resume with other settings than those of the run, which need not be given; "
        raise ValueError(problem + "; ".join(differing))


class MetricsLog:
    """A .jsonl file with one object per step, in order; each has its ``step``, counted from 0."""

    def __init__(self, path: str | Path, steps_done: int = 0) -> None:
        """Opens the log and drops what it holds of steps from ``steps_done`` on."""
        self.path = Path(path)
        rows = [row for row in read_metrics(self.path) if row["step"] < steps_done] if self.path.exists() else []
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(replacement, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until what was appended is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics log; a last line that a kill cut short is left out."""
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not valid JSON") from None
    return rows
