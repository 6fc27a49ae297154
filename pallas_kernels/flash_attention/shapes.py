"""Attention of real models, on which the kernels are measured."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call: B, H, Hk, S = T, D = Dv, and its mask: a name and the numbers that go with it."""

    batch: int
    heads: int
    key_heads: int
    length: int
    head_dim: int
    mask: tuple[str | float, ...]


SHAPES = {
    "causal-2k": Shape(4, 32, 8, 2048, 128, ("causal",)),
    "causal-8k": Shape(1, 16, 16, 8192, 128, ("causal",)),
    "causal-16k": Shape(1, 16, 16, 16384, 128, ("causal",)),
    "causal-8k/d64": Shape(1, 32, 32, 8192, 64, ("causal",)),
    "causal-8k/d256": Shape(1, 8, 8, 8192, 256, ("causal",)),
    "causal-8k/grouped": Shape(1, 32, 8, 8192, 128, ("causal",)),
    "window-1024-16k": Shape(1, 16, 16, 16384, 128, ("window", 1024)),
    "window-sinks-16k": Shape(1, 16, 16, 16384, 128, ("window and sinks", 1024, 4)),
    "documents-16k": Shape(1, 16, 16, 16384, 128, ("documents", 1024)),
    "blocks-0.05-32k": Shape(1, 16, 16, 32768, 128, ("blocks", 0.05)),
    "blocks-0.1-32k": Shape(1, 16, 16, 32768, 128, ("blocks", 0.1)),
    "blocks-0.25-32k": Shape(1, 16, 16, 32768, 128, ("blocks", 0.25)),
}
