"""memjax: fine-tune, train and serve JAX models that do not fit."""

import importlib
from typing import Any

from memjax import adapters, attention, codecs, core, ops, optim, parallel, remat, weights
from memjax.weights import lift

__version__ = "0.1.0"
__all__ = [
    "adapters",
    "attention",
    "codecs",
    "core",
    "lift",
    "models",
    "ops",
    "optim",
    "parallel",
    "recipes",
    "remat",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in ("models", "recipes"):
        return importlib.import_module(f"memjax.{name}")
    raise AttributeError(f"module 'memjax' has no attribute {name!r}")
