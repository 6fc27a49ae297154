"""Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification (2025): its chunked prefill.

Frames come in units of timestamp tokens and visual tokens, and units in chunks. A visual token sees its chunk and some
before it, all text before it and all timestamps; timestamps and text see everything. All is causal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from memjax.attention import masks
from memjax.attention.attend import attend
from memjax.attention.expression import At, Leaf, Mask, as_integer
from pallas_kernels.flash_attention import merge


class VideoLayout(NamedTuple):
    """Which tokens of a prompt are what; numpy arrays.

    Attributes:
      chunks: int32 ``[T]``, the number of the chunk of visual tokens and timestamps, of text that of the nearest.
      text: int32 ``[T]``, 1 for text.
      times: int32 ``[n]``, the positions of timestamp tokens.
    """

    chunks: np.ndarray
    text: np.ndarray
    times: np.ndarray


def video_layout(before: int, units: int, after: int, *, time: int, visual: int, block_size: int = 4) -> VideoLayout:
    """Returns the layout of text, a video and text again.

    Args:
      before, after: tokens of text.
      units: of the video; the authors' have 4 frames.
      time, visual: timestamp and visual tokens of a unit, in this order.
      block_size: units of a chunk; the authors' scripts say 4 or 6.
    """
    for what, n in (("before", before), ("after", after), ("time", time)):
        as_integer("video_layout", what, n, 0)
    for what, n in (("units", units), ("visual", visual), ("block_size", block_size)):
        as_integer("video_layout", what, n, 1)
    unit = np.arange(units, dtype=np.int32).repeat(time + visual)
    chunks = np.pad(unit // block_size, (before, after), mode="edge")
    text = np.pad(np.zeros_like(unit), (before, after), constant_values=1)
    starts = before + (time + visual) * np.arange(units, dtype=np.int32)
    return VideoLayout(chunks, text, (starts[:, None] + np.arange(time, dtype=np.int32)).reshape(-1))


def video_xl_mask(layout: VideoLayout, previous: int = 3) -> Mask:
    """Returns the mask of the chunked prefill, of S = T tokens.

    Every block with a timestamp is visited by all: `video_xl_attention` is the faster.

    Args:
      layout: of `video_layout`.
      previous: chunks that are seen before the own; the authors' scripts say 3, 5 or 11.
    """
    opened = layout.text.copy()
    opened[layout.times] = 1
    return _near(layout.chunks, opened, previous)


def video_xl_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: VideoLayout, *, previous: int = 3, **options: Any
) -> jax.Array:
    """Returns attention under `video_xl_mask`, timestamps apart, so that chunks far away are skipped.

    Three attentions: over all keys but timestamps, over the timestamps, and of the timestamps' queries.

    Args:
      q: ``[B, S, H, D]``.
      k: ``[B, S, Hk, D]``.
      v: ``[B, S, Hk, Dv]``.
      layout: of `video_layout`, of S tokens.
      previous: as in `video_xl_mask`.
      **options: scale, softcap, blocks and implementation, as `attend` takes them.

    Returns:
      ``[B, S, H, Dv]`` in the dtype of ``q``.

    Raises:
      ValueError: a layout of another length, options of which parts of the attention cannot be merged.
    """
    if rest := options.keys() - {"scale", "softcap", "blocks", "implementation"}:
        raise ValueError(f"video_xl_attention takes scale, softcap, blocks and implementation, got {sorted(rest)}")
    S, times = q.shape[1], layout.times
    if k.shape[1] != S or len(layout.text) != S:
        raise ValueError(f"expected a layout and keys of {S} tokens, got {len(layout.text)} and {k.shape[1]}")
    near = _near(layout.chunks, layout.text, previous)
    if not len(times):
        return attend(q, k, v, mask=near, **options)
    timed = np.zeros(S, np.int32)
    timed[times] = 1
    out, _ = merge(
        attend(q, k, v, mask=near & masks.predicate(_not, k_data=[timed]), return_lse=True, **options),
        attend(q, k[:, times], v[:, times], mask=masks.predicate(_from, k_data=[times]), return_lse=True, **options),
    )
    seen = masks.predicate(_up_to, q_data=[times])
    return out.at[:, times].set(attend(q[:, times], k, v, mask=seen, **options).astype(out.dtype))


def _near(chunks: np.ndarray, opened: np.ndarray, previous: int) -> Mask:
    facts = chunks[None, None], opened[None, None]
    setting = as_integer("video_xl", "previous", previous, 0)
    return Leaf(_chunk_or_open, (setting,), rows=facts, columns=facts) & masks.causal()


def _chunk_or_open(at: At, previous: int) -> Any:
    (q_chunk, q_open), (k_chunk, k_open) = at.rows, at.columns
    return (q_open == 1) | (k_open == 1) | (k_chunk >= q_chunk - previous)


def _not(q: Any, k: Any, timed: Any) -> Any:
    return timed == 0


def _from(q: Any, k: Any, time: Any) -> Any:
    return time <= q


def _up_to(q: Any, k: Any, time: Any) -> Any:
    return k <= time
