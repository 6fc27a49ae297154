"""What operations can do about residuals that are stored as codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

packing = jax.make_user_context(default_value=False)
"""True while `memjax.remat` traces a function whose residuals it packs: ``packing.value``, ``with packing(True)``.

An operation that may choose what it keeps then keeps what bears rounding: not a result from which another value is
recovered by a division, nor a statistic that has to fit what is decoded.
"""


class CodesRule(NamedTuple):
    """How an operation makes or reads the codes of its arguments in its own pass over memory.

    Nothing is differentiated through either. Where some results of an operation are not needed, neither is asked.

    Attributes:
      make: ``(arguments, codecs, settings) -> (outputs, codes)``: evaluates the operation on arrays and encodes along
        the last axis, rounded to nearest, those arguments whose codec is not None.
      read: ``(arguments, settings) -> outputs``: evaluates it on arguments some of which are `memjax.codecs.Packed`.
      results: how many the operation has.

    ``make`` or ``read`` is None where there is none, and returns None where it does not take what it is given.
    """

    make: Callable[..., Any] | None = None
    read: Callable[..., Any] | None = None
    results: int = 1


codes_rules: dict[str, CodesRule] = {}
"""Name of an operation (`memjax.core.rules.operation`) -> its rule; `memjax.remat` asks them."""
