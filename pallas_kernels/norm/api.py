"""RMSNorm with a packed residual: which implementation runs, and how it cuts the work."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.codec.api import Implementation, integer_form, runs_kernel
from pallas_kernels.codec.formats import Codes, Form
from pallas_kernels.codec.formats import unsupported as unsupported_form
from pallas_kernels.norm import kernel, reference

_BLOCKS = 3 * 132
"""Blocks of the backward kernel that fit on an H100 at once."""


def unsupported(form: Form, shape: tuple[int, ...], dtype: Any) -> str | None:
    """Returns why the Mosaic GPU kernels cannot take an input of this shape and dtype, or None if they can."""
    name = jnp.dtype(dtype).name
    if name != kernel.DTYPE:
        return f"arrays of {name}; the kernels take {kernel.DTYPE}"
    reason = unsupported_form(form, name)
    if reason:
        return reason
    cut = kernel.cut_row(shape[-1], form)
    if cut is None:
        step, most = form.unit * 32, kernel.MAX_UNIT_ELEMENTS * 32 * kernel.WARPS
        return f"rows of {shape[-1]}; the kernels take multiples of {step} up to {most}, and long ones of {4 * step}"
    if not math.prod(shape) or math.prod(shape[:-1]) % cut.rows:
        return f"{math.prod(shape[:-1])} rows; at this size the kernels take multiples of {cut.rows}"
    return None


def rms_norm_packed(
    x: jax.Array,
    gain: jax.Array,
    *,
    eps: float,
    bits: int,
    group: int,
    symmetric: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Codes, jax.Array]:
    """Returns ``x / sqrt(mean(x**2) + eps) * gain`` over the last axis and what its backward pass reads.

    Args:
      x: float ``[..., D]``.
      gain: float ``[D]``.
      eps: added to the mean square.
      bits: 2, 4 or 8.
      group: elements along D that share a scale; divides D.
      symmetric: signed codes and no offset.
      implementation: ``"mosaic_gpu"`` (Hopper), ``"xla"`` and ``"reference"`` (here the same); None takes the kernel
        on a Hopper GPU where it can run, else XLA.
      interpret: run the kernel in the interpreter on a CPU.

    Returns:
      The result ``[..., D]``, the codes of the normalised values (rounded to the dtype of x, then to the nearest
      code), and ``1 / rms``, float32 ``[...]``.

    Raises:
      ValueError: shapes that do not fit, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    form = integer_form(bits, group, symmetric)
    if not x.ndim or gain.shape != x.shape[-1:] or x.shape[-1] % group:
        raise ValueError(f"expected x [..., D] and a gain [D], D a multiple of {group}, got {x.shape} and {gain.shape}")
    gain = gain.astype(jnp.float32)
    if not runs_kernel("rms_norm", unsupported(form, x.shape, x.dtype), implementation):
        return reference.forward(x, gain, eps, form)
    made = kernel.forward(x.reshape(-1, x.shape[-1]), gain, eps=eps, form=form, interpret=interpret)
    y, codes, rstd = jax.tree.map(lambda part: part.reshape(*x.shape[:-1], *part.shape[1:]), made)
    return y, codes, rstd


def rms_norm_backward(
    dy: jax.Array,
    made: Codes,
    rstd: jax.Array,
    gain: jax.Array,
    *,
    bits: int,
    group: int,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``x``, ``[..., D]`` in the dtype of ``dy``, and of the gain, float32 ``[D]``.

    The kernel never writes the decoded values to memory.

    Args:
      dy: gradient of the result, float ``[..., D]``.
      made: codes that `rms_norm_packed` made.
      rstd: float32 ``[...]`` that it made.
      gain: float ``[D]``.
      bits, group, implementation, interpret: as in `rms_norm_packed`.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    form = integer_form(bits, group, made.offset is None)
    if made.codes.shape != (*dy.shape[:-1], dy.shape[-1] * bits // 8) or rstd.shape != dy.shape[:-1]:
        raise ValueError(
            f"expected codes of {bits} bits and one rstd a row for gradients {dy.shape}, got {made.codes.shape} and "
            f"{rstd.shape}"
        )
    gain = gain.astype(jnp.float32)
    if not runs_kernel("rms_norm", unsupported(form, dy.shape, dy.dtype), implementation):
        return reference.backward(dy, made, rstd, gain, form)
    size = dy.shape[-1]
    cut = kernel.cut_row(size, form)
    assert cut is not None
    flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), made)
    blocks = min(_BLOCKS, dy.size // size // cut.rows)
    dx, d_gain = kernel.backward(
        dy.reshape(-1, size), flat, rstd.reshape(-1), gain, form=form, blocks=blocks, interpret=interpret
    )
    return dx.reshape(dy.shape), d_gain
