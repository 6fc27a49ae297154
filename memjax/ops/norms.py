"""RMSNorm and LayerNorm that keep their output, which the next product keeps anyway, in place of their input.

The normalised value is recovered from the output by the scale and bias. Sources: Accelerating Transformer-Based Model
Training through Memory Footprint Reduction (Tempo), 2022; with codes, the idea of S2A: Structure to Activation, 2025,
as reconstructed here from its abstract: no code of it is public.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from memjax.codecs import Codec
from memjax.codecs.fused import varying_like
from memjax.core import operation, packing, register_rule
from memjax.core.jaxpr_compat import vary_like
from memjax.ops.once import once
from memjax.ops.packing import group_of, kernel_form
from memjax.ops.wide import wide
from pallas_kernels import norm as kernels
from pallas_kernels.codec import Codes

Residual = Literal["output", "input"] | Codec

SMALLEST = 2.0**-64
"""A smaller gain is taken for this one: too small to be seen in a sum, and xhat * gain keeps every digit of xhat."""

LOST = 0.125
"""From an error of this size on, a normalised value (of mean square 1) counts as lost in the output."""


def rms_norm(
    x: jax.Array, scale: jax.Array, *, eps: float = 1e-6, offset: float = 0.0, residual: Residual | None = None
) -> jax.Array:
    """Returns ``x / sqrt(mean(x**2) + eps) * (offset + scale)`` over the last axis.

    Besides ``residual``, reverse mode keeps the scale and one float32 per row.

    Args:
      x: float ``[..., D]``.
      scale: float ``[D]``; under `memjax.lift` also a weight view, of which a dense copy is made.
      eps: added to the mean square.
      offset: 1.0 for a scale that is stored as its distance from one (Gemma).
      residual: what backward is given of the normalised value. "output": the result itself, so that an operation that
        keeps it too shares it; gradients are then as exact as the result's dtype: the relative error of a normalised
        element is 2**-9 in bfloat16. A gain below 2**-64 is taken for 2**-64. "input": ``x``. A codec: codes of the
        normalised value, in groups along D. None: "output", but "input" for float16, whose range is too small,
        and where `memjax.remat` packs residuals: dividing by a small gain would blow up the error of codes.

    Returns:
      ``[..., D]`` in the dtype of ``x``; statistics and gradients are computed in float32.

    Raises:
      ValueError: shapes that do not fit, residual="output" in float16, groups that do not divide D.
    """
    residual = _check(x, residual, scale=scale)
    return _rms_norm(x, vary_like(_dense(scale), [x]), eps, offset, residual)


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    eps: float = 1e-5,
    residual: Residual | None = None,
    spare: int = 8,
) -> jax.Array:
    """Returns ``(x - mean) / sqrt(variance + eps) * scale + bias`` over the last axis.

    Besides ``residual``, reverse mode keeps scale, bias and one float32 per row ("input": two).

    Args:
      x: float ``[..., D]``.
      scale, bias: float ``[D]``; under `memjax.lift` also weight views, of which dense copies are made.
      eps: added to the variance.
      residual: as in `rms_norm`. With "output", the error of a normalised element is that of the result over the
        gain: large where the bias is large and the gain is small.
      spare: with residual="output", the number of channels, those of largest ``|bias / gain|``, of which the
        normalised value is kept too, ``[..., spare]`` in the dtype of ``x``. Where one more channel than these has an
        error above 1/8, the gradients of x and scale are NaN: raise ``spare`` or take residual="input".

    Returns:
      ``[..., D]`` in the dtype of ``x``; statistics and gradients are computed in float32.

    Raises:
      ValueError: shapes that do not fit, residual="output" in float16, groups that do not divide D, a negative
        ``spare``.
    """
    residual = _check(x, residual, scale=scale, bias=bias)
    if spare < 0:
        raise ValueError(f"spare={spare} must not be negative")
    scale, bias = (vary_like(_dense(v), [x]) for v in (scale, bias))
    return _layer_norm(x, scale, bias, eps, residual, min(spare, x.shape[-1]))


_dense = operation("norm_vector")(lambda vector: vector)
register_rule("norm_vector", lambda lift, vector: vector.materialize())


def _check(x: jax.Array, residual: Residual | None, **vectors: jax.Array) -> Residual:
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [D] for x [..., D], got {vector.shape} for {x.shape}")
    if residual is None:
        return "input" if x.dtype == jnp.float16 or packing.value else "output"
    if residual == "output" and x.dtype == jnp.float16:
        raise ValueError("residual='output' needs the exponents of bfloat16 or float32; use 'input' for float16")
    if residual not in ("output", "input") and not isinstance(residual, Codec):
        raise ValueError(f"residual must be 'output', 'input', a codec or None, got {residual!r}")
    return residual


def _gain(scale: jax.Array, offset: float = 0.0) -> jax.Array:
    gain = offset + wide(scale)
    return jnp.where(jnp.abs(gain) < SMALLEST, jnp.where(gain < 0, -SMALLEST, SMALLEST), gain)


def _normalized_gradients(
    xhat: jax.Array, rstd: jax.Array, gain: jax.Array, dy: jax.Array, centered: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the norm's input and of the gain, float32."""
    dy = wide(dy)
    slope = dy * gain
    across = slope - xhat * jnp.mean(slope * xhat, axis=-1, keepdims=True)
    if centered:
        across = across - jnp.mean(slope, axis=-1, keepdims=True)
    return rstd * across, jnp.sum(dy * xhat, axis=range(xhat.ndim - 1))


# ---- RMSNorm --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float, residual: Residual) -> jax.Array:
    return _rms_forward(x, scale, eps, offset, residual)[0]


def _rms_forward(
    x: jax.Array, scale: jax.Array, eps: float, offset: float, residual: Residual
) -> tuple[jax.Array, Any]:
    form = kernel_form(residual, x, kernels.unsupported) if isinstance(residual, Codec) else None
    if form is not None:
        y, made, rstd = kernels.rms_norm_packed(once(x), _gain(scale, offset), eps=eps, **form._asdict())
        return varying_like((x, scale), (y, (made, rstd, scale)))
    values = wide(x)
    rstd = jax.lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + eps)
    xhat = values * rstd
    y = (xhat * _gain(scale, offset)).astype(x.dtype)
    if residual == "output":
        return y, (y, rstd, scale)
    if residual == "input":
        return y, (x, rstd, scale)
    return y, (residual.encode(once(xhat.astype(x.dtype)), -1), rstd, scale)


def _rms_backward(eps: float, offset: float, residual: Residual, kept: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
    stored, rstd, scale = kept
    gain = _gain(scale, offset)
    if isinstance(stored, Codes):
        assert isinstance(residual, Codec)
        group = group_of(residual, dy)
        dx, d_gain = kernels.rms_norm_backward(dy, stored, rstd, gain, bits=residual.bits, group=group)
        return varying_like((kept, dy), (dx, d_gain.astype(scale.dtype)))
    if residual == "output":
        xhat = wide(stored) * (1 / gain)
    elif residual == "input":
        xhat = wide(stored) * rstd
    else:
        xhat = wide(stored.decode())
    dx, d_gain = _normalized_gradients(xhat, rstd, gain, dy, centered=False)
    return dx.astype(dy.dtype), d_gain.astype(scale.dtype)


_rms_norm.defvjp(_rms_forward, _rms_backward)


# ---- LayerNorm ------------------------------------------------------------------------------------------------------


class _Spare(NamedTuple):
    """Channels of which the output does not tell the normalised value.

    Attributes:
      channels: int32 ``[n]``.
      xhat: their normalised values, ``[..., n]``.
      error: largest error of another channel's normalised value when it is recovered, float32 scalar.
    """

    channels: jax.Array
    xhat: jax.Array
    error: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, residual: Residual, spare: int
) -> jax.Array:
    return _layer_forward(x, scale, bias, eps, residual, spare)[0]


def _layer_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, residual: Residual, spare: int
) -> tuple[jax.Array, Any]:
    values = wide(x)
    mean = jnp.mean(values, axis=-1, keepdims=True)
    centered = values - mean
    rstd = jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + eps)
    xhat = centered * rstd
    y = (xhat * _gain(scale) + wide(bias)).astype(x.dtype)
    if residual == "output":
        return y, (y, rstd, scale, bias, _spare(xhat.astype(x.dtype), scale, bias, spare))
    if residual == "input":
        return y, (x, rstd, scale, bias, mean)
    return y, (residual.encode(once(xhat.astype(x.dtype)), -1), rstd, scale, bias, None)


def _spare(xhat: jax.Array, scale: jax.Array, bias: jax.Array, count: int) -> _Spare:
    error = jnp.abs(wide(bias) / _gain(scale)) * jnp.finfo(xhat.dtype).eps / 2
    errors, channels = jax.lax.top_k(jnp.pad(error, (0, 1)), count + 1)
    return _Spare(channels[:count], jnp.take(xhat, channels[:count], axis=-1, mode="clip"), errors[count])


def _layer_backward(
    eps: float, residual: Residual, spare: int, kept: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    stored, rstd, scale, bias, rest = kept
    gain = _gain(scale)
    if residual == "output":
        xhat = (wide(stored) - wide(bias)) * (1 / gain)
        channel = jnp.arange(xhat.shape[-1])
        for i in range(spare):  # elementwise selections fuse with what follows, a scatter would not
            xhat = jnp.where(channel == rest.channels[i], wide(rest.xhat[..., i : i + 1]), xhat)
        xhat = jnp.where(rest.error > LOST, jnp.nan, xhat)
    elif residual == "input":
        xhat = (wide(stored) - rest) * rstd
    else:
        xhat = wide(stored.decode())
    dx, d_gain = _normalized_gradients(xhat, rstd, gain, dy, centered=True)
    d_bias = jnp.sum(wide(dy), axis=range(dy.ndim - 1))
    return dx.astype(dy.dtype), d_gain.astype(scale.dtype), d_bias.astype(bias.dtype)


_layer_norm.defvjp(_layer_forward, _layer_backward)
