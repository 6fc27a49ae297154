"""Work on the matrices of a stacked weight one at a time, so that one is decoded at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax.core.views import WeightView
from memjax.weights.decoded import to_matrix


def per_matrix(fn: Callable[..., Any], view: WeightView, *rest: Any) -> Any:
    """Returns ``fn(matrix, *rest)`` for every matrix of a stack in turn, stacked.

    Args:
      fn: takes a view without batch axes and what ``rest`` holds for it.
      view: ``[*batch, ...]``.
      rest: pytrees of arrays with the batch axes in front.
    """
    if not view.batch_ndim:
        return fn(view, *rest)
    return lax.map(lambda slices: per_matrix(fn, *slices), (view, *rest))


def matrix_of(view: WeightView) -> jax.Array:
    """Returns the dense ``[d_in, d_out]``, float32 or wider, of a view without batch axes."""
    return to_matrix(view.astype(jnp.promote_types(view.dtype, jnp.float32)).materialize(), view.axes)
