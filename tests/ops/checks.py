"""What every operation's tests share: a float64 reference for values and gradients, and the bytes that are kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def value_and_gradients(fn: Callable[..., Any], args: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    """Returns ``fn(*args)`` and the gradient of every argument for the output gradient ``dy``."""
    y, back = jax.vjp(fn, *args)
    return (y, *back(jnp.asarray(dy, y.dtype)))


def float64_reference(fn: Callable[..., Any], args: tuple[Any, ...], dy: Any) -> tuple[np.ndarray, ...]:
    """Returns what `value_and_gradients` does, with everything computed in float64."""
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(arg, np.float64)) for arg in args)
        return tuple(np.asarray(r) for r in jax.jit(lambda *a: value_and_gradients(fn, a, dy))(*wide))


def assert_matches(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    tolerance: float | tuple[float, ...],
    seed: int = 99,
) -> None:
    """Asserts that values and gradients are the reference's, relative to the norm of each.

    Args:
      tolerance: one for all, or one for the value and one for every argument's gradient.
    """
    shape = jax.eval_shape(fn, *args).shape
    dy = np.random.default_rng(seed).standard_normal(shape)
    dy = np.asarray(jnp.asarray(dy, args[0].dtype), np.float64)
    actual = jax.jit(lambda *a: value_and_gradients(fn, a, dy))(*args)
    expected = float64_reference(reference, args, dy)
    tolerances = (tolerance,) * len(actual) if isinstance(tolerance, float) else tolerance
    for i, (found, wanted, limit) in enumerate(zip(actual, expected, tolerances, strict=True)):
        assert i == 0 or found.dtype == args[i - 1].dtype
        error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-9)
        assert error <= limit, f"{'value' if i == 0 else f'gradient {i - 1}'}: relative error {error:.3g} > {limit:.3g}"


def kept_beside(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[jax.Array]]:
    """Returns ``fn(*args)`` and the distinct arrays, arguments aside, that reverse mode keeps."""
    y, back = jax.vjp(fn, *args)
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(back) if not any(leaf is arg for arg in args)}
    return y, list(arrays.values())


def total_bytes(arrays: list[jax.Array]) -> int:
    """Returns the bytes of all arrays."""
    return sum(array.nbytes for array in arrays)
