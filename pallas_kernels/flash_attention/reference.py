"""Block-sparse attention as its definition says: a table of which elements take part, and S x T scores in float32."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._bits import seed_words
from pallas_kernels.flash_attention.lists import BlockList, Elements
from pallas_kernels.flash_attention.scores import Reduce, ScoreMod, modified, slope, stays


def table(
    lists: BlockList, elements: Elements, blocks: tuple[int, int], sizes: tuple[int, int], heads: int, by_key: bool
) -> jax.Array:
    """Returns which elements take part, bool ``[B|1, H|1, S, T]``.

    Args:
      lists: of the query blocks, or ``by_key`` of the key blocks.
      elements: the rule of the blocks that are not visited whole.
      blocks: queries and keys per block.
      sizes: S and T.
      heads: H.
    """

    def by_head(x: Any) -> jax.Array:
        return x if x.shape[1] == 1 else jnp.repeat(x, heads // x.shape[1], axis=1)

    shape = lists.index.shape
    batch, head, mine, place = np.ix_(*(range(n) for n in shape))
    where = (batch, head, lists.index, mine) if by_key else (batch, head, mine, lists.index)
    grid = (*shape[:2], *(math.ceil(n / block) for n, block in zip(sizes, blocks)))

    def spread(x: Any) -> jax.Array:
        """Returns the values ``[..., N, M]`` of entries where their elements are, 0 elsewhere."""
        used = jnp.where(place < lists.total[..., None], x, 0)
        x = jnp.zeros(grid, used.dtype).at[where].max(used)
        return by_head(jnp.repeat(jnp.repeat(x, blocks[0], axis=2), blocks[1], axis=3)[:, :, : sizes[0], : sizes[1]])

    kind = spread(jnp.where(place < lists.full[..., None], 2, 1))
    q, k = np.ix_(range(sizes[0]), range(sizes[1]))
    truth: Any = False
    if elements.bits is not None:
        words = jnp.asarray(elements.bits)[spread(lists.pointer), q % blocks[0] // 32, k % blocks[1]]
        truth = (words >> (q % blocks[0] % 32).astype(np.uint32)) & 1 == 1
    elif elements.test is not None:
        rows = tuple(by_head(x)[..., None] for x in elements.rows)
        columns = tuple(by_head(x)[..., None, :] for x in elements.columns)
        flags = None if lists.flags is None else spread(lists.flags)
        truth = elements.test(jnp.asarray(q, jnp.int32), jnp.asarray(k, jnp.int32), rows, columns, flags)
    return (kind == 2) | ((kind == 1) & truth)


class _Scores(NamedTuple):
    """Everything of size S x T.

    Attributes:
      q, k: float32 ``[B, H, S, D]``, ``[B, H, T, D]``.
      s: masked scores ``[B, H, S, T]``.
      derivative: of ``s`` by ``scale * q k``.
      keep: 1 / (1 - dropout) where dropout keeps a weight, 0 elsewhere.
    """

    q: jax.Array
    k: jax.Array
    s: jax.Array
    derivative: jax.Array
    keep: jax.Array


def _scores(
    q: jax.Array,
    k: jax.Array,
    lists: BlockList,
    elements: Elements,
    by_key: bool,
    *,
    blocks: tuple[int, int],
    scale: float,
    softcap: float | None,
    score_mod: ScoreMod | None,
    dropout: float = 0.0,
    seed: Any = None,
    pages: jax.Array | None = None,
) -> _Scores:
    heads = q.shape[2]
    q, k = _wide(q, heads), _wide(_gathered(k, pages), heads)
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") * scale
    places = [jnp.asarray(x, jnp.int32) for x in np.ix_(*(range(n) for n in s.shape))]
    derivative = jnp.ones_like(s)
    if softcap is not None or score_mod is not None:
        derivative = slope(s, softcap, score_mod, *places)[1]
        s = modified(s, softcap, score_mod, *places)
    keep = jnp.ones_like(s)
    if dropout:
        keep = stays(seed_words(seed), dropout, s.shape[1], s.shape[3], *places) / (1 - dropout)
    mask = table(lists, elements, blocks, (s.shape[2], s.shape[3]), heads, by_key)
    return _Scores(q, k, jnp.where(mask, s, -jnp.inf), derivative, keep)


def _gathered(x: jax.Array, pages: jax.Array | None) -> jax.Array:
    return x if pages is None else x[pages].reshape(pages.shape[0], -1, *x.shape[2:])


def _wide(x: jax.Array, heads: int) -> jax.Array:
    """Returns ``[B, S, H|Hk, ...]`` as float32 ``[B, H, S, ...]``, the heads of keys repeated."""
    x = jnp.moveaxis(x.astype(jnp.float32), 2, 1)
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def _weights(s: jax.Array, lse: jax.Array) -> jax.Array:
    """Returns ``exp(s - lse)``, 0 in rows with no keys; lse: ``[B, H, S]``."""
    none = lse == -jnp.inf
    return jnp.where(none[..., None], 0, jnp.exp(s - jnp.where(none, 0, lse)[..., None]))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockList,
    elements: Elements,
    *,
    sink: jax.Array | None = None,
    **settings: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns the result and the log-sum-exp of every row; arguments as `api.forward`."""
    found = _scores(q, k, lists, elements, False, **settings)
    s = found.s
    if sink is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sink.astype(s.dtype)[:, None, None], (*s.shape[:3], 1))], axis=-1)
    none = jnp.all(s == -jnp.inf, axis=-1)
    lse = jnp.where(none, -jnp.inf, jax.nn.logsumexp(jnp.where(none[..., None], 0, s), axis=-1))
    p = _weights(found.s, lse) * found.keep
    out = jnp.einsum("bhqk,bhkd->bqhd", p, _wide(_gathered(v, settings.get("pages")), q.shape[2]), precision="highest")
    return out.astype(q.dtype), jnp.moveaxis(lse, 1, 2)


def _gradient(
    q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, lists: Any, elements: Any, *, by_key: bool, **settings: Any
) -> tuple[_Scores, jax.Array, jax.Array, jax.Array]:
    """Returns the scores, the weights after dropout, the gradient of ``q k``, and ``do`` as ``[B, H, S, Dv]``."""
    heads = q.shape[2]
    found = _scores(q, k, lists, elements, by_key, **settings)
    do, lse, delta = (_wide(x, heads) for x in (do, lse, delta))
    p, v = _weights(found.s, lse), _wide(_gathered(v, settings.get("pages")), heads)
    dp = jnp.einsum("bhqd,bhkd->bhqk", do, v, precision="highest") * found.keep
    ds = p * (dp - delta[..., None]) * found.derivative * settings["scale"]
    return found, p * found.keep, ds, do


def query_gradient(q: jax.Array, *args: Any, **settings: Any) -> jax.Array:
    """Returns the gradient of ``q``; arguments as `api.query_gradient`."""
    found, _, ds, _ = _gradient(q, *args, by_key=False, **settings)
    return jnp.einsum("bhqk,bhkd->bqhd", ds, found.k, precision="highest").astype(q.dtype)


def key_value_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, *args: Any, **settings: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of ``k`` and ``v``; arguments as `api.key_value_gradients`."""
    found, p, ds, do = _gradient(q, k, v, *args, by_key=True, **settings)
    pages, key_heads = settings.get("pages"), k.shape[2]

    def per_key_head(x: jax.Array, like: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0], key_heads, -1, *x.shape[2:]).sum(2), 1, 2)
        if pages is not None:
            x = jnp.zeros(like.shape).at[pages].add(x.reshape(*pages.shape, -1, *x.shape[2:]))
        return x.astype(like.dtype)

    dk = jnp.einsum("bhqk,bhqd->bhkd", ds, found.q, precision="highest")
    dv = jnp.einsum("bhqk,bhqd->bhkd", p, do, precision="highest")
    return per_key_head(dk, k), per_key_head(dv, v)


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
    s = _scores(q, k, lists, elements, True, **settings).s
    lse = _wide(lse, q.shape[2])
    if reduce == "max_logit":
        found = jnp.where(lse[..., None] == -jnp.inf, -jnp.inf, s)
    else:
        found = _weights(s, lse)
    found = found.reshape(s.shape[0], k.shape[2], -1, s.shape[3])  # the rows of all heads of a group
    return found.sum(2) if reduce == "sum" else found.max(2)
