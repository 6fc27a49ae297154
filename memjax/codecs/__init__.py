"""Codecs: arrays kept as small codes with a scale per group."""

from memjax.codecs.gguf import Gguf, from_gguf, q4_0, q4_1, q8_0, to_gguf
from memjax.codecs.grouped import Grouped, int4, int8
from memjax.codecs.packed import Codec, CodecError, Packed, error
from pallas_kernels._bits import pack, unpack

__all__ = [
    "Codec",
    "CodecError",
    "Gguf",
    "Grouped",
    "Packed",
    "error",
    "from_gguf",
    "int4",
    "int8",
    "pack",
    "q4_0",
    "q4_1",
    "q8_0",
    "to_gguf",
    "unpack",
]
