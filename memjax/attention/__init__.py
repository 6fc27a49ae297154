"""Attention under masks that say which blocks to skip."""

from memjax.attention import masks
from memjax.attention.attend import attend, column_sums, default_blocks
from memjax.attention.block_mask import BlockMask, block_mask_in_program, make_block_mask
from memjax.attention.expression import Mask
from memjax.attention.online import online_softmax
from pallas_kernels.flash_attention import BlockList, Elements, merge

__all__ = [
    "BlockList",
    "BlockMask",
    "Elements",
    "Mask",
    "attend",
    "block_mask_in_program",
    "column_sums",
    "default_blocks",
    "make_block_mask",
    "masks",
    "merge",
    "online_softmax",
]
