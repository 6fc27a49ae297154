"""The formats in which the commands hold and write weights, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from memjax import codecs

Packing = Literal["int8", "int6", "int4", "int3", "int2", "nf4", "fp8", "q4_0", "q4_1", "q8_0"]
Format = Literal["keep", "dense", Packing]

# Name -> codec, given the number of weights per scale.
CODECS: dict[str, Callable[[int], codecs.Codec]] = {
    "int8": lambda group: codecs.int8(group=group),
    "int6": lambda group: codecs.int6(group=group),
    "int4": lambda group: codecs.int4(group=group),
    "int3": lambda group: codecs.int3(group=group),
    "int2": lambda group: codecs.int2(group=group),
    "nf4": lambda group: codecs.nf4(block=group),
    "fp8": lambda group: codecs.fp8(group=group),
    "q4_0": lambda group: codecs.q4_0(),
    "q4_1": lambda group: codecs.q4_1(),
    "q8_0": lambda group: codecs.q8_0(),
}


def codec_of(format: str, group: int, search: bool = False) -> codecs.Codec:
    """Returns the codec of a format.

    Args:
      format: a name of `CODECS`.
      group: weights per scale; q4_0, q4_1 and q8_0 have 32 whatever it says.
      search: choose every scale for the least squared error; for the int formats.

    Raises:
      ValueError: an unknown format, a group that is not positive, or a search for a format without one.
    """
    if format not in CODECS:
        raise ValueError(f"unknown format {format!r}; known are {', '.join(CODECS)}")
    codec = CODECS[format](group)
    if not search:
        return codec
    if not isinstance(codec, codecs.Grouped):
        raise ValueError(f"the scales of {format} are given by the weights; search is for the int formats")
    return dataclasses.replace(codec, search=True)
