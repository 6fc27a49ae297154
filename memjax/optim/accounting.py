"""Bytes of optimizer state: what a state holds, and what one would hold."""

from __future__ import annotations

from typing import Any

import jax
import optax

from memjax.core.bytes import nbytes


def state_bytes(state: Any) -> int:
    """Returns the bytes of all arrays of an optimizer's state, abstract or not."""
    return nbytes(state)


def init_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Returns the bytes that ``tx.init(params)`` would take, and allocates nothing.

    Args:
      tx: any optax transformation.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
    """
    return nbytes(jax.eval_shape(tx.init, params))
