"""The formats in which the commands hold and write weights, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from memjax import codecs

Packing = Literal["int8", "int6", "int4", "int3", "int2", "nf4", "fp8", "q4_0", "q4_1", "q8_0"]
Format = Literal["keep", "dense", Packing]

# Name -> codec, given the number of weights per scale.
CODECS: dict[str, Callable[[Any], codecs.Codec]] = {
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
# Formats whose weights per scale are no choice.
ONLY_GROUP = {"keep": None, "dense": None, "q4_0": 32, "q4_1": 32, "q8_0": 32}


def group_of(format: str, group: int | None) -> int | None:
    """Returns the weights per scale of a format, by default 64; None where nothing is packed.

    Raises:
      ValueError: a group that is not positive, or given where there is no choice.
    """
    if format in ONLY_GROUP:
        only = ONLY_GROUP[format]
        if group not in (None, only):
            reason = "packs nothing" if only is None else f"has groups of {only}"
            raise ValueError(f"format={format} {reason}; leave group={group} out")
        return only
    if group is not None and group < 1:
        raise ValueError(f"group={group} must be at least 1")
    return 64 if group is None else group


def codec_of(format: str, group: int | None = None, search: bool = False) -> codecs.Codec:
    """Returns the codec of a format.

    Args:
      format: a name of `CODECS`.
      group: weights per scale, see `group_of`.
      search: choose every scale for the least squared error; for the int formats.

    Raises:
      ValueError: an unknown format, a group that it cannot have, or a search for a format without one.
    """
    if format not in CODECS:
        raise ValueError(f"unknown format {format!r}; known are {', '.join(CODECS)}")
    codec = CODECS[format](group_of(format, group))
    if not search:
        return codec
    if not isinstance(codec, codecs.Grouped):
        raise ValueError(f"the scales of {format} are given by the weights; search is for the int formats")
    return dataclasses.replace(codec, search=True)
