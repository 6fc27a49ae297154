"""Grouped integer codes along the last axis, made and read in one pass over memory."""

from pallas_kernels.codec.api import decode, encode, encode_words, unsupported
from pallas_kernels.codec.formats import Codes, Form

__all__ = ["Codes", "Form", "decode", "encode", "encode_words", "unsupported"]
