"""Attention under masks that say which blocks to skip."""

from memjax.attention import masks
from memjax.attention.alisa import alisa_mask
from memjax.attention.attend import attend, block_lists, column_sums, default_blocks
from memjax.attention.block_mask import BlockMask, block_mask_in_program, make_block_mask
from memjax.attention.escaip import frequency_embedding, neighbour_attention, spherical_harmonics
from memjax.attention.expression import Mask
from memjax.attention.linformer import linformer_attention, linformer_init
from memjax.attention.minference import choose_pattern, vertical_slash
from memjax.attention.moba import moba_attention
from memjax.attention.nsa import NSA, nsa_attention, nsa_init
from memjax.attention.online import online_softmax
from memjax.attention.recall import recall
from memjax.attention.s2a_former import StripAttention, strip_attention, strip_init
from memjax.attention.scale_dit import anchor_positions, hilbert_order, scale_dit_mask
from memjax.attention.select import block_scores, block_topk, select_mass, select_topk, token_blocks
from memjax.attention.sparge import sparge_select
from memjax.attention.video_xl import VideoLayout, video_layout, video_xl_attention, video_xl_mask
from pallas_kernels.flash_attention import BlockList, Elements, merge

__all__ = [
    "BlockList",
    "BlockMask",
    "Elements",
    "Mask",
    "NSA",
    "StripAttention",
    "VideoLayout",
    "alisa_mask",
    "anchor_positions",
    "attend",
    "block_lists",
    "block_mask_in_program",
    "block_scores",
    "block_topk",
    "choose_pattern",
    "column_sums",
    "default_blocks",
    "frequency_embedding",
    "hilbert_order",
    "linformer_attention",
    "linformer_init",
    "make_block_mask",
    "masks",
    "merge",
    "moba_attention",
    "neighbour_attention",
    "nsa_attention",
    "nsa_init",
    "online_softmax",
    "recall",
    "scale_dit_mask",
    "select_mass",
    "select_topk",
    "sparge_select",
    "spherical_harmonics",
    "strip_attention",
    "strip_init",
    "token_blocks",
    "vertical_slash",
    "video_layout",
    "video_xl_attention",
    "video_xl_mask",
]
