"""Marks on values of which what is stored has no derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def first_order(message: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the identity that raises TypeError with ``message`` where a gradient of a gradient needs its derivative.

    A rule applies it to what it encodes: codes are integers, so the second derivative would else be silently wrong.
    """

    @jax.custom_jvp
    def mark(x: jax.Array) -> jax.Array:
        return x

    @mark.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(message)

    return mark
