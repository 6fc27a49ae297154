"""Encoding and decoding of grouped integer codes along the last axis: which implementation runs, and how."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels._bits import seed_words
from pallas_kernels.codec import kernel, reference
from pallas_kernels.codec.formats import Codes, Form
from pallas_kernels.codec.formats import unsupported as unsupported_form
from pallas_kernels.packed_matmul.api import on_hopper

Implementation = Literal["mosaic_gpu", "xla", "reference"]
_BYTES_IN_FLIGHT = 64  # that a thread reads before it computes


def heuristic(size: int, form: Form, itemsize: int) -> kernel.Config | None:
    """Returns how to cut arrays of so many elements, or None where whole blocks do not fill them."""
    units = max(1, _BYTES_IN_FLIGHT // (form.unit * itemsize))
    while units and size % kernel.block_elements(form, kernel.Config(units)):
        units //= 2
    return kernel.Config(units) if units else None


def unsupported(form: Form, shape: tuple[int, ...], dtype: Any) -> str | None:
    """Returns why the Mosaic GPU kernels cannot encode an array of this shape and dtype, or None if they can."""
    reason = unsupported_form(form, jnp.dtype(dtype).name)
    if reason:
        return reason
    size = math.prod(shape)
    if not shape or shape[-1] % form.group:
        return f"groups of {form.group} do not divide the last axis of shape {shape}"
    if not size or heuristic(size, form, jnp.dtype(dtype).itemsize) is None:
        block = kernel.block_elements(form, kernel.Config(1))
        return f"{size} elements; the kernels take multiples of {block} at {form.bits} bits"
    return None


def integer_form(bits: int, group: int, symmetric: bool) -> Form:
    """Returns the format; ValueError for one that does not fill bytes."""
    if bits not in (2, 4, 8) or group < 1 or group % (8 // bits):
        raise ValueError(f"expected 2, 4 or 8 bits and groups that fill bytes, got {bits} bits, groups of {group}")
    return Form(bits, group, symmetric)


def runs_kernel(name: str, reason: str | None, implementation: Implementation | None) -> bool:
    """Returns whether the kernel is to run.

    Args:
      name: of the kernel.
      reason: why it cannot, or None.
      implementation: the caller's choice.

    Raises:
      ValueError: a choice that cannot run.
    """
    if implementation not in (None, "mosaic_gpu", "xla", "reference"):
        raise ValueError(f"implementation must be 'mosaic_gpu', 'xla', 'reference' or None, got {implementation!r}")
    if implementation == "mosaic_gpu" and reason:
        raise ValueError(f"the {name} kernel cannot run: {reason}")
    return implementation == "mosaic_gpu" or (implementation is None and not reason and on_hopper())


def encode(
    x: jax.Array,
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    seed: Any = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Codes:
    """Returns the codes of groups along the last axis.

    The kernel's codes are those of XLA up to how XLA divides: it multiplies by reciprocals, as the kernel does, but may
    divide where it fuses differently, and then a number half way between two codes can take the other.

    Args:
      x: floating-point ``[..., n]``.
      bits: 2, 4 or 8.
      group: elements that share a scale; divides n.
      symmetric: signed codes and no offset.
      seed: of the stochastic rounding, as `pallas_kernels._bits.seed_words` takes it; None rounds to nearest.
      implementation: ``"mosaic_gpu"`` (Hopper), ``"xla"`` and ``"reference"`` (here the same); None takes the kernel
        on a Hopper GPU where it can run, else XLA.
      interpret: run the kernel in the interpreter on a CPU.

    Raises:
      ValueError: groups that do not divide n, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    form = integer_form(bits, group, symmetric)
    if not x.ndim or x.shape[-1] % group:
        raise ValueError(f"groups of {group} do not divide the last axis of shape {x.shape}")
    words = None if seed is None else seed_words(seed)
    if not runs_kernel("codec", unsupported(form, x.shape, x.dtype), implementation):
        return reference.encode(x, words, form)
    return encode_words(x, words, form=form, interpret=interpret)


def encode_words(
    x: jax.Array, words: tuple[jax.Array, jax.Array] | None, *, form: Form, interpret: bool = False
) -> Codes:
    """Runs the kernel with the two words of a seed; else as `encode`."""
    config = heuristic(x.size, form, x.dtype.itemsize)
    assert config is not None
    seed = None if words is None else jnp.stack(words)
    made = kernel.encode(x.reshape(-1), seed, form=form, config=config, interpret=interpret)
    return jax.tree.map(lambda part: part.reshape(*x.shape[:-1], part.size * x.shape[-1] // x.size), made)


def decode(
    made: Codes,
    *,
    bits: int,
    group: int,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the array ``[..., n]`` in ``dtype`` that codes stand for; arguments as in `encode`.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    codes, scale, offset = made
    form = integer_form(bits, group, offset is None)
    shape = (*scale.shape[:-1], scale.shape[-1] * group)
    if codes.shape != (*shape[:-1], shape[-1] * bits // 8) or (offset is not None and offset.shape != scale.shape):
        raise ValueError(
            f"expected codes {(*shape[:-1], shape[-1] * bits // 8)} and offsets {scale.shape} beside scales "
            f"{scale.shape}, got {codes.shape} and {None if offset is None else offset.shape}"
        )
    if not runs_kernel("codec", unsupported(form, shape, dtype), implementation):
        return reference.decode(made, form, dtype)
    config = heuristic(math.prod(shape), form, jnp.dtype(dtype).itemsize)
    assert config is not None
    flat = kernel.decode(made, form=form, dtype=dtype, config=config, interpret=interpret)
    return flat.reshape(shape)
