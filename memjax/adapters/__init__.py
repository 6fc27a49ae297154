"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.bias_only import BiasOnly, bias_only
from memjax.adapters.ce_ssl import CeSsl, ce_ssl, concat_batches, cutmix, plan_ranks_one_shot
from memjax.adapters.dora import Dora, dora
from memjax.adapters.ia3 import Ia3, ia3
from memjax.adapters.lamda import Lamda, frozen_rows, lamda, lamda_plan, progressive_freeze
from memjax.adapters.lora import Lora, lora
from memjax.adapters.lora_fa import LoraFa, lora_fa, lora_fa_correction
from memjax.adapters.mos import Mos, mos
from memjax.adapters.olora import Olora, olora
from memjax.adapters.pissa import Pissa, pissa
from memjax.adapters.snell import Snell, allocate_budget, init_budget, snell, snella, update_budget
from memjax.adapters.vera import Vera, vera

__all__ = [
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
    "Pissa",
    "Snell",
    "Vera",
    "allocate_budget",
    "bias_only",
    "ce_ssl",
    "concat_batches",
    "cutmix",
    "dora",
    "frozen_rows",
    "ia3",
    "init_budget",
    "lamda",
    "lamda_plan",
    "load",
    "lora",
    "lora_fa",
    "lora_fa_correction",
    "mos",
    "olora",
    "pissa",
    "plan_ranks_one_shot",
    "progressive_freeze",
    "snell",
    "snella",
    "update_budget",
    "vera",
]
