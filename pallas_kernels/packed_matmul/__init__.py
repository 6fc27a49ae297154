"""Products with weights that are stored as codes, and their decoding at the speed of memory."""

from pallas_kernels.packed_matmul.api import decode, packed_matmul, unsupported
from pallas_kernels.packed_matmul.formats import NF4_LEVELS, Format

__all__ = ["NF4_LEVELS", "Format", "decode", "packed_matmul", "unsupported"]
