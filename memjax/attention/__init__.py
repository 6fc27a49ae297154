"""Attention under masks that say which blocks to skip."""

from memjax.attention import masks
from memjax.attention.block_mask import BlockMask, block_mask_in_program, make_block_mask
from memjax.attention.expression import Mask
from pallas_kernels.flash_attention import BlockList, Elements

__all__ = ["BlockList", "BlockMask", "Elements", "Mask", "block_mask_in_program", "make_block_mask", "masks"]
