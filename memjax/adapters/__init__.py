"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import METHODS, Adapter, AdapterBytes, MergeError, adapted, load
from memjax.adapters.bias_only import BiasOnly, bias_only
from memjax.adapters.ce_ssl import CeSsl, ce_ssl, concat_batches, cutmix, plan_ranks_one_shot
from memjax.adapters.conv_bn import conv_bn_tune, fold_bn
from memjax.adapters.dora import Dora, dora
from memjax.adapters.ia3 import Ia3, ia3
from memjax.adapters.labels import by_label, labels, lora_plus
from memjax.adapters.lamda import Lamda, frozen_rows, lamda, lamda_plan, progressive_freeze
from memjax.adapters.lora import Lora, lora
from memjax.adapters.lora_fa import LoraFa, lora_fa, lora_fa_correction
from memjax.adapters.lrec import TeacherTopK, act_rms, distill_loss, lrec_init, teacher_topk
from memjax.adapters.masks import cubic, gradual, masked_updates, pack_mask, prune, unpack_mask
from memjax.adapters.mos import Mos, mos
from memjax.adapters.olora import Olora, olora
from memjax.adapters.pissa import Pissa, pissa
from memjax.adapters.prompt import Prompt, prepend, prompt
from memjax.adapters.side import Side, side
from memjax.adapters.snell import Snell, allocate_budget, init_budget, snell, snella, update_budget
from memjax.adapters.squarehead import distillation_kl, distillation_loss, paired_blocks, squarehead
from memjax.adapters.stack import PerRow, attach_stack, average, compose, stack
from memjax.adapters.vera import Vera, vera

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterBytes",
    "BiasOnly",
    "CeSsl",
    "Dora",
    "Ia3",
    "Lamda",
    "Lora",
    "LoraFa",
    "MergeError",
    "Mos",
    "Olora",
    "PerRow",
    "Pissa",
    "Prompt",
    "Side",
    "Snell",
    "TeacherTopK",
    "Vera",
    "act_rms",
    "adapted",
    "allocate_budget",
    "attach_stack",
    "average",
    "bias_only",
    "by_label",
    "ce_ssl",
    "compose",
    "concat_batches",
    "conv_bn_tune",
    "cubic",
    "cutmix",
    "distill_loss",
    "distillation_kl",
    "distillation_loss",
    "dora",
    "fold_bn",
    "frozen_rows",
    "gradual",
    "ia3",
    "init_budget",
    "labels",
    "lamda",
    "lamda_plan",
    "load",
    "lora",
    "lora_fa",
    "lora_fa_correction",
    "lora_plus",
    "lrec_init",
    "masked_updates",
    "mos",
    "olora",
    "pack_mask",
    "paired_blocks",
    "pissa",
    "plan_ranks_one_shot",
    "prepend",
    "progressive_freeze",
    "prompt",
    "prune",
    "side",
    "snell",
    "snella",
    "squarehead",
    "stack",
    "teacher_topk",
    "unpack_mask",
    "update_budget",
    "vera",
]
