"""What low-rank optimizers share: the projected side of a matrix, its subspace, when that is found again, Adam in it.

A gradient is seen as matrices ``[B, m, n]`` (m inputs, n outputs; B slices of a stack). Its `Projection` names the
axis that a basis ``[B, s, r]`` replaces by r coordinates: s is the size of that axis, by default the shorter one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.core import Axes, leaf_paths
from memjax.core.paths import lookup
from memjax.core.random_bits import normal, random_bits
from memjax.optim import routing, tables
from memjax.optim.matrices import MatrixSpec, matrix_shape, matrix_spec

Side = Literal["short", "long", "input", "output"]
Method = Literal["eigh", "svd", "subspace_iteration", "random"]
HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Projection:
    """How one leaf is projected.

    Attributes:
      spec: which axes of the leaf are batch, rows and columns.
      matrices: number of matrices of the leaf, B.
      rows, columns: sizes of one matrix (inputs, outputs).
      axis: the projected axis of ``[B, m, n]``, -2 or -1.
      rank: coordinates that replace it.
      index: number of the leaf in its tree.
      first: number of the leaf's first matrix among all projected matrices of the tree.
      total: number of projected matrices of the tree.
    """

    spec: MatrixSpec
    matrices: int
    rows: int
    columns: int
    axis: int
    rank: int
    index: int
    first: int
    total: int

    @property
    def projected(self) -> int:
        """Size of the projected axis."""
        return self.rows if self.axis == -2 else self.columns

    @property
    def kept(self) -> int:
        """Size of the other axis."""
        return self.columns if self.axis == -2 else self.rows

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """Shape of the leaf's bases ``[B, s, r]``."""
        return (self.matrices, self.projected, self.rank)

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """Shape of the projected leaf: ``[B, r, n]`` or ``[B, m, r]``."""
        return (self.matrices, self.rank, self.kept) if self.axis == -2 else (self.matrices, self.kept, self.rank)


def check(rank: int | float, update_gap: int, side: str, method: str | None = None, seed: int = 0) -> None:
    """Raises ValueError for what no low-rank optimizer takes.

    Args:
      rank: a positive integer, or a fraction in (0, 1].
      update_gap: a positive integer.
      side: a name of `Side`.
      method: a name of `Method`, or None.
      seed: an integer in [0, 2**32).
    """

    def is_integer(x: Any) -> bool:
        return isinstance(x, int | np.integer) and not isinstance(x, bool)

    if not (0 < rank <= 1 if isinstance(rank, float) else is_integer(rank) and rank > 0):
        raise ValueError(f"rank must be a positive integer or a fraction in (0, 1] of the projected side, got {rank!r}")
    if not is_integer(update_gap) or update_gap < 1:
        raise ValueError(f"update_gap must be a positive integer, got {update_gap!r}")
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    for name, value, known in (("side", side, get_args(Side)), ("method", method, (None, *get_args(Method)))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(filter(None, known))}, got {value!r}")


def projections(
    params: Any,
    rank: int | float,
    side: Side,
    rules: Mapping[str, routing.Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
    square: Literal["input", "output"] = "input",
) -> list[Projection | None]:
    """Returns how each leaf of ``params`` is projected, None for leaves that the rules leave in full.

    Args:
      params: any pytree of arrays or abstract arrays.
      rank: coordinates, or a fraction of the projected side (rounded down, at least 1).
      side: the axis that is projected.
      rules: as in `routing.label`.
      axes: pattern -> `Axes` of weights that are not ``[*batch, inputs, outputs]``.
      square: the axis of square matrices that ``"short"`` projects (``"long"`` the other).

    Raises:
      TypeError: a weight view among the leaves.
      ValueError: a rank larger than a matrix's shorter side.
    """
    labels = jax.tree.leaves(routing.label(params, rules))
    found: list[tuple[MatrixSpec, int, int, int, int, int] | None] = []
    for (path, leaf), label in zip(leaf_paths(params), labels, strict=True):
        if label == "full":
            found.append(None)
            continue
        spec = matrix_spec(leaf, lookup(dict(axes or {}), path))
        matrices, rows, columns = matrix_shape(leaf.shape, spec)
        short = square if rows == columns else "input" if rows < columns else "output"
        chosen = {"short": short, "long": "output" if short == "input" else "input"}.get(side, side)
        axis = -2 if chosen == "input" else -1
        projected = rows if axis == -2 else columns
        size = max(int(rank * projected), 1) if isinstance(rank, float) else rank
        if size > min(rows, columns):
            raise ValueError(
                f"rank {size} is larger than the matrices of {path}, {rows} x {columns} (shape {tuple(leaf.shape)}); "
                "use a smaller rank, a fraction such as rank=0.25, or a rule that labels the leaf 'full'"
            )
        found.append((spec, matrices, rows, columns, axis, size))
    firsts = [0, *itertools.accumulate(facts[1] if facts else 0 for facts in found)]
    return [
        facts and Projection(*facts, index=index, first=firsts[index], total=firsts[-1])
        for index, facts in enumerate(found)
    ]


def map_leaves(
    fn: Callable[..., tuple[Any, ...]], outputs: int, projected: list[Projection | None], tree: Any, *rest: Any
) -> tuple[Any, ...]:
    """Maps ``fn(projection, leaf, *others)``, which returns a tuple, over the leaves of ``tree``; returns trees.

    Args:
      fn: called with a `Projection`, or None for a leaf that is not projected.
      outputs: length of the tuples that ``fn`` returns.
      projected: one per leaf of ``tree``.
      tree: gradients or parameters.
      rest: trees that have a subtree for every leaf of ``tree``.
    """
    treedef: Any = jax.tree.structure(tree)
    leaves = jax.tree.leaves(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    results = [fn(*arguments) for arguments in zip(projected, leaves, *others, strict=True)]
    return tuple(treedef.unflatten([result[i] for result in results]) for i in range(outputs))


def project(matrices: jax.Array, basis: jax.Array, axis: int, precision: Any = None) -> jax.Array:
    """Returns the coordinates of ``[B, m, n]`` in ``[B, s, r]``: float32 ``[B, r, n]`` (axis -2) or ``[B, m, r]``."""
    spec = "bsr,bsk->brk" if axis == -2 else "bsr,bks->bkr"
    basis = basis.astype(matrices.dtype)
    return jnp.einsum(spec, basis, matrices, precision=precision, preferred_element_type=jnp.float32)


def project_back(coordinates: jax.Array, basis: jax.Array, axis: int, dtype: Any, precision: Any = None) -> jax.Array:
    """Returns what coordinates stand for, ``[B, m, n]`` in ``dtype``: the inverse of `project` within the subspace."""
    spec = "bsr,brk->bsk" if axis == -2 else "bsr,bkr->bks"
    basis, coordinates = basis.astype(dtype), coordinates.astype(dtype)
    return jnp.einsum(spec, basis, coordinates, precision=precision, preferred_element_type=dtype)


def multiply(matrices: jax.Array, coordinates: jax.Array, axis: int, precision: Any = None) -> jax.Array:
    """Returns the products of ``[B, m, n]`` with coordinates along the side that is kept, float32 ``[B, s, r]``."""
    spec = "bsk,brk->bsr" if axis == -2 else "bks,bkr->bsr"
    coordinates = coordinates.astype(matrices.dtype)
    return jnp.einsum(spec, matrices, coordinates, precision=precision, preferred_element_type=jnp.float32)


def gaussian(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns float32 standard normal numbers of ``shape`` from seed words ``[n]``, one hash each."""
    return normal(random_bits(words, shape))


def find_subspace(
    matrix: jax.Array, previous: jax.Array, axis: int, rank: int, method: Method, words: jax.Array, first: jax.Array
) -> jax.Array:
    """Returns an orthonormal basis for the rows or columns of one matrix.

    Args:
      matrix: ``[m, n]``.
      previous: the last basis ``[s, r]``, where ``"subspace_iteration"`` starts.
      axis: -2 for a basis of the inputs (left singular vectors), -1 of the outputs.
      rank: r.
      method: ``"svd"``; ``"eigh"`` of the Gram matrix ``[s, s]`` (the same subspace for singular values above 3e-4 of
        the largest); ``"subspace_iteration"``, two power steps; ``"random"``, which does not look at the matrix.
      words: seed words ``[n]`` of random starts.
      first: bool scalar, whether there is no previous basis.

    Returns:
      float32 ``[s, r]``. The largest entry of each singular vector is positive, so that moments kept in one basis mean
      the same on every backend.
    """
    size = matrix.shape[axis]
    if method == "random":
        return jnp.linalg.qr(gaussian(words, (size, rank)))[0]
    matrix = matrix.astype(jnp.float32)
    if axis == -1:
        matrix = matrix.T
    if method == "subspace_iteration":
        start = jnp.where(first, gaussian(words, (size, rank)), previous.astype(jnp.float32))
        for _ in range(2):
            product = jnp.matmul(matrix.T, start, precision=HIGHEST)
            start = jnp.linalg.qr(jnp.matmul(matrix, product, precision=HIGHEST))[0]
        return start
    if method == "svd":
        basis = jnp.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    else:
        _, vectors = jnp.linalg.eigh(jnp.matmul(matrix, matrix.T, precision=HIGHEST))
        basis = vectors[:, ::-1][:, :rank]
    largest = jnp.take_along_axis(basis, jnp.argmax(jnp.abs(basis), axis=0, keepdims=True), axis=0)
    return basis * jnp.where(largest < 0, -1.0, 1.0)


def offsets(projection: Projection, update_gap: int, stagger: bool) -> np.ndarray:
    """Returns the step within a gap at which each matrix of a leaf refreshes, int32 ``[B]``."""
    numbers = range(projection.first, projection.first + projection.matrices) if stagger else [0] * projection.matrices
    return np.asarray([tables.stagger_offset(n, projection.total, update_gap) for n in numbers], np.int32)


def refresh(due: jax.Array, compute: Callable[..., Any], matrices: jax.Array, kept: Any, words: jax.Array) -> Any:
    """Replaces what is kept of the matrices that are due.

    Matrices are taken one by one, so the work space is that of one; nothing is computed where none is due.

    Args:
      due: bool ``[B]``.
      compute: ``(matrix [m, n], kept of that matrix, words [n]) -> kept``.
      matrices: ``[B, m, n]``.
      kept: pytree of arrays ``[B, ...]``.
      words: uint32 ``[B, n]``.
    """

    def one(arguments: Any) -> Any:
        due_here, *operands = arguments
        return lax.cond(due_here, compute, lambda matrix, kept, words: kept, *operands)

    def some(matrices: jax.Array, kept: Any, words: jax.Array) -> Any:
        return lax.map(one, (due, matrices, kept, words))

    return lax.cond(jnp.any(due), some, lambda matrices, kept, words: kept, matrices, kept, words)


def matrix_words(projection: Projection, seed: int, epoch: Any) -> jax.Array:
    """Returns seed words uint32 ``[B, 3]``: the seed, each matrix's number, and its epoch (``[B]`` or scalar)."""
    numbers = jnp.arange(projection.first, projection.first + projection.matrices, dtype=jnp.uint32)
    epochs = jnp.broadcast_to(epoch, numbers.shape).astype(jnp.uint32)
    return jnp.stack([jnp.full_like(numbers, seed), numbers, epochs], axis=-1)


def refreshed_basis(
    projection: Projection,
    matrices: jax.Array,
    basis: jax.Array,
    count: jax.Array,
    update_gap: int,
    *,
    method: Method,
    stagger: bool,
    seed: int,
) -> jax.Array:
    """Returns the bases ``[B, s, r]`` of the matrices ``[B, m, n]`` for step ``count``, from those of the step before.

    Args:
      projection: of the leaf.
      matrices: the gradient.
      basis: ``[B, s, r]``.
      count: int32 scalar, steps done.
      update_gap, method, stagger, seed: as in `scale_by_galore`.
    """
    shift = offsets(projection, update_gap, stagger)

    def compute(matrix: jax.Array, previous: jax.Array, words: jax.Array) -> jax.Array:
        found = find_subspace(matrix, previous, projection.axis, projection.rank, method, words, count == 0)
        return found.astype(previous.dtype)

    words = matrix_words(projection, seed, tables.epoch(count, update_gap, shift))
    due = tables.is_due(count, update_gap, shift)
    return refresh(due, compute, matrices, basis, words)


def bias_correction(decay: Any, step: jax.Array) -> jax.Array:
    """Returns ``1 - decay**step`` without cancellation, float32."""
    if isinstance(decay, int | float):
        decay = math.log(decay) if decay else -math.inf
    else:
        decay = jnp.log(decay)
    return -jnp.expm1(step.astype(jnp.float32) * decay)


def decayed(moment: jax.Array, gradient: jax.Array, decay: Any, power: int) -> jax.Array:
    """Returns ``decay * moment + (1 - decay) * gradient**power``, float32."""
    return decay * moment + (1 - decay) * gradient.astype(jnp.float32) ** power


def adam_correction(count: jax.Array, b1: Any, b2: Any) -> jax.Array:
    """Returns what the references multiply the rate of ``mu / (sqrt(nu) + eps)`` with at step ``count`` (from 0)."""
    return jnp.sqrt(bias_correction(b2, count + 1)) / bias_correction(b1, count + 1)


def adam_ratio(
    gradient: jax.Array, mu: jax.Array, nu: jax.Array, b1: Any, b2: Any, eps: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``mu / (sqrt(nu) + eps)`` of the moments after ``gradient``, and these; float32."""
    mu, nu = decayed(mu, gradient, b1, 1), decayed(nu, gradient, b2, 2)
    return mu / (jnp.sqrt(nu) + eps), mu, nu


def square_sum(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Returns the sum of squares along ``axis``, kept with size 1; float32."""
    return jnp.sum(x.astype(jnp.float32) ** 2, axis=axis, keepdims=True)


def limit_growth(norm: jax.Array, previous: jax.Array, growth: Any) -> tuple[jax.Array, jax.Array]:
    """Limits how much the norm of an update grows from step to step (Fira's norm-growth limiter).

    Args:
      norm: float32 ``[B]``, of this step's update.
      previous: float32 ``[B]``, of the last update after it was limited; 0 for none. An update of zeros counts as none,
        for else all that follow it would stay near zero.
      growth: largest ratio of the two.

    Returns:
      Factors for the update, and its norm after them; ``[B]``.
    """
    excess = jnp.maximum(norm / (previous + 1e-8), growth) / growth
    factor = jnp.where(previous > 0, 1 / excess, 1.0)
    return factor, norm * factor
