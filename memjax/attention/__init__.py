"""Attention under masks that say which blocks to skip."""

from pallas_kernels.flash_attention import BlockList, Elements

__all__ = ["BlockList", "Elements"]
