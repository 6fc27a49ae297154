"""Products with a packed weight, and its decoding: which implementation runs, and how it cuts the work."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.packed_matmul import kernel, reference
from pallas_kernels.packed_matmul.decode import decode as decode_kernel
from pallas_kernels.packed_matmul.formats import TILE, Format, decode_arrays

Implementation = Literal["mosaic_gpu", "xla", "reference"]
_SHARED_MEMORY = 232448 - 2048  # of a Hopper block, barriers left room


def unsupported(form: Format, k: int, n: int) -> str | None:
    """Returns why the Mosaic GPU kernels cannot take a weight ``[k, n]`` of this format, or None if they can."""
    if form.bits not in (4, 6, 8):
        return f"codes have {form.bits} bits; the kernels read 4, 6 and 8"
    if form.group not in ((64, 128) if form.bits == 6 else (32, 64, 128)):
        return f"groups of {form.group}; the kernels read 64 and 128, and 32 except with 6 bits"
    if form.affine and form.bits == 8:
        return "8-bit codes with an offset"
    if k % TILE or n % TILE:
        return f"a weight of {k} x {n}; both sizes must be multiples of {TILE}"
    return None


def heuristic(m: int, k: int, n: int, form: Format) -> kernel.Config:
    """Returns how to cut the product of ``[m, k]`` with ``[k, n]``; measured on an H100.

    Blocks that share an output tile are added where there are too few tiles to occupy 132 multiprocessors; tiles go
    round more warpgroups where the sums are small enough to leave them registers.
    """
    tiles, steps = n // TILE, k // TILE
    shares = next(s for s in (1, 2, 4) if s == 4 or tiles * s > 66)
    while shares > 1 and steps % shares:
        shares //= 2
    splits, parts = min(shares, 2), max(shares // 2, 1)
    warpgroups = 4 if m <= 8 else 3 if m <= 16 else 2
    warpgroups = min(warpgroups, steps // shares)
    if warpgroups == 1 and shares > 1:
        splits, parts, warpgroups = 1, 1, min(2, steps)
    stages = warpgroups * max(1, 8 // warpgroups)
    rows = -(-m // 8) * 8
    while (
        stages > warpgroups
        and kernel.smem_bytes(rows, form, kernel.Config(warpgroups, stages, splits)) > _SHARED_MEMORY
    ):
        stages -= warpgroups
    return kernel.Config(warpgroups, stages, splits, parts)


def packed_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    form: Format,
    out_dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns ``x @ weight`` without ever forming the weight (``"mosaic_gpu"``), or with the decoded weight alive.

    The kernel reads every code once for up to 64 rows of ``x`` and once for each further 64. It rounds scales and
    NF4 levels to bfloat16 and each decoded number once more, and sums in float32.

    Args:
      x: bfloat16 ``[m, k]``.
      planes: uint8 ``[k * width / 8, n]`` each, as `pallas_kernels._bits.pack` makes them along axis 0 in blocks of a
        group.
      scale: bfloat16 ``[k / group, n]``.
      offset: bfloat16 ``[k / group, n]`` for affine formats.
      form: the format.
      out_dtype: bfloat16 or float32.
      implementation: ``"mosaic_gpu"`` (Hopper), ``"xla"`` (decode, then a product), ``"reference"``; None takes the
        kernel on a Hopper GPU where it can run, else XLA.
      interpret: run the kernel in the interpreter on a CPU.

    Returns:
      ``[m, n]``.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    m, k = x.shape
    n = scale.shape[-1]
    if scale.shape != (k // form.group, n) or (offset is not None) != form.affine:
        raise ValueError(
            f"expected scales {(k // form.group, n)} (and offsets: {form.affine}) for {form}, got {scale.shape}"
        )
    if implementation == "reference":
        return reference.packed_matmul(x, planes, scale, offset, form=form).astype(out_dtype)
    reason = unsupported(form, k, n)
    if x.dtype != jnp.bfloat16:
        reason = f"activations are {x.dtype}, not bfloat16"
    if implementation == "mosaic_gpu" and reason:
        raise ValueError(f"the packed_matmul kernel cannot run: {reason}")
    if implementation == "xla" or (implementation is None and (reason or not on_hopper())):
        weight = decode_arrays(form, planes, scale, offset)
        return jnp.dot(x, weight, preferred_element_type=out_dtype)
    parts = []
    for start in range(0, m, kernel.MAX_ROWS):
        rows = x[start : start + kernel.MAX_ROWS]
        config = heuristic(rows.shape[0], k, n, form)
        parts.append(
            kernel.matmul(
                rows, planes, scale, offset, form=form, config=config, out_dtype=out_dtype, interpret=interpret
            )
        )
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def decode(
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    form: Format,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the weight, bfloat16 ``[k, n]``; arguments as in `packed_matmul`.

    Raises:
      ValueError: ``"mosaic_gpu"`` where it cannot run; says why.
    """
    k, n = scale.shape[0] * form.group, scale.shape[1]
    reason = unsupported(form, k, n)
    if implementation == "mosaic_gpu" and reason:
        raise ValueError(f"the decode kernel cannot run: {reason}")
    if implementation in ("xla", "reference") or (implementation is None and (reason or not on_hopper())):
        return decode_arrays(form, planes, scale, offset)
    return decode_kernel(planes, scale, offset, form=form, interpret=interpret)


def on_hopper() -> bool:
    """Returns whether the default device is a Hopper GPU."""
    device = jax.devices()[0]
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")
