"""Which masks cuDNN's attention can express exactly, and where it is taken without being asked for."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from memjax.attention.expression import Array, Join, Leaf, Mask
from memjax.attention.masks import _causal, _full, _lengths, _window

Implementation = Literal["mosaic_gpu", "cudnn", "xla", "reference"]

_CUDNN_WINS = frozenset({"full", "causal"})
"""Kinds of masks for which cuDNN may be the faster; it also expresses "window" and "lengths"."""

_KERNELS_WIN = frozenset({128})
"""Widths of heads at which kernels are the faster for these too: measured, `benchmarks.flash_attention`."""


class CudnnForm(NamedTuple):
    """A mask in the terms of `jax.nn.dot_product_attention`.

    Attributes:
      causal: whether a query sees keys up to its own position only.
      left: how many positions back it sees, None for all.
      q_lengths, k_lengths: int32 ``[B|1, 1, 1]``, how many queries and keys there are; None for all.
    """

    causal: bool = False
    left: int | None = None
    q_lengths: Array | None = None
    k_lengths: Array | None = None

    @property
    def kind(self) -> str:
        if self.q_lengths is not None or self.k_lengths is not None:
            return "lengths"
        return "window" if self.left is not None else "causal" if self.causal else "full"


def cudnn_form(mask: Mask, S: int, T: int) -> CudnnForm | None:
    """Returns a mask of S queries and T keys as cuDNN takes it, None where it cannot."""
    form = CudnnForm()
    for part in _conjuncts(mask):
        if not isinstance(part, Leaf) or (part.rule in (_causal, _window) and S != T):
            return None
        if part.rule is _causal and part.settings == (0,):
            form = form._replace(causal=True)
        elif part.rule is _window and part.settings[1] in (0, None):
            left, right = part.settings
            limits = [n for n in (form.left, left) if n is not None]
            form = form._replace(causal=form.causal or right == 0, left=min(limits, default=None))
        elif part.rule is _lengths and form.kind != "lengths" and all(x.shape[1] == 1 for x in part.rows):
            rows = iter(part.rows)
            q_lengths, k_lengths = (next(rows) if given else None for given in part.settings)
            form = form._replace(q_lengths=q_lengths, k_lengths=k_lengths)
        elif part.rule is not _full:
            return None
    if form.left is None:
        return form
    return form if form.left >= 0 and form.causal and form.kind == "window" else None  # else rows may have no keys


def cudnn_is_taken(form: CudnnForm, width: int, kernels_run: bool) -> bool:
    """Returns whether cuDNN is taken without being asked for.

    Args:
      form: of the mask.
      width: of heads.
      kernels_run: whether the attention kernels run on these arrays.
    """
    return form.kind in _CUDNN_WINS and not (kernels_run and width in _KERNELS_WIN)


def _conjuncts(mask: Mask) -> Iterator[Mask]:
    if isinstance(mask, Join) and mask.operation is operator.and_:
        yield from _conjuncts(mask.left)
        yield from _conjuncts(mask.right)
    else:
        yield mask


def cudnn_unsupported(q: jax.Array, k: jax.Array, v: jax.Array, form: CudnnForm | None, asked: list[str]) -> list[str]:
    """Returns every reason why cuDNN cannot run.

    Args:
      q, k, v: as `attend` takes them.
      form: of the mask.
      asked: names of arguments that were given and of which cuDNN has none.
    """
    reasons = [f"it has no {name}" for name in asked]
    device = jax.devices()[0]
    if device.platform != "gpu" or "nvidia" not in device.device_kind.lower():
        reasons.append(f"it needs an NVIDIA GPU, this is {device.device_kind}")
    if form is None and "block_mask" not in asked:
        reasons.append("it knows no such mask: full, causal and causal window with S = T, and lengths, joined by &")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        reasons.append(f"arrays of {q.dtype}, {k.dtype} and {v.dtype}; it takes bfloat16 or float16 alone")
    widest = 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > widest:
        reasons.append(f"heads of {q.shape[-1]} and {v.shape[-1]}; it takes equal multiples of 8 up to {widest}")
    return reasons


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, form: CudnnForm, scale: float, implementation: Any = "cudnn"
) -> jax.Array:
    """Returns attention by `jax.nn.dot_product_attention`, 0 in rows with no keys."""
    lengths = None
    if form.k_lengths is not None:  # with one key at least, so that nothing is divided by zero
        keys = jnp.clip(jnp.asarray(form.k_lengths).reshape(-1), 1, k.shape[1])
        lengths = jnp.broadcast_to(keys, q.shape[:1])
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=form.causal,
        key_value_seq_lengths=lengths,
        local_window_size=None if form.left is None else (form.left, 0),
        implementation=implementation,
    )
    seen: Any = True
    if form.q_lengths is not None:
        seen = jnp.arange(q.shape[1]) < form.q_lengths
    if form.k_lengths is not None:
        seen = seen & (form.k_lengths > 0)
    return out if seen is True else jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], out, 0)
