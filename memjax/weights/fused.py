"""Where a Hopper GPU multiplies packed weights by a kernel: which weights, how many rows, and the operands."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from memjax.codecs import Gguf, Grouped, Nf4, Packed
from memjax.codecs.fused import varying_like, whole_arrays
from memjax.codecs.packed import from_bits
from memjax.core.views import Axes
from pallas_kernels import packed_matmul as kernels

FEW_ROWS = 256
"""Up to as many rows the kernel that decodes in registers beats decoding first; from the `packed_matmul` benchmark."""


def kernel_format(packed: Packed, axes: Axes, casts: tuple[Any, ...]) -> kernels.Format | None:
    """Returns the kernels' name of a format, or None where they do not run: another layout, dtype or device.

    Args:
      packed: the codes.
      axes: of the weight.
      casts: dtypes that the program casts the weight to.
    """
    codec, dtype = packed.codec, casts[-1] if casts else packed.dtype
    if jnp.dtype(dtype) != jnp.bfloat16 or not kernels.on_hopper() or not whole_arrays():
        return None
    if packed.ndim != 2 or axes != Axes() or packed.axes != (-2,):
        return None
    if not isinstance(codec, Grouped | Gguf | Nf4) or not isinstance(codec.group, int):
        return None
    form = kernels.Format(codec.bits, codec.group, isinstance(codec, Nf4), packed.offset is not None)
    return None if kernels.unsupported(form, *packed.shape) else form


@jax.jit  # constants of a codec stay inside: under jax.checkpoint a gradient rule must not bring new ones
def _operands(packed: Packed) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array | None]:
    scale = packed.codec.scales(packed.scale).astype(jnp.bfloat16)
    offset = packed.offset
    if offset is not None:
        offset = from_bits(offset, packed.codec.scale_dtype).astype(jnp.bfloat16)
    return tuple(map(jnp.asarray, packed.planes)), scale, offset


def decode(packed: Packed, form: kernels.Format) -> jax.Array:
    """Returns the dense weight, bfloat16 ``[k, n]``."""
    return varying_like(packed, kernels.decode(*_operands(packed), form=form))


def multiply(x: jax.Array, packed: Packed, form: kernels.Format, dtype: Any) -> jax.Array:
    """Returns ``x [..., k] @ weight [k, n]`` in ``dtype`` (bfloat16 or float32), the weight decoded in registers."""
    y = kernels.packed_matmul(x.reshape(-1, x.shape[-1]), *_operands(packed), form=form, out_dtype=dtype)
    return varying_like((x, packed), y.reshape(*x.shape[:-1], y.shape[-1]))


def takes(x: jax.Array, settings: dict[str, Any]) -> bool:
    """Returns whether `multiply` is the faster way for these rows and the exact one for these settings."""
    few = 0 < math.prod(x.shape[:-1]) <= FEW_ROWS
    dtype = settings.get("preferred_element_type")
    return few and x.dtype == jnp.bfloat16 and settings.get("precision") is None and dtype in (None, *_OUT)


_OUT = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float32)))
