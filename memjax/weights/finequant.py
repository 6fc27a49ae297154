"""Group sizes chosen per matrix from the weights alone, without data.

A column with outliers loses its small elements to one large scale; finer groups confine the damage and cost bytes.
Source: Kim et al., FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs, 2023. The paper
gives the idea; the precise rules are those of `finequant`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs import Codec, Grouped
from memjax.codecs.packed import blocked, group_blocks
from memjax.core.bytes import nbytes
from memjax.core.paths import Patterns, leaf_paths, select
from memjax.core.views import Axes, is_view
from memjax.weights.quantize import AxesTable, axes_of, check_table

GROUPS = (512, 256, 128, 64, 32)


class GroupPlan(dict[str, Codec]):
    """Path -> codec, for `memjax.weights.quantize`.

    Attributes:
      chosen: path -> the group that each matrix of a stack would take by itself, int ``[*batch]``; all take the
        smallest of them, since a stack has one format.
      waste_bytes: path -> bytes that this costs over a group for each.
    """

    def __init__(self, codecs: dict[str, Codec], chosen: dict[str, np.ndarray], waste_bytes: dict[str, int]):
        super().__init__(codecs)
        self.chosen = chosen
        self.waste_bytes = waste_bytes


def finequant(
    params: Any,
    bits: int = 4,
    alpha: float = 0.9,
    where: Patterns = "**/kernel",
    criterion: Literal["range", "sqnr"] = "range",
    target_db: float | None = None,
    axes: AxesTable | None = None,
) -> GroupPlan:
    """Returns the integer codec with the group size that suits each selected weight.

    Candidates are one group per output (K elements), 512, 256, 128, 64 and 32, as far as they divide K. ``"sqnr"``
    takes the largest group, so the fewest bytes, with which the ratio of the sum of squares to that of the errors
    reaches ``target_db``. ``"range"`` is the paper's: with R(g) the mean over groups of maximum minus minimum, it goes
    from K to the next candidate as long as that lowers R by a factor below ``alpha`` per halving of the group.

    Args:
      params: any pytree of arrays.
      bits: 2, 3, 4, 6 or 8; codes are symmetric with bfloat16 scales.
      alpha: for "range", in (0, 1]; a larger one gives finer groups.
      where: pattern(s) over logical paths, or a predicate of (path, leaf).
      criterion: "range" or "sqnr".
      target_db: for "sqnr", decibels.
      axes: pattern -> input and output axes, as in `quantize`.

    Raises:
      ValueError: settings that do not fit, a pattern that matches nothing, a weight with no group that fits it, or
        (for "sqnr") none that reaches the target.
      TypeError: a selected leaf that is a view or not floating point.
    """
    if bits not in (2, 3, 4, 6, 8):
        raise ValueError(f"bits must be 2, 3, 4, 6 or 8, got {bits!r}")
    if criterion not in ("range", "sqnr"):
        raise ValueError(f"criterion must be 'range' or 'sqnr', got {criterion!r}")
    if (criterion == "sqnr") != (target_db is not None):
        raise ValueError(f"target_db belongs to criterion 'sqnr', got {criterion!r} with target_db={target_db!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha!r}")
    chosen_paths = set(select(params, where))
    check_table(params, axes)
    plan = GroupPlan({}, {}, {})
    for path, leaf in leaf_paths(params):
        if path not in chosen_paths:
            continue
        if is_view(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{path}: expected a dense floating-point weight, got {type(leaf).__name__} {leaf.dtype}")
        leaf_axes = axes_of(path, leaf.shape, axes)
        candidates = _candidates(path, leaf, leaf_axes, bits)
        groups = np.array(list(candidates))
        if criterion == "range":
            index = _by_range(leaf, leaf_axes, groups, alpha)
        else:
            index = _by_error(path, leaf, leaf_axes, list(candidates.values()), float(target_db or 0))
        bytes_each = [
            nbytes(jax.eval_shape(functools.partial(codec.encode, axes=leaf_axes.inputs), leaf)) // index.size
            for codec in candidates.values()
        ]
        finest = int(index.max())
        plan[path] = list(candidates.values())[finest]
        plan.chosen[path] = np.asarray(groups[index])
        plan.waste_bytes[path] = sum(bytes_each[finest] - bytes_each[i] for i in index.reshape(-1))
    return plan


def _candidates(path: str, leaf: Any, axes: Axes, bits: int) -> dict[int, Codec]:
    """Returns group size -> codec, the largest first, for the sizes that fit the weight."""
    size = math.prod(leaf.shape[axis] for axis in axes.inputs)
    found: dict[int, Codec] = {}
    problem = None
    for group in (size, *(group for group in GROUPS if group < size)):
        codec = Grouped(bits, "channel" if group == size else group, True, "bfloat16")
        try:
            jax.eval_shape(functools.partial(codec.encode, axes=axes.inputs), leaf)
            found[group] = codec
        except ValueError as error:
            problem = problem or error
    if not found:
        raise ValueError(f"{path}: {problem}")
    return found


def _by_range(leaf: jax.Array, axes: Axes, groups: np.ndarray, alpha: float) -> np.ndarray:
    """Returns the index in ``groups`` that each matrix of the stack takes, int ``[*batch]``."""
    ranges = np.stack([np.asarray(_mean_range(leaf, axes, int(group))) for group in groups])
    index = np.zeros(ranges.shape[1:], int)
    going = np.ones(ranges.shape[1:], bool)
    for i in range(1, len(groups)):
        halvings = math.log2(groups[i - 1] / groups[i])
        going &= ranges[i] < alpha**halvings * ranges[i - 1]
        index[going] = i
    return index


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mean_range(w: jax.Array, axes: Axes, group: int) -> jax.Array:
    """Returns R(group) of every matrix of a stack, float32 ``[*batch]``."""
    blocks = group_blocks(w.shape, axes.inputs, group)
    counts = tuple(w.shape[axis] // block for axis, block in zip(axes.inputs, blocks))
    x, elements = blocked(w.astype(jnp.float32), axes.inputs, counts)
    spans = jnp.max(x, elements) - jnp.min(x, elements)
    return jnp.mean(spans, tuple(range(w.ndim - axes.ndim, spans.ndim)))


def _by_error(path: str, leaf: jax.Array, axes: Axes, codecs: list[Codec], target_db: float) -> np.ndarray:
    """Returns the index of the first of ``codecs`` that reaches the target, int ``[*batch]``."""
    index = np.full(leaf.shape[: leaf.ndim - axes.ndim], -1)
    best = np.full(index.shape, -np.inf)
    for i, codec in enumerate(codecs):
        reached = np.asarray(_sqnr_db(leaf, axes, codec))
        best = np.maximum(best, reached)
        index[(index < 0) & (reached >= target_db)] = i
        if (index >= 0).all():
            return index
    raise ValueError(
        f"{path}: no group of {codecs[0].bits}-bit codes reaches {target_db} dB; the best is {best.min():.2f} dB"
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sqnr_db(w: jax.Array, axes: Axes, codec: Codec) -> jax.Array:
    """Returns the signal-to-noise ratio in decibels of every matrix of a stack, float32 ``[*batch]``."""
    matrix = tuple(range(-axes.ndim, 0))
    exact = w.astype(jnp.float32)
    noise = jnp.sum((codec.encode(w, axes.inputs).decode(jnp.float32) - exact) ** 2, matrix)
    return jnp.where(noise == 0, jnp.inf, 10 * jnp.log10(jnp.sum(exact**2, matrix) / noise))
