"""S2AFormer: Strip Self-Attention for Efficient Vision Transformer (2025).

Keys and values are few, by a strided convolution, and queries and keys have few channels. How few, and that the kernel
of the convolution is its stride, the abstract does not say.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.attention.attend import attend
from memjax.attention.expression import as_integer


class StripAttention(NamedTuple):
    """What `strip_attention` learns.

    Attributes:
      query, key: ``[C, heads, d_qk]``.
      value: ``[C, heads, C / heads]``.
      out: ``[heads, C / heads, C]``.
      conv: ``[stride, stride, C]``, a depthwise convolution.
      scale, bias: ``[C]``, of the layer norm after it.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array
    conv: jax.Array
    scale: jax.Array
    bias: jax.Array


def strip_init(key: jax.Array, channels: int, *, heads: int, d_qk: int, stride: int) -> StripAttention:
    """Returns parameters drawn at random, float32; the convolution is a mean.

    Args:
      key: a random key.
      channels: C, a multiple of ``heads``.
      heads: how many.
      d_qk: channels of queries and keys of a head; a hyper-parameter.
      stride: of the convolution; 1 is for none.

    Raises:
      ValueError: channels that heads do not divide.
    """
    if channels % as_integer("strip_init", "heads", heads, 1):
        raise ValueError(f"strip_init: {heads} heads do not divide {channels} channels")
    normal = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    q, k, v, out = jax.random.split(key, 4)
    return StripAttention(
        query=normal(q, (channels, heads, d_qk)),
        key=normal(k, (channels, heads, d_qk)),
        value=normal(v, (channels, heads, channels // heads)),
        out=jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)(out, (heads, channels // heads, channels)),
        conv=jnp.full((stride, stride, channels), stride**-2.0),
        scale=jnp.ones(channels),
        bias=jnp.zeros(channels),
    )


def strip_attention(params: StripAttention, x: jax.Array) -> jax.Array:
    """Returns attention of every pixel over ``1 / stride ** 2`` as many; with stride 1 over all, as they are.

    Args:
      params: of `strip_init`.
      x: ``[B, height, width, C]``, the sides multiples of the stride.

    Returns:
      ``[B, height, width, C]`` in the dtype of ``x``.

    Raises:
      ValueError: sides that the stride does not divide.
    """
    B, height, width, C = x.shape
    stride = params.conv.shape[0]
    if height % stride or width % stride:
        raise ValueError(f"strip_attention: stride {stride} does not divide an image of {height} x {width}")
    few = x
    if stride > 1:
        cells = x.reshape(B, height // stride, stride, width // stride, stride, C)
        few = jnp.einsum("bhiwjc,ijc->bhwc", cells, params.conv, preferred_element_type=jnp.float32)
        centred = few - few.mean(-1, keepdims=True)
        normal = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        few = (normal * params.scale + params.bias).astype(x.dtype)
    tokens, few = x.reshape(B, -1, C), few.reshape(B, -1, C)
    q, k, v = (
        jnp.einsum("bnc,chd->bnhd", source, weight.astype(x.dtype))
        for source, weight in ((tokens, params.query), (few, params.key), (few, params.value))
    )
    return jnp.einsum("bnhd,hdc->bnc", attend(q, k, v), params.out.astype(x.dtype)).reshape(x.shape)
