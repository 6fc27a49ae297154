"""Adapters: few trained numbers that change a frozen model. One file per method."""

from memjax.adapters.adapter import Adapter, AdapterBytes, MergeError, load
from memjax.adapters.bias_only import BiasOnly, bias_only
from memjax.adapters.dora import Dora, dora
from memjax.adapters.ia3 import Ia3, ia3
from memjax.adapters.lora import Lora, lora
from memjax.adapters.lora_fa import LoraFa, lora_fa, lora_fa_correction
from memjax.adapters.olora import Olora, olora
from memjax.adapters.pissa import Pissa, pissa
from memjax.adapters.vera import Vera, vera

__all__ = [
    "Adapter",
    "AdapterBytes",
    "BiasOnly",
    "Dora",
    "Ia3",
    "Lora",
    "LoraFa",
    "MergeError",
    "Olora",
    "Pissa",
    "Vera",
    "bias_only",
    "dora",
    "ia3",
    "load",
    "lora",
    "lora_fa",
    "lora_fa_correction",
    "olora",
    "pissa",
    "vera",
]
