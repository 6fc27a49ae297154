"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.conv_bn import conv_bn_tune, fold_bn
from memjax.adapters.lora import Lora, lora
from memjax.adapters.lrec import TeacherTopK, act_rms, distill_loss, lrec_init, teacher_topk
from memjax.adapters.masks import cubic, gradual, masked_updates, pack_mask, prune, unpack_mask
from memjax.adapters.squarehead import distillation_kl, distillation_loss, paired_blocks, squarehead

__all__ = [
    "Adapter",
    "AdapterBytes",
    "Lora",
    "MergeError",
    "TeacherTopK",
    "act_rms",
    "conv_bn_tune",
    "cubic",
    "distill_loss",
    "distillation_kl",
    "distillation_loss",
    "fold_bn",
    "gradual",
    "load",
    "lora",
    "lrec_init",
    "masked_updates",
    "pack_mask",
    "paired_blocks",
    "prune",
    "squarehead",
    "teacher_topk",
    "unpack_mask",
]
