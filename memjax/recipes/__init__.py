"""Data, the training step, evaluation, checkpoints, reports and the `memjax` command."""

import importlib
from typing import TYPE_CHECKING, Any

from memjax.recipes.data import Loader, Windows
from memjax.recipes.evaluate import Evaluation, make_evaluate
from memjax.recipes.train import Metrics, TrainState, check_finite, init_state, make_optimizer, make_step

if TYPE_CHECKING:
    from memjax.recipes.checkpoint import Checkpoints
    from memjax.recipes.finetuning import FinetuneResult, FinetuneSettings, finetune
    from memjax.recipes.generation import generate_text
    from memjax.recipes.plots import plot_run
    from memjax.recipes.report import ByteReport, byte_report, leaf_table, residual_bytes, working_bytes

__all__ = [
    "ByteReport",
    "Checkpoints",
    "Evaluation",
    "FinetuneResult",
    "FinetuneSettings",
    "Loader",
    "Metrics",
    "TrainState",
    "Windows",
    "byte_report",
    "check_finite",
    "finetune",
    "generate_text",
    "init_state",
    "leaf_table",
    "make_evaluate",
    "make_optimizer",
    "make_step",
    "plot_run",
    "residual_bytes",
    "working_bytes",
]

# Loaded when asked for, because they need orbax-checkpoint, rich or matplotlib.
_LAZY = {
    "checkpoint": ("Checkpoints",),
    "finetuning": ("FinetuneResult", "FinetuneSettings", "finetune"),
    "generation": ("generate_text",),
    "plots": ("plot_run",),
    "report": ("ByteReport", "byte_report", "leaf_table", "residual_bytes", "working_bytes"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"memjax.recipes.{module}"), name)
    raise AttributeError(f"module 'memjax.recipes' has no attribute {name!r}")
