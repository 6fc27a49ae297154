"""Attention masks by name, as settings write them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

from memjax.attention import Mask, masks

MASKS: dict[str, Callable[[int], Mask]] = {
    "window": lambda n: masks.window(n - 1, 0),
    "sinks": masks.sink,
    "chunked": masks.chunked,
}


def parse_attention(text: str | None) -> Mask | None:
    """Returns the mask that a setting names, None where a token sees all before it.

    Args:
      text: parts such as ``window=1024,sinks=4``; a token sees what any of them shows. ``window=n``: the last n tokens,
        its own included; ``sinks=n``: the first n; ``chunked=n``: those of its chunk of n. ``all`` or None: all.

    Raises:
      ValueError: a part that is not ``name=number``, an unknown name, one that comes twice, a number below 1, or
        nothing but sinks.
    """
    if text in (None, "all"):
        return None
    parts: dict[str, Mask] = {}
    for part in text.split(","):
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in MASKS:
            raise ValueError(
                f"attention={text!r}: no part {name!r}; known are {', '.join(f'{x}=N' for x in MASKS)}, all"
            )
        if name in parts:
            raise ValueError(f"attention={text!r} has {name} twice")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"attention={text!r}: {name} needs a number of at least 1, got {value!r}")
        parts[name] = MASKS[name](int(value))
    if set(parts) == {"sinks"}:
        raise ValueError(f"attention={text!r} hides a token from itself; add window=N or chunked=N")
    return functools.reduce(operator.or_, parts.values())
