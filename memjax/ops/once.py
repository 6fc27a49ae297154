"""A mark on what an operation stores in a form that has no derivative."""

from __future__ import annotations

from typing import Any

import jax


@jax.custom_jvp
def once(x: jax.Array) -> jax.Array:
    """Returns ``x``; raises TypeError when a gradient of a gradient would need the derivative of what is stored."""
    return x


@once.defjvp
def _twice(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "second-order differentiation through an operation whose backward pass reads codes or a fit, which have no "
        "derivative: use the residual of that operation that is exact ('input', or 'output' of norms and softmax)"
    )
