"""How FRUGAL splits gradients: which coordinates have state, reading them out and writing them back.

A split acts on a unit: one leaf as matrices ``[B, m, n]``, or for blocks all matrices of one size. Its table is all
that changes at a switch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.optim import low_rank, tables

BlockOrder = Literal["random", "ascending", "descending", "mirror"]
Transport = Callable[[jax.Array, bool], jax.Array]
Words = tuple[jax.Array, jax.Array]


def _at(words: Words, *indices: Any) -> Words:
    """Returns the seed words of one use of a unit's."""
    return tables.leaf_words(jnp.stack(words), *indices)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Rows or columns, in groups of adjacent ones, chosen anew for every matrix.

    Attributes:
      shape: ``(B, m, n)``.
      axis: -2 chooses inputs, -1 outputs.
      group: adjacent ones that are chosen together.
      strata: equal parts of the axis of which each keeps as many; as many as shards cut it.
      kept: groups that each stratum keeps.
    """

    shape: tuple[int, int, int]
    axis: int
    group: int
    strata: int
    kept: int

    @property
    def selected_shape(self) -> tuple[int, ...]:
        size = self.strata * self.kept * self.group
        return (self.shape[0], size, self.shape[2]) if self.axis == -2 else (*self.shape[:2], size)

    def init(self) -> jax.Array:
        groups = self.shape[self.axis] // (self.group * self.strata)
        return jnp.zeros((self.shape[0], self.strata, groups), jnp.int32)

    def draw(self, words: Words, epoch: jax.Array, first: Any, gradients: list[jax.Array], table: Any) -> Any:
        return tables.random_order(_at(words, epoch), table.shape, first)

    def divide(self, gradients: list[jax.Array], table: Any) -> tuple[jax.Array, list[jax.Array]]:
        return tables.take_groups(gradients[0], table[..., : self.kept], self.axis, self.group), gradients

    def join(self, selected: jax.Array, rest: list[jax.Array], table: Any) -> list[jax.Array]:
        position = tables.positions(table)
        return [tables.write_back(selected, rest[0], position, self.kept, self.axis, self.group)]

    def transport(self, before: Any, after: Any) -> Transport:
        source = jnp.take_along_axis(tables.positions(before), after[..., : self.kept], axis=-1)

        def carry(moment: jax.Array, squared: bool) -> jax.Array:
            return tables.write_back(moment, jnp.zeros_like(moment), source, self.kept, self.axis, self.group)

        return carry


@dataclasses.dataclass(frozen=True)
class RandK:
    """Entries of every row: one random set of columns per matrix, shifted around by a random distance in each row.

    Attributes:
      shape: ``(B, m, n)``.
      kept: entries per row.
    """

    shape: tuple[int, int, int]
    kept: int

    @property
    def selected_shape(self) -> tuple[int, ...]:
        return (*self.shape[:2], self.kept)

    def init(self) -> tuple[jax.Array, jax.Array]:
        batch, rows, cols = self.shape
        return jnp.zeros((batch, cols), jnp.int32), jnp.zeros((batch, rows), jnp.int32)

    def draw(self, words: Words, epoch: jax.Array, first: Any, gradients: list[jax.Array], table: Any) -> Any:
        order, shift = table
        bits = tables.matrix_bits(_at(words, epoch, 1), shift.shape, first)
        distances = (bits % np.uint32(self.shape[2])).astype(jnp.int32)
        return tables.random_order(_at(words, epoch), order.shape, first), distances

    def divide(self, gradients: list[jax.Array], table: Any) -> tuple[jax.Array, list[jax.Array]]:
        return jnp.take_along_axis(gradients[0], self._chosen(table), axis=-1, mode="clip"), gradients

    def join(self, selected: jax.Array, rest: list[jax.Array], table: Any) -> list[jax.Array]:
        slot = self._slots(table, lax.broadcasted_iota(jnp.int32, self.shape, 2))
        spread = jnp.take_along_axis(selected, jnp.minimum(slot, self.kept - 1), axis=-1, mode="clip")
        return [jnp.where(slot < self.kept, spread, rest[0])]

    def transport(self, before: Any, after: Any) -> Transport:
        slot = self._slots(before, self._chosen(after))

        def carry(moment: jax.Array, squared: bool) -> jax.Array:
            found = jnp.take_along_axis(moment, jnp.minimum(slot, self.kept - 1), axis=-1, mode="clip")
            return jnp.where(slot < self.kept, found, 0)

        return carry

    def _chosen(self, table: Any) -> jax.Array:
        """Returns the columns of the entries that have state, int32 ``[B, m, kept]``."""
        order, shift = table
        return (order[:, None, : self.kept] + shift[:, :, None]) % self.shape[2]

    def _slots(self, table: Any, cols: jax.Array) -> jax.Array:
        """Returns the slots of columns ``[B, m, k]``: at least `kept` for entries without state."""
        order, shift = table
        unshifted = (cols - shift[:, :, None]) % self.shape[2]
        return jax.vmap(lambda slots, i: jnp.take(slots, i, mode="clip"))(tables.positions(order), unshifted)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Whole matrices, of all leaves whose matrices have one size.

    Attributes:
      counts: matrices of each leaf.
      size: ``(m, n)``.
      kept: matrices that have state at a time.
      order: ``"random"`` draws a permutation per pass, in which each matrix has its turn; the others walk in a circle,
        ``"mirror"`` from both ends.
    """

    counts: tuple[int, ...]
    size: tuple[int, int]
    kept: int
    order: BlockOrder

    @property
    def selected_shape(self) -> tuple[int, ...]:
        return (self.kept, *self.size)

    @property
    def total(self) -> int:
        """Number of matrices."""
        return sum(self.counts)

    def init(self) -> jax.Array:
        return jnp.zeros((self.total,), jnp.int32)

    def draw(self, words: Words, epoch: jax.Array, first: Any, gradients: list[jax.Array], table: Any) -> Any:
        if self.order == "random":
            turns = -(-self.total // self.kept)
            order = tables.random_order(_at(words, epoch // turns), (self.total,))
            # The last turn of a pass takes some of the turn before again rather than fewer.
            return jnp.roll(order, -jnp.minimum(epoch % turns * self.kept, self.total - self.kept))
        return jnp.roll(jnp.asarray(block_sequence(self.total, self.order)), -(epoch * self.kept % self.total))

    def divide(self, gradients: list[jax.Array], table: Any) -> tuple[jax.Array, list[jax.Array]]:
        active = table[: self.kept]
        if len(gradients) == 1:
            return jnp.take(gradients[0], active, axis=0, mode="clip"), gradients
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        place = np.concatenate([np.arange(count) for count in self.counts])
        reads = [lambda i, g=g: lax.dynamic_index_in_dim(g, i, keepdims=False) for g in gradients]

        def one(index: jax.Array) -> jax.Array:
            return lax.switch(jnp.asarray(owner)[index], reads, jnp.asarray(place)[index])

        return lax.map(one, active), gradients

    def join(self, selected: jax.Array, rest: list[jax.Array], table: Any) -> list[jax.Array]:
        slots = jnp.split(tables.positions(table), np.cumsum(self.counts)[:-1])

        def put(slot: jax.Array, other: jax.Array) -> jax.Array:
            spread = jnp.take(selected, jnp.minimum(slot, self.kept - 1), axis=0, mode="clip")
            return jnp.where((slot < self.kept)[:, None, None], spread, other)

        return [put(slot, other) for slot, other in zip(slots, rest, strict=True)]

    def transport(self, before: Any, after: Any) -> Transport:
        source = tables.positions(before)[after[: self.kept]]

        def carry(moment: jax.Array, squared: bool) -> jax.Array:
            found = jnp.take(moment, jnp.minimum(source, self.kept - 1), axis=0, mode="clip")
            return jnp.where((source < self.kept)[:, None, None], found, 0)

        return carry


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """A subspace of the shorter side of every matrix, spanned by orthonormal columns.

    The rest is orthogonal to it as a whole, but its sign is not: as in the reference, the part without state leaks into
    the subspace.

    Attributes:
      shape: ``(B, m, n)``.
      rank: dimension of the subspace.
      method: how it is found, see `low_rank.find_subspace`.
    """

    shape: tuple[int, int, int]
    rank: int
    method: low_rank.Method

    @property
    def axis(self) -> int:
        """The shorter axis; of two that are alike the inputs."""
        return -2 if self.shape[1] <= self.shape[2] else -1

    @property
    def selected_shape(self) -> tuple[int, ...]:
        return (self.shape[0], self.rank, self.shape[2]) if self.axis == -2 else (*self.shape[:2], self.rank)

    def init(self) -> jax.Array:
        return jnp.zeros((self.shape[0], self.shape[self.axis], self.rank), jnp.float32)

    def draw(self, words: Words, epoch: jax.Array, first: Any, gradients: list[jax.Array], table: Any) -> Any:
        own = jnp.arange(self.shape[0], dtype=jnp.uint32) + jnp.asarray(first).astype(jnp.uint32)
        per_matrix = jnp.stack([*(jnp.full_like(own, word) for word in _at(words, epoch)), own], axis=1)

        def find(operands: Any) -> jax.Array:
            matrix, before, word = operands
            return low_rank.find_subspace(matrix, before, self.axis, self.rank, self.method, word, epoch == 0)

        return lax.map(find, (gradients[0], table, per_matrix))

    def divide(self, gradients: list[jax.Array], table: Any) -> tuple[jax.Array, list[jax.Array]]:
        selected = low_rank.project(gradients[0], table, self.axis)
        return selected, [gradients[0] - low_rank.project_back(selected, table, self.axis, gradients[0].dtype)]

    def join(self, selected: jax.Array, rest: list[jax.Array], table: Any) -> list[jax.Array]:
        return [low_rank.project_back(selected, table, self.axis, jnp.float32) + rest[0]]

    def transport(self, before: Any, after: Any) -> Transport:
        change = jnp.einsum("bsi,bsj->bij", after, before, precision=low_rank.HIGHEST)

        def carry(moment: jax.Array, squared: bool) -> jax.Array:
            return low_rank.project(moment, jnp.swapaxes(change**2 if squared else change, -1, -2), self.axis)

        return carry


Split = Columns | RandK | Blocks | Orthogonal


def block_sequence(total: int, order: BlockOrder) -> np.ndarray:
    """Returns the circle in which blocks take turns, int32 ``[total]``: from one end, or from both in alternation."""
    ascending = np.arange(total, dtype=np.int32)
    if order == "mirror":
        return np.stack([ascending, ascending[::-1]], axis=1).reshape(-1)[:total]
    return ascending if order == "ascending" else ascending[::-1]


def block_quotas(counts: list[int], density: float) -> list[int]:
    """Returns how many of the matrices of each size have state: ``round(density * all)``, by largest remainders."""
    shares = [density * count for count in counts]
    quotas = [int(share) for share in shares]
    missing = max(round(density * sum(counts)), int(density > 0)) - sum(quotas)
    by_remainder = sorted(range(len(counts)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[:missing]:
        quotas[i] += 1
    return quotas
