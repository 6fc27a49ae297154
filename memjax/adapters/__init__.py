"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.lora import Lora, lora
from memjax.adapters.squarehead import distillation_kl, distillation_loss, paired_blocks, squarehead

__all__ = [
    "Adapter",
    "AdapterBytes",
    "Lora",
    "MergeError",
    "distillation_kl",
    "distillation_loss",
    "load",
    "lora",
    "paired_blocks",
    "squarehead",
]
