"""Products with weights that are stored as codes, and their decoding at the speed of memory."""

from pallas_kernels.packed_matmul.api import decode, on_hopper, packed_matmul, unsupported
from pallas_kernels.packed_matmul.formats import Format

__all__ = ["Format", "decode", "on_hopper", "packed_matmul", "unsupported"]
