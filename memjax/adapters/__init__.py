"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.lora import Lora, lora
from memjax.adapters.masks import cubic, gradual, masked_updates, pack_mask, prune, unpack_mask
from memjax.adapters.squarehead import distillation_kl, distillation_loss, paired_blocks, squarehead

__all__ = [
    "Adapter",
    "AdapterBytes",
    "Lora",
    "MergeError",
    "cubic",
    "distillation_kl",
    "distillation_loss",
    "gradual",
    "load",
    "lora",
    "masked_updates",
    "pack_mask",
    "paired_blocks",
    "prune",
    "squarehead",
    "unpack_mask",
]
