"""Stateless random bits from a seed and a counter; the implementation is shared with the kernels."""

from pallas_kernels._bits import hash_bits, normal, random_bits, seed_words, uniform

__all__ = ["hash_bits", "normal", "random_bits", "seed_words", "uniform"]
