"""Scale-DiT: Ultra-High-Resolution Image Generation with Hierarchical Local Attention (2025).

Tokens of a large image see their window, a small image and the text; text and the small image see each other alone.
What the abstract does not say is this module's: rules between text and large image, sides of windows, and that anchors
lie half a pixel off, at the middle of what they stand for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memjax.attention.expression import At, Leaf, Mask, as_integer


def hilbert_order(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of a grid's cells along a Hilbert curve, and its inverse.

    The curve is that of the least square of a power of two around the grid, less what is outside. In it each aligned
    square of a power of two is one run, and where the grid is such a square, neighbours in the order are neighbours.

    Args:
      h, w: rows and columns.

    Returns:
      int32 ``[h * w]``: raster numbers in the order of the curve (``x[order]`` is along it), and int32 ``[h * w]``: the
      place of each raster number (``y[inverse]`` is in raster order again).
    """
    h, w = (as_integer("hilbert_order", "a side", n, 1) for n in (h, w))
    side = 1 << (max(h, w) - 1).bit_length()
    rest = np.arange(side * side, dtype=np.int64)
    x = y = np.zeros_like(rest)
    size = 1
    while size < side:
        right, down = (rest >> 1) & 1, ((rest >> 1) ^ rest) & 1
        flip = (down == 0) & (right == 1)
        x, y = np.where(flip, size - 1 - x, x), np.where(flip, size - 1 - y, y)
        x, y = np.where(down == 0, y, x), np.where(down == 0, x, y)
        x, y = x + size * right, y + size * down
        rest, size = rest >> 2, 2 * size
    order = (y * w + x)[(y < h) & (x < w)].astype(np.int32)
    return order, np.argsort(order).astype(np.int32)


def scale_dit_mask(context: int, window: int) -> Mask:
    """Returns the mask of tokens [text, small image, large image], the large image in Hilbert order.

    With ``context`` and ``window`` multiples of the blocks of `attend` every block is full or empty.

    Args:
      context: how many tokens text and small image are; 0 for none.
      window: tokens of a window of the large image: the square of a power of two.
    """
    as_integer("scale_dit_mask", "context", context, 0)
    return Leaf(_scale_dit, (context, as_integer("scale_dit_mask", "window", window, 1)))


def _scale_dit(at: At, context: int, window: int) -> Any:
    return (at.k < context) | ((at.q - context) // window == (at.k - context) // window)


def anchor_positions(h_low: int, w_low: int, h: int, w: int) -> np.ndarray:
    """Returns where the tokens of a small image lie among those of a large one: ``(i + 0.5) * s - 0.5``, s their ratio.

    Returns:
      float32 ``[h_low * w_low, 2]``, row and column, in raster order.
    """
    rows, columns = ((np.arange(n) + 0.5) * (big / n) - 0.5 for n, big in ((h_low, h), (w_low, w)))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
