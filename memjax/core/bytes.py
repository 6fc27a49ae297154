"""Bytes as they are stored and as XLA compiled them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np


def nbytes(tree: Any) -> int:
    """Returns the bytes of all array leaves of ``tree``; abstract leaves (ShapeDtypeStruct) count too."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.eval_shape(jax.random.key_data, leaf)
            total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return total


class CompiledBytes(NamedTuple):
    """Bytes per device that a compiled program holds.

    Attributes:
      argument, output, temp, alias: as `compiled.memory_analysis()` reports them; aliased outputs reuse arguments.
      host: temporaries in pinned host memory.
    """

    argument: int
    output: int
    temp: int
    alias: int
    host: int

    @property
    def total(self) -> int:
        """Device bytes alive at the peak: argument + output + temp - alias."""
        return self.argument + self.output + self.temp - self.alias


def compiled_bytes(compiled: Any) -> CompiledBytes:
    """Returns what XLA's buffer assignment says of a compiled function.

    Args:
      compiled: the result of ``jax.jit(f).lower(...).compile()``.

    Raises:
      ValueError: the backend reports no memory analysis.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend reports no memory analysis for the compiled function")
    return CompiledBytes(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.host_temp_size_in_bytes,
    )
