"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.lora import Lora, MergeError, load, lora

__all__ = ["Lora", "MergeError", "load", "lora"]
