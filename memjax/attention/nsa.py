"""Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention (2025).

Three branches, added by learned gates: keys compressed by a network, blocks of keys chosen by the compressed ones'
attention, and a window. Here the branches share one k and one v. The size and number of blocks and the window are those
of the public configuration; compression, the blocks that are always chosen and how they are weighed are from memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax.attention import masks
from memjax.attention.attend import attend
from memjax.attention.expression import At, Leaf, as_integer
from memjax.attention.select import fitting_blocks, over_rows, token_blocks, top_blocks


class Compression(NamedTuple):
    """A network of one hidden layer that makes one key (or value) of ``length``.

    Attributes:
      position: ``[length, D]``, added to the tokens of a block.
      hidden: ``[length * D, D]``.
      bias: ``[D]``.
      out: ``[D, D]``.
    """

    position: jax.Array
    hidden: jax.Array
    bias: jax.Array
    out: jax.Array


class NSA(NamedTuple):
    """What `nsa_attention` learns.

    Attributes:
      key, value: of the compression branch.
      gate: ``[C, H, 3]``, of the compression, selection and window branches.
      gate_bias: ``[H, 3]``.
    """

    key: Compression
    value: Compression
    gate: jax.Array
    gate_bias: jax.Array


def nsa_init(
    key: jax.Array, *, features: int, heads: int, dim: int, value_dim: int | None = None, length: int = 32
) -> NSA:
    """Returns parameters drawn at random, float32, the gates at one half.

    Args:
      key: a random key.
      features: C of the input that gates are made from.
      heads: H.
      dim: D of queries and keys.
      value_dim: Dv of values; None is ``dim``.
      length: tokens that are compressed into one.
    """

    def compression(key: jax.Array, d: int) -> Compression:
        position, hidden, out = jax.random.split(key, 3)
        normal = jax.nn.initializers.lecun_normal()
        return Compression(
            0.02 * jax.random.normal(position, (length, d)),
            normal(hidden, (length * d, d)),
            jnp.zeros(d),
            normal(out, (d, d)),
        )

    keys, values = jax.random.split(key)
    gate = jnp.zeros((features, heads, 3)), jnp.zeros((heads, 3))
    return NSA(compression(keys, dim), compression(values, value_dim or dim), *gate)


def nsa_attention(
    params: NSA,
    x: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    stride: int = 16,
    block: int = 64,
    top_n: int = 16,
    always: tuple[int, int] = (1, 2),
    window: int = 512,
    scale: float | None = None,
    blocks: tuple[int, int] | None = None,
    implementation: Any = None,
) -> jax.Array:
    """Returns causal attention by compression, selection and window, each times a gate of the input.

    The selection is hard and shared by the query heads of a group: gradients reach the compression by its own branch.
    It is kept as 4 ``top_n`` bytes per query and key head.

    Args:
      params: of `nsa_init`.
      x: ``[B, S, C]``, what the layer was given.
      q: ``[B, S, H, D]``, the last S of T tokens.
      k: ``[B, T, Hk, D]``.
      v: ``[B, T, Hk, Dv]``.
      stride: tokens from one compressed key to the next; a divisor of their length and of ``block``.
      block: keys of a block that is selected.
      top_n: blocks that are selected, those of ``always`` among them.
      always: how many of the first blocks and of the nearest to a query are.
      window: keys of the window, the query's own included.
      scale: of the products; None takes ``D ** -0.5``.
      blocks: as `attend` takes it, for the selection; keys per block are a multiple or a divisor of ``block``.
      implementation: as `attend` takes it.

    Returns:
      ``[B, S, H, Dv]`` in the dtype of ``q``.

    Raises:
      ValueError: sizes that do not divide each other.
    """
    length, S, T = params.key.position.shape[0], q.shape[1], k.shape[1]
    if length % stride or block % stride:
        raise ValueError(f"nsa_attention: stride={stride} must divide the compressed {length} tokens and block={block}")
    as_integer("nsa_attention", "window", window, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    small_k, small_v = _compress(params.key, k, stride), _compress(params.value, v, stride)
    blocks = blocks or fitting_blocks(q.shape, T, block)
    chosen = nsa_blocks(
        q, small_k, T, length=length, stride=stride, block=block, top_n=top_n, always=always, scale=scale
    )
    selected = token_blocks(chosen, block, T, blocks=blocks) & masks.causal()
    nearest = masks.window(window - 1, 0)
    run = functools.partial(attend, q, scale=scale, implementation=implementation)
    branches = (
        run(small_k, small_v, mask=Leaf(_complete, (length, stride, T - S))),
        run(k, v, mask=selected, blocks=blocks),
        run(k, v, mask=nearest),
    )
    f32 = jnp.float32
    gates = jax.nn.sigmoid(jnp.einsum("bsc,chn->bshn", x, params.gate, preferred_element_type=f32) + params.gate_bias)
    out = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
    return jnp.asarray(out, q.dtype)


def nsa_blocks(
    q: jax.Array,
    compressed: jax.Array,
    T: int,
    *,
    length: int,
    stride: int,
    block: int,
    top_n: int,
    always: tuple[int, int],
    scale: float,
) -> jax.Array:
    """Returns the blocks that each query selects by the weights of the compressed keys that overlap them.

    Args:
      q: ``[B, S, H, D]``.
      compressed: ``[B, n, Hk, D]``, key i of tokens ``i * stride`` to ``i * stride + length - 1``.
      T: number of keys.
      length, stride, block, top_n, always, scale: as in `nsa_attention`.

    Returns:
      int32 ``[B, Hk, S, min(top_n, ceil(T / block))]``, -1 for none.
    """
    B, _, H, D = q.shape
    n, heads = compressed.shape[1:3]
    compressed = jax.lax.stop_gradient(compressed).astype(jnp.float32)
    overlap, units, count = length // stride, block // stride, -(-T // block)
    number, ends = jnp.arange(count), jnp.arange(n) * stride + length - 1

    def choose(q: jax.Array, tokens: jax.Array) -> jax.Array:
        grouped = q.astype(jnp.float32).reshape(B, -1, heads, H // heads, D)
        scores = scale * jnp.einsum("bqhgd,bnhd->bhgqn", grouped, compressed)
        seen = ends <= tokens[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
        weights = jnp.where(seen, weights, 0).sum(2)
        # Of each stride the weights of the keys that contain it, then of each block those of its strides.
        room = count * units + overlap - 1
        weights = jnp.pad(weights, ((0, 0),) * 3 + ((overlap - 1, max(0, room - (overlap - 1) - n)),))[..., :room]
        each = sum(weights[..., i : i + count * units] for i in range(overlap))
        importance = jnp.asarray(each).reshape(*weights.shape[:3], count, units).sum(-1)
        importance = jnp.where(number <= tokens[:, None] // block, importance, -jnp.inf)
        return top_blocks(importance, top_n, always=always)

    return over_rows(choose, jax.lax.stop_gradient(q), T)


def _complete(at: At, length: int, stride: int, offset: int) -> Any:
    return at.k * stride + (length - 1) <= at.q + offset


def _compress(network: Compression, x: jax.Array, stride: int) -> jax.Array:
    """Returns the compressed keys ``[B, max(1, (T - length) // stride + 1), Hk, D]``."""
    (length, d), (B, T, heads, _) = network.position.shape, x.shape
    overlap, n = length // stride, max(1, (T - length) // stride + 1)
    used = (n + overlap - 1) * stride
    x = jnp.pad(x, ((0, 0), (0, max(0, used - T)), (0, 0), (0, 0)))[:, :used]
    units = x.reshape(B, -1, stride, heads, d)
    hidden = network.hidden.reshape(overlap, stride, d, -1)
    bias = network.bias + network.position.reshape(-1) @ network.hidden
    parts = (
        jnp.einsum("bushd,sde->buhe", units[:, i : i + n], part.astype(x.dtype), preferred_element_type=jnp.float32)
        for i, part in enumerate(hidden)
    )
    return (jax.nn.gelu(sum(parts) + bias) @ network.out).astype(x.dtype)
