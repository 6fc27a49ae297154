"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.lora import Lora, lora

__all__ = ["Adapter", "AdapterBytes", "Lora", "MergeError", "load", "lora"]
