"""Leaves as stacks of matrices ``[batch, rows, columns]``: rows are a weight's inputs, columns its outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.core.views import Axes, make_axes


class MatrixSpec(NamedTuple):
    """Which axes of a leaf are a stack, rows and columns; counted from the end, batch axes lead.

    Attributes:
      batch: axes of the stack (layers, experts).
      rows: input axes.
      cols: output axes.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]


def matrix_spec(leaf: Any, axes: Axes | None = None) -> MatrixSpec:
    """Returns how ``leaf`` is read as matrices.

    Args:
      leaf: array ``[*batch, ...]`` of two or more axes.
      axes: of the weight; default: inputs are the axis before the last, outputs the last, all others the stack.

    Raises:
      ValueError: fewer axes than a matrix has, or axes that do not fit the leaf.
    """
    if leaf.ndim < 2:
        raise ValueError(f"a leaf of shape {tuple(leaf.shape)} is not a matrix")
    axes = Axes() if axes is None else make_axes(axes.inputs, axes.outputs, leaf.ndim)
    return MatrixSpec(tuple(range(-leaf.ndim, -axes.ndim)), axes.inputs, axes.outputs)


def matrix_shape(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[int, int, int]:
    """Returns ``(batch, rows, columns)`` of a leaf of ``shape``."""
    batch, rows, cols = (math.prod(shape[axis] for axis in axes) for axes in spec)
    return batch, rows, cols


def as_matrices(leaf: jax.Array, spec: MatrixSpec) -> jax.Array:
    """Returns ``leaf`` as ``[batch, rows, columns]``."""
    order = [axis % leaf.ndim for axes in spec for axis in axes]
    return jnp.transpose(leaf, order).reshape(matrix_shape(leaf.shape, spec))


def from_matrices(matrices: jax.Array, spec: MatrixSpec, shape: tuple[int, ...]) -> jax.Array:
    """Returns the leaf of ``shape`` that `as_matrices` gave as ``matrices``."""
    order = [axis % len(shape) for axes in spec for axis in axes]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(matrices.reshape([shape[axis] for axis in order]), inverse)
