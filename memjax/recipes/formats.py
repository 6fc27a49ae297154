"""The formats in which the commands hold and write weights, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from memjax import codecs

Packing = Literal["int4", "int8", "q4_0", "q4_1", "q8_0"]
Format = Literal["keep", "dense", Packing]

# Name -> codec, given the number of weights per scale (the formats of GGUF have their own).
CODECS: dict[str, Callable[[int], codecs.Codec]] = {
    "int4": lambda group: codecs.int4(group=group),
    "int8": lambda group: codecs.int8(group=group),
    "q4_0": lambda group: codecs.q4_0(),
    "q4_1": lambda group: codecs.q4_1(),
    "q8_0": lambda group: codecs.q8_0(),
}


def codec_of(format: str, group: int) -> codecs.Codec:
    """Returns the codec of a format.

    Raises:
      ValueError: an unknown format, or a group that is not positive.
    """
    if format not in CODECS:
        raise ValueError(f"unknown format {format!r}; known are {', '.join(CODECS)}")
    return CODECS[format](group)
