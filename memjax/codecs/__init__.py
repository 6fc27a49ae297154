"""Codecs: arrays kept as small codes with a scale per group."""

from memjax.codecs.bipolar import Bipolar, bipolar, from_bipolar, to_bipolar
from memjax.codecs.bitsandbytes import BitsAndBytes, from_bitsandbytes, to_bitsandbytes
from memjax.codecs.dynamic import Dynamic, Positive, dynamic, positive
from memjax.codecs.fp8 import Fp8, fp8
from memjax.codecs.gguf import Gguf, from_gguf, q4_0, q4_1, q8_0, to_gguf
from memjax.codecs.grouped import Grouped, int2, int3, int4, int6, int8
from memjax.codecs.nf4 import NestedScale, Nf4, nf4
from memjax.codecs.packed import Codec, CodecError, Packed, error
from pallas_kernels._bits import pack, unpack

__all__ = [
    "Bipolar",
    "BitsAndBytes",
    "Codec",
    "CodecError",
    "Dynamic",
    "Fp8",
    "Gguf",
    "Grouped",
    "NestedScale",
    "Nf4",
    "Packed",
    "Positive",
    "bipolar",
    "dynamic",
    "error",
    "fp8",
    "from_bipolar",
    "from_bitsandbytes",
    "from_gguf",
    "int2",
    "int3",
    "int4",
    "int6",
    "int8",
    "nf4",
    "pack",
    "positive",
    "q4_0",
    "q4_1",
    "q8_0",
    "to_bipolar",
    "to_bitsandbytes",
    "to_gguf",
    "unpack",
]
