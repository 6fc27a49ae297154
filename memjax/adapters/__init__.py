"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.conv_bn import conv_bn_tune, fold_bn
from memjax.adapters.labels import by_label, labels, lora_plus
from memjax.adapters.lora import Lora, lora
from memjax.adapters.lrec import TeacherTopK, act_rms, distill_loss, lrec_init, teacher_topk
from memjax.adapters.masks import cubic, gradual, masked_updates, pack_mask, prune, unpack_mask
from memjax.adapters.prompt import Prompt, prepend, prompt
from memjax.adapters.side import Side, side
from memjax.adapters.squarehead import distillation_kl, distillation_loss, paired_blocks, squarehead

__all__ = [
    "Adapter",
    "AdapterBytes",
    "Lora",
    "MergeError",
    "Prompt",
    "Side",
    "TeacherTopK",
    "act_rms",
    "by_label",
    "conv_bn_tune",
    "cubic",
    "distill_loss",
    "distillation_kl",
    "distillation_loss",
    "fold_bn",
    "gradual",
    "labels",
    "load",
    "lora",
    "lora_plus",
    "lrec_init",
    "masked_updates",
    "pack_mask",
    "paired_blocks",
    "prepend",
    "prompt",
    "prune",
    "side",
    "squarehead",
    "teacher_topk",
    "unpack_mask",
]
