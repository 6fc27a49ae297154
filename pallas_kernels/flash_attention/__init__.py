"""Block-sparse attention: what a kernel reads of a mask."""

from pallas_kernels.flash_attention.lists import BlockList, Elements

__all__ = ["BlockList", "Elements"]
