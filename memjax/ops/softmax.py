"""Softmax that keeps its result, or codes of it, whose gradient sums to zero over every row either way.

Codes in place of what an operation without parameters keeps: the idea of S2A: Structure to Activation, 2025, as
reconstructed here from its abstract: no code of it is public.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from memjax.codecs import Codec
from memjax.ops.once import once
from memjax.ops.wide import wide

Residual = Literal["output"] | Codec


def softmax(x: jax.Array, *, residual: Residual = "output") -> jax.Array:
    """Returns the softmax over the last axis.

    Args:
      x: float ``[..., N]``; -inf takes no part.
      residual: what backward is given: "output" keeps the result, exactly; a codec keeps codes of it, in groups along
        N. Zeros stay zeros under symmetric codecs and under those whose offset is the least element of a group.

    Returns:
      ``[..., N]`` in the dtype of ``x``, computed in float32.

    Raises:
      ValueError: another ``residual``, groups that do not divide N.
    """
    if residual != "output" and not isinstance(residual, Codec):
        raise ValueError(f"residual must be 'output' or a codec, got {residual!r}")
    return _softmax(x, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(x: jax.Array, residual: Residual) -> jax.Array:
    return jax.nn.softmax(wide(x), axis=-1).astype(x.dtype)


def _forward(x: jax.Array, residual: Residual) -> tuple[jax.Array, Any]:
    y = _softmax(x, residual)
    return y, y if residual == "output" else residual.encode(once(y), -1)


def _backward(residual: Residual, kept: Any, dy: jax.Array) -> tuple[jax.Array]:
    p, slope = wide(kept if residual == "output" else kept.decode()), wide(dy)
    mean = jnp.sum(slope * p, axis=-1, keepdims=True) / jnp.sum(p, axis=-1, keepdims=True)
    return (((slope - mean) * p).astype(dy.dtype),)


_softmax.defvjp(_forward, _backward)
