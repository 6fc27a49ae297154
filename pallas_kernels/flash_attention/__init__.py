"""Block-sparse attention: what a kernel reads of a mask, the attention, its gradients and the mass per key."""

from pallas_kernels.flash_attention.api import (
    Implementation,
    column_sums,
    forward,
    key_value_gradients,
    merge,
    query_gradient,
)
from pallas_kernels.flash_attention.lists import BlockList, Elements
from pallas_kernels.flash_attention.scores import Reduce, ScoreMod

__all__ = [
    "BlockList",
    "Elements",
    "Implementation",
    "Reduce",
    "ScoreMod",
    "column_sums",
    "forward",
    "key_value_gradients",
    "merge",
    "query_gradient",
]
