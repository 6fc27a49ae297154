"""The formats of grouped integer codes along the last axis, and which of them the kernels take."""

from __future__ import annotations

from typing import NamedTuple

import jax

SPAN = 8
"""Consecutive elements that a thread reads together."""


class Form(NamedTuple):
    """How numbers become codes.

    A number is ``code * scale + offset``, or ``(code - 2**(bits - 1)) * scale`` for symmetric codes (two's complement
    at 8 bits). Codes are packed in blocks of a group, as `pallas_kernels._bits.pack` does; scales and offsets are
    bfloat16 bit patterns.

    Attributes:
      bits: 2, 4 or 8.
      group: consecutive elements of the last axis that share a scale.
      symmetric: whether there is a scale only.
    """

    bits: int
    group: int
    symmetric: bool = False

    @property
    def spans(self) -> int:
        """Spans of a thread's unit: as many as there are codes in a byte, ``group / spans`` elements apart."""
        return 8 // self.bits

    @property
    def unit(self) -> int:
        """Elements that a thread encodes together, into 8 bytes."""
        return SPAN * self.spans

    @property
    def lanes(self) -> int:
        """Neighbouring lanes that hold one group."""
        return self.group // self.unit


class Codes(NamedTuple):
    """Groups of the last axis of an array ``[..., n]`` as codes.

    Attributes:
      codes: uint8 ``[..., n * bits / 8]``.
      scale: bfloat16 bit patterns, uint16 ``[..., n / group]``.
      offset: the same, or None for symmetric formats.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None


DTYPES = ("bfloat16", "float16", "float32")


def unsupported(form: Form, dtype: str) -> str | None:
    """Returns why threads cannot hold groups of this format in registers, or None if they can."""
    if form.bits not in (2, 4, 8):
        return f"codes have {form.bits} bits; the kernels make 2, 4 and 8"
    if form.group % form.unit or form.lanes not in (1, 2, 4, 8, 16, 32):
        sizes = ", ".join(str(form.unit * 2**i) for i in range(6))
        return f"groups of {form.group}; the kernels make groups of {sizes} at {form.bits} bits"
    if dtype not in DTYPES:
        return f"arrays of {dtype}; the kernels take {', '.join(DTYPES)}"
    return None
