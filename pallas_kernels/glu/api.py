"""SwiGLU with packed inputs: which implementation runs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.codec.api import Implementation, heuristic, integer_form, runs_kernel
from pallas_kernels.codec.api import unsupported as unsupported_codes
from pallas_kernels.codec.formats import Codes, Form
from pallas_kernels.glu import kernel, reference


def unsupported(form: Form, shape: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """Returns why the Mosaic GPU kernels cannot take inputs of this shape and dtype, or None if they can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arrays of {jnp.dtype(dtype)}; the kernels take bfloat16"
    return unsupported_codes(form, shape, dtype)


def swiglu_packed(
    gate: jax.Array,
    up: jax.Array,
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Codes, Codes]:
    """Returns ``silu(gate) * up`` and the codes of both, rounded to nearest.

    Args:
      gate: float ``[..., F]``.
      up: float ``[..., F]``.
      bits: 2, 4 or 8.
      group: elements along F that share a scale; divides F.
      symmetric: signed codes and no offset.
      implementation: ``"mosaic_gpu"`` (Hopper), ``"xla"`` and ``"reference"`` (here the same); None takes the kernel
        on a Hopper GPU where it can run, else XLA.
      interpret: run the kernel in the interpreter on a CPU.

    Raises:
      ValueError: inputs that are not alike, groups that do not divide F, or ``"mosaic_gpu"`` where it cannot run.
    """
    form = integer_form(bits, group, symmetric)
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.ndim or gate.shape[-1] % group:
        raise ValueError(
            f"expected gate and up alike, their last axis a multiple of {group}, got {gate.dtype}{gate.shape} and "
            f"{up.dtype}{up.shape}"
        )
    if not runs_kernel("swiglu", unsupported(form, gate.shape, gate.dtype), implementation):
        return reference.forward(gate, up, form)
    config = heuristic(gate.size, form, 2 * gate.dtype.itemsize)
    assert config is not None
    made = kernel.forward(gate.reshape(-1), up.reshape(-1), form=form, config=config, interpret=interpret)
    return jax.tree.map(lambda part: part.reshape(*gate.shape[:-1], part.size * gate.shape[-1] // gate.size), made)


def swiglu_of_codes(
    gate: Codes,
    up: Codes,
    *,
    bits: int,
    group: int,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns ``silu(gate) * up``, ``[..., F]`` in ``dtype``, at the values of codes.

    Args:
      gate: codes that `swiglu_packed` made of ``[..., F]``.
      up: the same.
      bits, group, implementation, interpret: as in `swiglu_packed`.
      dtype: of the result.

    Raises:
      ValueError: codes that are not alike, or ``"mosaic_gpu"`` where it cannot run.
    """
    form = integer_form(bits, group, gate.offset is None)
    if gate.codes.shape != up.codes.shape or (gate.offset is None) != (up.offset is None):
        raise ValueError(f"expected codes alike, got {gate.codes.shape} and {up.codes.shape}")
    shape = (*gate.codes.shape[:-1], gate.codes.shape[-1] * 8 // bits)
    if not runs_kernel("swiglu", unsupported(form, shape, dtype), implementation):
        return reference.of_codes(gate, up, form, dtype)
    size = math.prod(shape)
    config = heuristic(size, form, jnp.dtype(dtype).itemsize)
    assert config is not None
    return kernel.of_codes(gate, up, size=size, form=form, config=config, interpret=interpret).reshape(shape)


def swiglu_backward(
    dh: jax.Array,
    gate: Codes,
    up: Codes,
    *,
    bits: int,
    group: int,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of gate and up, ``[..., F]`` in the dtype of ``dh``, at the values of their codes.

    Args:
      dh: gradient of the result, float ``[..., F]``.
      gate: codes that `swiglu_packed` made.
      up: codes that `swiglu_packed` made.
      bits, group, implementation, interpret: as in `swiglu_packed`.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run.
    """
    form = integer_form(bits, group, gate.offset is None)
    shapes = [part.codes.shape for part in (gate, up)]
    if shapes != [(*dh.shape[:-1], dh.shape[-1] * bits // 8)] * 2 or (gate.offset is None) != (up.offset is None):
        raise ValueError(f"expected codes of {bits} bits for gradients {dh.shape}, got {shapes}")
    if not runs_kernel("swiglu", unsupported(form, dh.shape, dh.dtype), implementation):
        return reference.backward(dh, gate, up, form)
    config = heuristic(dh.size, form, dh.dtype.itemsize)
    assert config is not None
    d_gate, d_up = kernel.backward(dh.reshape(-1), gate, up, form=form, config=config, interpret=interpret)
    return d_gate.reshape(dh.shape), d_up.reshape(dh.shape)
