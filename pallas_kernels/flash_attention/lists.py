"""What the attention kernels read of a mask: which blocks to visit, and which elements of a partial block are true."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
L2_BYTES = 32 * 2**20
"""What may be read again and again at a time; a Hopper GPU has 50 MiB of L2 cache."""


class BlockList(NamedTuple):
    """For each block of one side (queries or keys), the blocks of the other side to visit.

    ``Bm`` is 1 or B; ``Hm`` is 1, Hk or H. ``N`` counts the blocks of this side, ``M`` is the room in a list.

    Attributes:
      index: int32 ``[Bm, Hm, N, M]``. The first ``full`` need no mask, those up to ``total`` do; each part ascends.
        What follows repeats indices in range.
      full: int32 ``[Bm, Hm, N]``.
      total: int32 ``[Bm, Hm, N]``, at most M.
      flags: int32 ``[Bm, Hm, N, M]``: bit i is the truth of the i-th selection of blocks there. None without one.
      pointer: int32 ``[Bm, Hm, N, M]``: the table of `Elements.bits` that a partial entry reads. None without bits.
    """

    index: Array  # type: ignore[assignment]
    full: Array
    total: Array
    flags: Array | None = None
    pointer: Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "columns", "bits"], meta_fields=["test"])
@dataclasses.dataclass(frozen=True)
class Elements:
    """Which elements of a partial block are true.

    Attributes:
      rows: int32 ``[B|1, H|Hk|1, S]`` each: facts about queries.
      columns: int32 ``[B|1, H|Hk|1, T]`` each: facts about keys.
      bits: uint32 ``[n, bq / 32, bk]``: element (q, k) of table n, counted within the block, is bit ``q % 32`` of
        ``bits[n, q // 32, k]``. None where ``test`` decides.
      test: ``(q, k, rows, columns, flags) -> bool`` of integer arrays that broadcast; hashable. ``flags`` is an entry
        of `BlockList.flags`, or None. None where bits decide. It says nothing of keys beyond T.
    """

    rows: tuple[Array, ...] = ()
    columns: tuple[Array, ...] = ()
    bits: Array | None = None
    test: Callable[..., Any] | None = None


def heads_together(lists: BlockList, elements: Elements, pairs: int, sharing: int, bytes_each: int) -> int:
    """Returns how many pairs of batch and head are gone through at a time, a divisor of their number.

    Args:
      lists, elements: of all blocks. Where they follow from positions alone, blocks that run at a time read the same
        part of a head's operands anyhow, and all pairs are taken.
      pairs: batch times heads.
      sharing: neighbours that read the same operands.
      bytes_each: what the tiles of a pair, or of such neighbours, read between them.
    """
    facts = [*elements.rows, *elements.columns, *(x for x in (lists.flags, lists.pointer) if x is not None)]
    if not facts and lists.full.shape[:2] == (1, 1):
        return pairs
    most = max(1, L2_BYTES // bytes_each) * sharing
    return max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= most)
