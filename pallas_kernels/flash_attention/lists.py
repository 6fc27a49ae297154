"""What the attention kernels read of a mask: which blocks to visit, and which elements of a partial block are true."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


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
