"""Where a Hopper GPU encodes and decodes by a kernel: which formats, arrays and programs."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax

from pallas_kernels import codec as kernels
from pallas_kernels.packed_matmul import on_hopper

LEAST = 2**18
"""Elements below which starting a kernel costs as much as what it saves."""


def takes(form: kernels.Form, shape: tuple[int, ...], dtype: Any) -> bool:
    """Returns whether the kernels encode to, or decode to, an array of this shape and dtype."""
    return math.prod(shape) >= LEAST and on_hopper() and whole_arrays() and not kernels.unsupported(form, shape, dtype)


def whole_arrays() -> bool:
    """Returns whether arrays are of one device: XLA cannot cut a kernel along a mesh, shard_map does."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)


def encode(x: jax.Array, words: tuple[jax.Array, jax.Array] | None, form: kernels.Form) -> Any:
    """Returns (codes, scale, offset or None) of groups along the last axis of ``x``."""
    return varying_like((x, words), kernels.encode_words(x, words, form=form))


def decode(codes: Any, scale: Any, offset: Any, form: kernels.Form, dtype: Any) -> jax.Array:
    """Returns the array in ``dtype`` that codes with groups along the last axis stand for."""
    made = kernels.Codes(codes, scale, offset)
    dense = kernels.decode(made, bits=form.bits, group=form.group, dtype=dtype, implementation="mosaic_gpu")
    return varying_like(made, dense)


def varying_like(inputs: Any, outputs: Any) -> Any:
    """Marks what a kernel made of ``inputs`` as varying over the mesh axes of shard_map over which they vary."""
    axes = set[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(inputs)))
    if not axes:
        return outputs
    return jax.tree.map(lambda leaf: lax.pcast(leaf, tuple(sorted(axes)), to="varying"), outputs)
