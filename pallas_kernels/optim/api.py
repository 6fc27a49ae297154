"""Optimizer steps in one pass over memory: which implementation runs, and how."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.codec.api import runs_kernel
from pallas_kernels.optim import kernel, reference

Implementation = Literal["mosaic_gpu", "xla", "reference"]
DTYPES = ("bfloat16", "float32")


def heuristic(size: int) -> kernel.Config | None:
    """Returns how to cut so many elements, or None where whole blocks do not fill them."""
    for units in (2, 1):
        if size and size % kernel.block_elements(kernel.Config(units)) == 0:
            return kernel.Config(units)
    return None


def adam8bit_unsupported(size: int, block: int | None, params: Any, grads: Any) -> str | None:
    """Returns why the kernel cannot take a leaf, or None if it can.

    Args:
      size: elements.
      block: elements that share a scale; None for moments that are not 8-bit codes.
      params, grads: dtypes.
    """
    if block != kernel.BLOCK:
        return f"blocks of {block} 8-bit codes; the kernel takes blocks of {kernel.BLOCK}"
    for name, dtype in (("parameters", params), ("gradients", grads)):
        if jnp.dtype(dtype).name not in DTYPES:
            return f"{name} of {jnp.dtype(dtype).name}; the kernel takes {' and '.join(DTYPES)}"
    if heuristic(size) is None:
        return f"{size} elements; the kernel takes multiples of {kernel.block_elements(kernel.Config(1))}"
    return None


def adam8bit_step(
    p: jax.Array,
    g: jax.Array,
    m_codes: jax.Array,
    m_scale: jax.Array,
    v_codes: jax.Array,
    v_scale: jax.Array,
    scalars: jax.Array,
    words: reference.Words | None = None,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Takes a step of Adam on a leaf whose moments are 8-bit codes, in place where the arguments are donated.

    Args:
      p: bfloat16 or float32 ``[n]``.
      g: the gradient, bfloat16 or float32 ``[n]``.
      m_codes, v_codes: uint8 ``[n]``, signed and unsigned dynamic codes.
      m_scale, v_scale: scales of blocks, float32 bit patterns, uint32 ``[n / block]``.
      scalars: of `adam_scalars`.
      words: of `pallas_kernels._bits.seed_words`, to round bfloat16 parameters stochastically; None rounds to nearest.
      implementation: ``"mosaic_gpu"`` (Hopper), ``"xla"`` and ``"reference"`` (here the same); None takes the kernel
        on a Hopper GPU where it can run, else XLA.
      interpret: run the kernel in the interpreter on a CPU.

    Returns:
      (p, m_codes, m_scale, v_codes, v_scale) after the step.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    shapes = [x.shape for x in (g, m_codes, v_codes)]
    if p.ndim != 1 or any(shape != p.shape for shape in shapes):
        raise ValueError(f"expected gradients and codes of the parameters' shape {p.shape}, got {shapes}")
    if m_scale.shape != v_scale.shape or not m_scale.size or p.size % m_scale.size:
        raise ValueError(f"expected a scale per block of {p.size} elements, got {m_scale.shape} and {v_scale.shape}")
    reason = adam8bit_unsupported(p.size, p.size // m_scale.size, p.dtype, g.dtype)
    if not runs_kernel("8-bit Adam", reason, implementation):
        return reference.adam8bit_step(p, g, m_codes, m_scale, v_codes, v_scale, scalars, words)
    config = heuristic(p.size)
    assert config is not None
    seed = None if words is None else jnp.stack(words)
    return kernel.adam8bit_step(
        p, g, m_codes, m_scale, v_codes, v_scale, scalars, seed, config=config, interpret=interpret
    )


def frugal_unsupported(runs: int, run: int, kept: int, params: Any, grads: Any) -> str | None:
    """Returns why the kernel cannot take a leaf ``[outer, runs, run]`` with ``kept`` runs of moments, or None."""
    for name, dtype in (("parameters", params), ("gradients", grads)):
        if jnp.dtype(dtype).name not in DTYPES:
            return f"{name} of {jnp.dtype(dtype).name}; the kernel takes {' and '.join(DTYPES)}"
    if not 0 < kept <= runs:
        return f"{kept} of {runs} runs have moments; the kernel takes at least one"
    if runs * run >= 2**32 or frugal_heuristic(runs, run) is None:
        count = kernel.block_elements(kernel.Config(1))
        return (
            f"{runs} runs of {run} elements; the kernel takes runs that are multiples of {count}, or powers of two "
            f"from 8 that fill multiples of {count}"
        )
    return None


def frugal_heuristic(runs: int, run: int) -> kernel.Config | None:
    """Returns how to cut rows of so many runs, or None where whole blocks do not fill them."""
    for units in (2, 1):
        count = kernel.block_elements(kernel.Config(units))
        powers = run >= 8 and run & (run - 1) == 0 and count % run == 0 and runs * run % count == 0
        if run % count == 0 or powers:
            return kernel.Config(units)
    return None


def frugal_adam_step(
    p: jax.Array,
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    place: jax.Array,
    scalars: jax.Array,
    words: reference.Words | None = None,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes a step of Adam on some runs of a leaf and of signSGD on the others, in place where arguments are donated.

    A run is what is selected together: a row of a matrix ``[m, n]`` is (runs, run) = (m, n), a group of 32 adjacent
    columns is ``outer = m`` and (n / 32, 32), a whole layer of a stack is (layers, size).

    Args:
      p: bfloat16 or float32 ``[outer, runs, run]``.
      g: the gradient, bfloat16 or float32 ``[outer, runs, run]``.
      mu, nu: float32 ``[outer, kept, run]``.
      place: int32 ``[outer, runs]``: where in ``kept`` a run's moments lie, each place once; ``kept`` or more for none.
      scalars: of `adam_scalars`.
      words: of `pallas_kernels._bits.seed_words`, to round bfloat16 parameters stochastically; None rounds to nearest.
      implementation, interpret: as in `adam8bit_step`.

    Returns:
      (p, mu, nu) after the step.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    shapes = (p.shape[0], mu.shape[1], p.shape[-1])
    if p.ndim != 3 or g.shape != p.shape or mu.shape != shapes or nu.shape != shapes or place.shape != p.shape[:2]:
        raise ValueError(
            f"expected gradients {p.shape}, moments {shapes} and places {p.shape[:2]}, got {g.shape}, {mu.shape}, "
            f"{nu.shape} and {place.shape}"
        )
    reason = frugal_unsupported(p.shape[1], p.shape[2], mu.shape[1], p.dtype, g.dtype)
    if not runs_kernel("FRUGAL", reason, implementation):
        return reference.frugal_adam_step(p, g, mu, nu, place, scalars, words)
    config = frugal_heuristic(*p.shape[1:])
    assert config is not None
    seed = None if words is None else jnp.stack(words)
    return kernel.frugal_adam_step(p, g, mu, nu, place, scalars, seed, config=config, interpret=interpret)


def add_stochastic(
    p: jax.Array,
    u: jax.Array,
    words: reference.Words,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Adds an update to bfloat16 parameters and rounds stochastically, in place where they are donated.

    Args:
      p: bfloat16 ``[n]``.
      u: bfloat16 or float32 ``[n]``.
      words: of `pallas_kernels._bits.seed_words`.
      implementation, interpret: as in `adam8bit_step`.

    Returns:
      bfloat16 ``[n]``, `round_stochastic` of the float32 sum.

    Raises:
      ValueError: operands that do not fit each other, or ``"mosaic_gpu"`` where it cannot run; says why.
    """
    if p.ndim != 1 or p.dtype != jnp.bfloat16 or u.shape != p.shape:
        raise ValueError(f"expected bfloat16 [n] and updates of its shape, got {p.dtype}{p.shape} and {u.shape}")
    config, reason = heuristic(p.size), None
    if u.dtype.name not in DTYPES:
        reason = f"updates of {u.dtype.name}; the kernel takes {' and '.join(DTYPES)}"
    elif config is None:
        reason = f"{p.size} elements; the kernel takes multiples of {kernel.block_elements(kernel.Config(1))}"
    if not runs_kernel("stochastic rounding", reason, implementation) or config is None:
        return reference.round_stochastic(p.astype(jnp.float32) + u.astype(jnp.float32), words)
    return kernel.add_stochastic(p, u, jnp.stack(words), config=config, interpret=interpret)
