"""Block-sparse attention by XLA: a loop over the blocks of one side, and over each one's list, a tile at a time.

The online softmax is that of FlashAttention (2022). What is alive at once is the operands and a few tiles
``[B, H, bq, bk]``; nothing of size S x T. Arrays are laid out as ``[B, Hk, g, ...]`` with axes of size 1 where they do
not vary, and `jax.vmap` runs over those axes on which the lists depend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._bits import seed_words
from pallas_kernels.flash_attention.lists import BlockList, Elements
from pallas_kernels.flash_attention.scores import Reduce, ScoreMod, slope, stays

_AXES = (0, 1, 2)


class _Place(NamedTuple):
    """Which tile: blocks of queries and of keys, its number n in its list, and whether it is visited in part."""

    i: Any
    j: Any
    n: Any
    masked: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "do", "lse", "delta", "sink", "elements", "seed", "pages", "b", "h"],
    meta_fields=["sizes", "blocks", "scale", "softcap", "score_mod", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class _Operands:
    """What a tile reads; shapes are ``[B|1, Hk|1, g|1, ...]``.

    Attributes:
      q, do: ``[B, Hk, g, Nq * bq, D or Dv]``.
      k, v: ``[B, Hk, 1, Nk * bk, D or Dv]``; with pages ``[1, Hk, 1, pages, page, D or Dv]``.
      lse, delta: float32 ``[B, Hk, g, Nq * bq]``; lse is inf for rows of which no key takes part and for padding.
      sink: float32 ``[1, Hk, g]``.
      elements: with rows ``[..., Nq * bq]``, columns ``[..., Nk * bk]``.
      seed: two uint32 words ``[1, 1, 1, 2]``.
      pages: int32 ``[B, 1, 1, Nk]``.
      b, h: int32 ``[B, 1, 1]`` and ``[1, Hk, g]``, which batch and query head it is.
      sizes: H, S and T.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array | None
    do: jax.Array | None
    lse: jax.Array | None
    delta: jax.Array | None
    sink: jax.Array | None
    elements: Elements
    seed: jax.Array | None
    pages: jax.Array | None
    b: jax.Array
    h: jax.Array
    sizes: tuple[int, int, int]
    blocks: tuple[int, int]
    scale: float
    softcap: float | None
    score_mod: ScoreMod | None
    dropout: float

    def queries(self, x: Any, i: Any) -> Any:
        """Returns block i of an array of queries ``[..., S, ...]``, of which S is axis 3."""
        return lax.dynamic_slice_in_dim(x, i * self.blocks[0], self.blocks[0], 3)

    def keys(self, x: Any, j: Any) -> Any:
        """Returns block j of keys or values, ``[b, hk, bk, D]``."""
        if self.pages is None:
            return lax.dynamic_slice_in_dim(x, j * self.blocks[1], self.blocks[1], 3)[:, :, 0]
        page = lax.dynamic_index_in_dim(self.pages, j, 3, keepdims=False)[:, 0, 0]
        return jnp.take(x[0, :, 0], page, axis=1, mode="clip").swapaxes(0, 1)

    def positions(self, i: Any, j: Any) -> tuple[jax.Array, ...]:
        """Returns b, h, q and k of a tile, which broadcast to ``[b, hk, g, bq, bk]``."""
        q = i * self.blocks[0] + jnp.arange(self.blocks[0], dtype=jnp.int32)
        k = j * self.blocks[1] + jnp.arange(self.blocks[1], dtype=jnp.int32)
        tile = (1, 1, 1)
        return self.b[..., None, None], self.h[..., None, None], q.reshape(*tile, -1, 1), k.reshape(*tile, 1, -1)

    def takes_part(self, place: _Place, entry: BlockList) -> jax.Array | None:
        """Returns which elements of a tile take part, None for all."""
        i, j, n, masked = place
        _, _, q, k = self.positions(i, j)
        keep = None
        if masked and self.elements.bits is not None:
            assert entry.pointer is not None
            table = lax.dynamic_index_in_dim(self.elements.bits, entry.pointer[0, 0, 0, n], 0, keepdims=False)
            shift = jnp.arange(self.blocks[0], dtype=jnp.uint32)[:, None] % np.uint32(32)
            keep = ((jnp.repeat(table, 32, axis=0) >> shift) & np.uint32(1)).astype(bool)
        elif masked:
            assert self.elements.test is not None
            rows = tuple(self.queries(x, i)[..., None] for x in self.elements.rows)
            columns = tuple(
                lax.dynamic_slice_in_dim(x, j * self.blocks[1], self.blocks[1], 3)[..., None, :]
                for x in self.elements.columns
            )
            keep = self.elements.test(q, k, rows, columns, None if entry.flags is None else entry.flags[0, 0, 0, n])
        return keep if keep is None or self.sizes[2] % self.blocks[1] == 0 else keep & (k < self.sizes[2])

    def scores(self, q: jax.Array, k: jax.Array, place: _Place, entry: BlockList) -> tuple[jax.Array, jax.Array | None]:
        """Returns the scores of a tile, -inf where masked, and their derivative by ``scale * q k`` unless it is 1."""
        i, j = place.i, place.j
        s = jnp.einsum("bhgqd,bhkd->bhgqk", q, k, preferred_element_type=jnp.float32) * self.scale
        derivative = None
        if self.softcap is not None or self.score_mod is not None:
            b, h, q_at, k_at = self.positions(i, j)
            # Positions that there are not might give NaN, which no mask takes back.
            q_at, k_at = jnp.minimum(q_at, self.sizes[1] - 1), jnp.minimum(k_at, self.sizes[2] - 1)
            s, derivative = slope(s, self.softcap, self.score_mod, b, h, q_at, k_at)
        keep = self.takes_part(place, entry)
        return s if keep is None else jnp.where(keep, s, -jnp.inf), derivative

    def dropped(self, x: jax.Array, i: Any, j: Any) -> jax.Array:
        """Returns a tile with dropout applied."""
        if self.seed is None:
            return x
        words = self.seed[0, 0, 0, 0], self.seed[0, 0, 0, 1]
        keep = stays(words, self.dropout, self.sizes[0], self.sizes[2], *self.positions(i, j))
        return jnp.where(keep, x / (1 - self.dropout), 0)


def _heads(x: jax.Array, key_heads: int) -> jax.Array:
    """Reshapes ``[B, H|Hk|1, ...]`` to ``[B, Hk|1, g|1, ...]``."""
    if x.shape[1] in (1, key_heads):
        return x[:, :, None]
    return x.reshape(x.shape[0], key_heads, -1, *x.shape[2:])


def _padded(x: jax.Array, size: int, axis: int = 3, value: float = 0) -> jax.Array:
    missing = size - x.shape[axis]
    return (
        jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)], constant_values=value) if missing else x
    )


def _operands(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    elements: Elements,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None,
    score_mod: ScoreMod | None,
    do: jax.Array | None = None,
    lse: jax.Array | None = None,
    delta: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    pages: jax.Array | None = None,
) -> _Operands:
    batch, queries, heads, _ = q.shape
    key_heads, keys = k.shape[2], k.shape[1] if pages is None else pages.shape[1] * k.shape[1]
    rows, columns = (-(-n // block) * block for n, block in zip((queries, keys), blocks))

    def by_query(x: jax.Array | None, value: float = 0) -> jax.Array | None:
        return None if x is None else _padded(_heads(jnp.moveaxis(x, 2, 1), key_heads), rows, value=value)

    def by_key(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        if pages is not None:
            return jnp.moveaxis(x, 2, 0)[None, :, None]
        return _padded(jnp.moveaxis(x, 2, 1)[:, :, None], columns)

    if lse is not None:
        lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    wide_q, wide_k = by_query(q), by_key(k)
    assert wide_q is not None and wide_k is not None
    return _Operands(
        wide_q,
        wide_k,
        by_key(v),
        by_query(do),
        by_query(lse, jnp.inf),
        by_query(delta),
        None if sink is None else sink.astype(jnp.float32).reshape(1, key_heads, -1),
        Elements(
            rows=tuple(_padded(_heads(jnp.asarray(x), key_heads), rows) for x in elements.rows),
            columns=tuple(_padded(_heads(jnp.asarray(x), key_heads), columns) for x in elements.columns),
            bits=elements.bits,
            test=elements.test,
        ),
        jnp.stack(seed_words(seed)).reshape(1, 1, 1, 2) if dropout else None,
        None if pages is None else pages[:, None, None],
        jnp.arange(batch, dtype=jnp.int32).reshape(batch, 1, 1),
        jnp.arange(heads, dtype=jnp.int32).reshape(1, key_heads, -1),
        (heads, queries, keys),
        blocks,
        scale,
        softcap,
        score_mod,
        dropout,
    )


def _varying(inputs: Any, outputs: Any) -> Any:
    """Marks ``outputs`` as varying over the mesh axes of shard_map over which an input does."""
    axes = set[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(inputs)))
    if not axes:
        return outputs

    def mark(x: jax.Array) -> jax.Array:
        missing = axes - set(jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(mark, outputs)


def _mapped(fn: Callable[..., Any], axis: int) -> Callable[..., Any]:
    """Returns ``fn(i, entry, operands)`` run on every slice of size 1 along an axis on which entries depend."""

    def call(i: jax.Array, entry: BlockList, operands: _Operands) -> Any:
        leaves, tree = jax.tree.flatten((entry, operands))
        bits = operands.elements.bits  # the one array without these axes
        spread = [x is not bits and x.shape[axis] > 1 for x in leaves]

        def one(*slices: jax.Array) -> Any:
            whole = [jnp.expand_dims(x, axis) if s else x for x, s in zip(slices, spread)]
            return jax.tree.map(lambda x: jnp.squeeze(x, axis), fn(i, *jax.tree.unflatten(tree, whole)))

        return jax.vmap(one, [axis if s else None for s in spread], axis)(*leaves)

    return call


def _for_each_block(
    row: Callable[..., Any], lists: BlockList, operands: _Operands, finish: Callable[[Any], Any] = lambda x: x
) -> Any:
    """Returns ``finish(row(i, entry, operands))`` of every block i of the side with the lists, stacked in front."""
    entries = jax.tree.map(lambda x: _heads(jnp.asarray(x), operands.k.shape[1]), lists)
    for axis in _AXES:
        if entries.index.shape[axis] > 1:
            row = _mapped(row, axis)

    def call(i: jax.Array) -> Any:
        entry = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 3, keepdims=False), entries)
        return finish(row(i, entry, operands))

    return lax.map(call, _varying((lists, operands), jnp.arange(entries.full.shape[3], dtype=jnp.int32)))


def _visit(step: Callable[..., Any], carry: Any, entry: BlockList, operands: _Operands) -> Any:
    """Folds ``step(carry, block, n, masked)`` over an entry's list: full blocks, then those with a mask."""

    def body(masked: bool) -> Callable[..., Any]:
        return lambda n, carry: step(carry, entry.index[0, 0, 0, n], n, masked)

    carry = _varying((entry, operands), carry)
    full, total = entry.full[0, 0, 0], entry.total[0, 0, 0]
    carry = lax.fori_loop(jnp.zeros_like(full), full, body(False), carry)
    if operands.elements.bits is None and operands.elements.test is None:
        return carry
    return lax.fori_loop(full, total, body(True), carry)


def _by_query(x: jax.Array, size: int) -> jax.Array:
    """Joins ``[Nq, B, Hk, g, bq, ...]`` to ``[B, S, H, ...]``."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :size]


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: BlockList, elements: Elements, **settings: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the result and the log-sum-exp of every row; arguments as `api.forward`."""
    operands = _operands(q, k, v, elements, **settings)

    def row(i: jax.Array, entry: BlockList, o: _Operands) -> tuple[jax.Array, jax.Array]:
        queries = o.queries(o.q, i)
        shape = queries.shape[:-1]
        assert o.v is not None
        top = jnp.full(shape, -jnp.inf, jnp.float32)
        if o.sink is not None:
            top = jnp.broadcast_to(o.sink[..., None], shape)
        values = o.v

        def step(carry: Any, j: Any, n: Any, masked: bool) -> Any:
            top, total, acc = carry
            s, _ = o.scores(queries, o.keys(o.k, j), _Place(i, j, n, masked), entry)
            higher = jnp.maximum(top, s.max(-1))
            base = jnp.where(higher == -jnp.inf, 0, higher)
            p, shrink = jnp.exp(s - base[..., None]), jnp.exp(top - base)
            product = jnp.einsum(
                "bhgqk,bhkd->bhgqd",
                o.dropped(p, i, j).astype(values.dtype),
                o.keys(values, j),
                preferred_element_type=jnp.float32,
            )
            return higher, total * shrink + p.sum(-1), acc * shrink[..., None] + product

        start = top, (top > -jnp.inf).astype(jnp.float32), jnp.zeros((*shape, values.shape[-1]), jnp.float32)
        top, total, acc = _visit(step, start, entry, o)
        empty = total == 0
        out = acc / jnp.where(empty, 1, total)[..., None]
        return out.astype(q.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))

    out, lse = _for_each_block(row, lists, operands)
    return _by_query(out, q.shape[1]), _by_query(lse, q.shape[1])


def _gradient(
    o: _Operands, place: _Place, entry: BlockList, keys: Any, values: Any, queries: Any, do: Any, lse: Any, delta: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the weights of a tile, dropout applied, and the gradient of ``scale * q k``."""
    i, j = place.i, place.j
    s, derivative = o.scores(queries, keys, place, entry)
    p = jnp.exp(s - lse[..., None])
    dp = jnp.einsum("bhgqd,bhkd->bhgqk", do, values, preferred_element_type=jnp.float32)
    ds = p * (o.dropped(dp, i, j) - delta[..., None])
    return o.dropped(p, i, j), ds if derivative is None else ds * derivative


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: BlockList,
    elements: Elements,
    **settings: Any,
) -> jax.Array:
    """Returns the gradient of ``q``; arguments as `api.query_gradient`."""
    operands = _operands(q, k, v, elements, do=do, lse=lse, delta=delta, **settings)

    def row(i: jax.Array, entry: BlockList, o: _Operands) -> jax.Array:
        queries, *rest = (o.queries(x, i) for x in (o.q, o.do, o.lse, o.delta))

        def step(dq: jax.Array, j: Any, n: Any, masked: bool) -> jax.Array:
            keys = o.keys(o.k, j)
            _, ds = _gradient(o, _Place(i, j, n, masked), entry, keys, o.keys(o.v, j), queries, *rest)
            return dq + jnp.einsum("bhgqk,bhkd->bhgqd", ds.astype(k.dtype), keys, preferred_element_type=jnp.float32)

        dq = _visit(step, jnp.zeros(queries.shape, jnp.float32), entry, o)
        return (dq * o.scale).astype(q.dtype)

    return _by_query(_for_each_block(row, lists, operands), q.shape[1])


def key_value_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: BlockList,
    elements: Elements,
    **settings: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``k`` and ``v``; arguments as `api.key_value_gradients`."""
    operands = _operands(q, k, v, elements, do=do, lse=lse, delta=delta, **settings)

    def row(j: jax.Array, entry: BlockList, o: _Operands) -> tuple[jax.Array, jax.Array]:
        keys, values = o.keys(o.k, j), o.keys(o.v, j)
        batch = o.q.shape[0]  # of pages there is one pool for all
        keys, values = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (keys, values))

        def step(carry: Any, i: Any, n: Any, masked: bool) -> Any:
            dk, dv = carry
            queries, do, *rest = (o.queries(x, i) for x in (o.q, o.do, o.lse, o.delta))
            p, ds = _gradient(o, _Place(i, j, n, masked), entry, keys, values, queries, do, *rest)
            form = {"preferred_element_type": jnp.float32}
            dk += jnp.einsum("bhgqk,bhgqd->bhkd", ds.astype(q.dtype), queries, **form)
            dv += jnp.einsum("bhgqk,bhgqd->bhkd", p.astype(do.dtype), do, **form)
            return dk, dv

        start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
        dk, dv = _visit(step, start, entry, o)
        return (dk * o.scale)[:, :, None], dv[:, :, None]

    def finish(found: Any) -> Any:
        found = (x.sum(2) for x in found)
        return tuple(x if pages is not None else x.astype(k.dtype) for x in found)

    pages = settings.get("pages")
    dk, dv = _for_each_block(row, lists, operands, finish)
    return _by_key(dk, k, pages), _by_key(dv, v, pages)


def _by_key(x: jax.Array, like: jax.Array, pages: jax.Array | None) -> jax.Array:
    """Joins ``[Nk, B, Hk, bk, D]`` to ``[B, T, Hk, D]``; with pages, adds to each page what its readers found."""
    if pages is None:
        x = jnp.moveaxis(x, (0, 3), (1, 2))
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]]
    pool = jnp.zeros(like.shape, jnp.float32)
    return pool.at[pages.T].add(jnp.swapaxes(x, 2, 3)).astype(like.dtype)


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    lists: BlockList,
    elements: Elements,
    *,
    reduce: Reduce,
    **settings: Any,
) -> jax.Array:
    """Returns what every key gets of the weights; arguments as `api.column_sums`."""
    operands = _operands(q, k, None, elements, lse=lse, **settings)

    def row(j: jax.Array, entry: BlockList, o: _Operands) -> jax.Array:
        keys = o.keys(o.k, j)
        shape = (o.q.shape[0], o.k.shape[1], 1, o.blocks[1])

        def step(found: jax.Array, i: Any, n: Any, masked: bool) -> jax.Array:
            queries, statistic = o.queries(o.q, i), o.queries(o.lse, i)
            s, _ = o.scores(queries, keys, _Place(i, j, n, masked), entry)
            if reduce == "max_logit":
                s = jnp.where(statistic[..., None] == jnp.inf, -jnp.inf, s)
                return jnp.maximum(found, s.max((2, 3))[:, :, None])
            p = jnp.exp(s - statistic[..., None])
            return (
                found + p.sum((2, 3))[:, :, None] if reduce == "sum" else jnp.maximum(found, p.max((2, 3))[:, :, None])
            )

        return _visit(step, jnp.full(shape, -jnp.inf if reduce == "max_logit" else 0, jnp.float32), entry, o)

    found = _for_each_block(row, lists, operands, lambda x: x.sum(2) if reduce == "sum" else x.max(2))
    return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1)[..., : operands.sizes[2]]
