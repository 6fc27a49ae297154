"""Gated activations that keep their two inputs, or codes of them, and compute the rest again.

Plain autodiff of ``silu(gate) * up`` keeps up to six arrays of that size. Sources: GLU Variants Improve Transformer,
2020 (the functions); Liger Kernel: Efficient Triton Kernels for LLM Training, 2024 (the backward pass).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memjax.codecs import Codec, Packed
from memjax.codecs.fused import varying_like
from memjax.core.packing import CodesRule, codes_rules
from memjax.core.rules import operation
from memjax.ops.once import once
from memjax.ops.packing import group_of, kernel_form
from memjax.ops.wide import wide
from pallas_kernels import glu as kernels
from pallas_kernels.codec import Codes

Residual = Literal["input"] | Codec


def swiglu(gate: jax.Array, up: jax.Array, *, residual: Residual = "input") -> jax.Array:
    """Returns ``silu(gate) * up``.

    Args:
      gate, up: float ``[..., F]`` of one shape and dtype.
      residual: what backward is given: "input" keeps both inputs, exactly; a codec keeps codes of both, in groups
        along F.

    Returns:
      ``[..., F]`` in the dtype of the inputs; values and gradients are computed in float32.

    Raises:
      ValueError: shapes or dtypes that differ, groups that do not divide F.
    """
    return _checked("silu", gate, up, residual)


def geglu(gate: jax.Array, up: jax.Array, *, approximate: bool = True, residual: Residual = "input") -> jax.Array:
    """Returns ``gelu(gate) * up``; ``approximate`` is the tanh form of GELU, the rest as in `swiglu`."""
    return _checked("gelu_tanh" if approximate else "gelu", gate, up, residual)


def _checked(activation: str, gate: jax.Array, up: jax.Array, residual: Residual) -> jax.Array:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must be alike")
    if residual != "input" and not isinstance(residual, Codec):
        raise ValueError(f"residual must be 'input' or a codec, got {residual!r}")
    return _gated(gate, up, activation, residual)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@functools.cache
def _product(activation: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def product(gate: jax.Array, up: jax.Array) -> jax.Array:
        return (_ACTIVATIONS[activation](wide(gate)) * wide(up)).astype(gate.dtype)

    return operation("glu", activation)(product)


@functools.cache
def _gradients(activation: str) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    def gradients(gate: jax.Array, up: jax.Array, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = jax.jvp(_ACTIVATIONS[activation], (wide(gate),), (jnp.ones_like(wide(gate)),))
        d_out = wide(d_out)
        return (d_out * wide(up) * slope).astype(gate.dtype), (d_out * value).astype(up.dtype)

    return operation("glu_gradients", activation)(gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated(gate: jax.Array, up: jax.Array, activation: str, residual: Residual) -> jax.Array:
    return _product(activation)(gate, up)


def _forward(gate: jax.Array, up: jax.Array, activation: str, residual: Residual) -> tuple[jax.Array, Any]:
    if residual == "input":
        return _gated(gate, up, activation, residual), (gate, up)
    form = kernel_form(residual, gate, kernels.unsupported) if activation == "silu" else None
    if form is not None:
        out, *made = kernels.swiglu_packed(once(gate), once(up), **form._asdict())
        return varying_like((gate, up), (out, tuple(made)))
    out = _gated(gate, up, activation, residual)
    return out, (residual.encode(once(gate), -1), residual.encode(once(up), -1))


def _backward(activation: str, residual: Residual, kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    if isinstance(kept[0], Codes):
        assert isinstance(residual, Codec)
        slopes = kernels.swiglu_backward(d_out, *kept, bits=residual.bits, group=group_of(residual, d_out))
        return varying_like((kept, d_out), slopes)
    gate, up = kept if residual == "input" else (kept[0].decode(), kept[1].decode())
    return _gradients(activation)(gate, up, d_out)


_gated.defvjp(_forward, _backward)


def _make(arguments: Any, codecs: Any, activation: str) -> Any:
    if activation != "silu" or None in codecs or codecs[0] != codecs[1]:
        return None
    form = kernel_form(codecs[0], arguments[0], kernels.unsupported)
    if form is None:
        return None
    out, *made = varying_like(arguments, kernels.swiglu_packed(*arguments, **form._asdict()))
    dtype = np.dtype(arguments[0].dtype)
    return out, [Packed((part.codes,), part.scale, part.offset, codecs[0], (-1,), dtype) for part in made]


def _read(arguments: Any, activation: str) -> Any:
    gate, up, *d_out = arguments
    if activation != "silu" or not (isinstance(gate, Packed) and isinstance(up, Packed)) or gate.codec != up.codec:
        return None
    like = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    form = kernel_form(gate.codec, like, kernels.unsupported) if gate.axes == up.axes == (-1,) else None
    if form is None:
        return None
    parts: Any = gate, up
    made = [Codes(part.planes[0], part.scale, part.offset) for part in parts]
    settings: dict[str, Any] = {"bits": form.bits, "group": form.group}
    run = kernels.swiglu_backward if d_out else functools.partial(kernels.swiglu_of_codes, dtype=gate.dtype)
    return varying_like(arguments, run(*d_out, *made, **settings))


codes_rules["glu"] = CodesRule(_make, _read)
codes_rules["glu_gradients"] = CodesRule(read=_read, results=2)
