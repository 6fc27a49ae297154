"""ConvBN Tune: a convolution and its BatchNorm, trained with frozen statistics, without keeping what the first gives.

With frozen statistics, y = gamma (conv(x, W) + b - mu) / sqrt(var + eps) + beta = conv(x, c W) + beta + c (b - mu) with
c = gamma / sqrt(var + eps) per output channel. For the gradients the left side keeps x and the convolution's output,
the right keeps x. Both are the same function of W, b, gamma and beta, which stay what is trained: training c W itself
(deploying, then training) scales the gradient of W by c^2 and is unstable.
Source: Efficient ConvBN Blocks for Transfer Learning and Beyond, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = Mapping[str, jax.Array]


def fold_bn(conv: Params, bn: Params, stats: Params, eps: float = 1e-5, *, axis: int = -1) -> dict[str, jax.Array]:
    """Returns kernel and bias of the one convolution that convolves and then normalises, for any kind of convolution.

    Args:
      conv: ``kernel``, float, and where the convolution has one ``bias [C]``.
      bn: ``scale [C]`` (gamma) and ``bias [C]`` (beta), each where the normalisation has it.
      stats: ``mean [C]`` and ``var [C]``, which get no gradient.
      eps: added to the variance.
      axis: the axis of the kernel of its C output channels.

    Returns:
      ``{"kernel", "bias"}``: the kernel in its own dtype, the bias float32 or wider.

    Raises:
      ValueError: names that are missing or unknown, vectors that are not ``[C]``.
    """
    kernel = conv["kernel"]
    channels = kernel.shape[axis]
    vectors = {}
    for name, given, required, optional in (
        ("conv", {k: v for k, v in conv.items() if k != "kernel"}, (), ("bias",)),
        ("bn", bn, (), ("scale", "bias")),
        ("stats", stats, ("mean", "var"), ()),
    ):
        if set(given) - {*required, *optional} or set(required) - set(given):
            raise ValueError(f"{name} has {sorted(given)}; expected {[*required, *(o + '?' for o in optional)]}")
        for key, vector in given.items():
            if vector.shape != (channels,):
                raise ValueError(f"{name}[{key!r}]: expected [{channels}], one per output channel, got {vector.shape}")
            wide = jnp.promote_types(vector.dtype, jnp.float32)
            vectors[name, key] = vector.astype(jnp.promote_types(wide, kernel.dtype))
    mean, var = (lax.stop_gradient(vectors["stats", key]) for key in ("mean", "var"))
    scale = lax.rsqrt(var + eps) * vectors.get(("bn", "scale"), 1)
    bias = (vectors.get(("conv", "bias"), 0) - mean) * scale + vectors.get(("bn", "bias"), 0)
    shape = [1] * kernel.ndim
    shape[axis] = channels
    folded = kernel.astype(scale.dtype) * scale.reshape(shape)
    return {"kernel": folded.astype(kernel.dtype), "bias": bias}


def conv_bn_tune(
    x: jax.Array,
    conv: Params,
    bn: Params,
    stats: Params,
    eps: float = 1e-5,
    *,
    window_strides: Sequence[int] | None = None,
    padding: Any = "SAME",
    dimension_numbers: Any = None,
    convolve: Callable[..., jax.Array] = lax.conv_general_dilated,
    **conv_kw: Any,
) -> jax.Array:
    """Convolves and normalises with frozen statistics; reverse mode keeps ``x`` and the parameters.

    Args:
      x: image, ``[N, *spatial, C_in]`` by default.
      conv, bn, stats, eps: as in `fold_bn`.
      window_strides, padding: of the convolution; strides of 1 by default.
      dimension_numbers: as `jax.lax.conv_general_dilated` takes them; None: channels last in image and kernel, as in
        Flax.
      convolve: called as ``convolve(x, kernel, window_strides, padding, dimension_numbers=..., **conv_kw)``; for
        instance `jax.lax.conv_transpose`.
      **conv_kw: ``feature_group_count``, ``rhs_dilation``, ``precision`` and the like.

    Returns:
      Image of the dtype of the convolution.

    Raises:
      ValueError: as in `fold_bn`.
    """
    kernel = conv["kernel"]
    spatial = "".join(chr(ord("0") + i) for i in range(kernel.ndim - 2))
    if dimension_numbers is None:
        dimension_numbers = ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")
    if isinstance(dimension_numbers, lax.ConvDimensionNumbers):
        out_axis, channel = dimension_numbers.rhs_spec[0], dimension_numbers.out_spec[1]
    else:
        out_axis, channel = dimension_numbers[1].index("O"), dimension_numbers[2].index("C")
    if conv_kw.get("transpose_kernel"):  # the kernel of the forward convolution, whose inputs are our outputs
        out_axis = dimension_numbers[1].index("I")
    strides = (1,) * (kernel.ndim - 2) if window_strides is None else tuple(window_strides)

    def run(x: jax.Array, conv: Params, bn: Params, stats: Params) -> jax.Array:
        folded = fold_bn(conv, bn, stats, eps, axis=out_axis)
        y = convolve(x, folded["kernel"], strides, padding, dimension_numbers=dimension_numbers, **conv_kw)
        shape = [1] * y.ndim
        shape[channel] = -1
        return y + folded["bias"].astype(y.dtype).reshape(shape)

    return jax.checkpoint(run)(x, conv, bn, stats)  # the folded kernel is made again, so it is not kept either
