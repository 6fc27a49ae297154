"""Adam-mini: one second moment per block of a leaf (a head, a neuron, a vector) instead of one per element.

Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More" (2025). Bytes: `adam_mini_state_bytes`, 4 per
parameter and a little, or 1 with the first moment in 8 bits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.core.paths import leaf_paths, lookup, map_with_path, match
from memjax.core.roles import check_trained
from memjax.optim.quantized_state import decode, encode, moment_bytes, state_format, zeros
from memjax.optim.routing import EMBEDDINGS_AND_HEADS, VECTORS

Block = str | int | tuple[int, ...]
"""``"neuron"`` (an output: the mean is over axis -2), ``"row"`` (over the last axis: a token's embedding, a norm's
scale), ``"element"`` (plain Adam), the number of heads that the last axis holds (a head: over axis -2 and within the
head), or the negative numbers of the axes to take the mean over."""


class AdamMiniState(NamedTuple):
    """Moments of every leaf.

    Attributes:
      count: steps taken, int32 ``[]``.
      mu: first moments, a tree like the parameters of float32 or `Packed`.
      nu: second moments of blocks, float32, the axes of the mean of size 1.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


class _View(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        kept = {axis % len(self.shape) for axis in self.axes} if self.shape else set()
        return tuple(1 if i in kept else size for i, size in enumerate(self.shape))


def _view(path: str, shape: tuple[int, ...], block: Block) -> _View:
    """Returns the shape as which a leaf is read and the axes of the mean."""
    ndim = len(shape)
    if block == "element" or (block == "row" and not ndim):
        return _View(shape, ())
    if isinstance(block, int) and not isinstance(block, bool):
        if ndim < 2 or block < 1 or shape[-1] % block:
            raise ValueError(f"{path}: {block} heads do not divide the last axis of a matrix of shape {shape}")
        return _View((*shape[:-1], block, shape[-1] // block), (-3, -1))
    axes = {"row": (-1,), "neuron": (-2,)}.get(block) if isinstance(block, str) else block
    if not isinstance(axes, tuple):
        raise ValueError(f"{path}: a block is 'neuron', 'row', 'element', a number of heads or axes, got {block!r}")
    if any(not -ndim <= axis < 0 for axis in axes):
        raise ValueError(f"{path}: {block!r} takes the mean over axes {axes}, which shape {shape} has not")
    return _View(shape, axes)


def _views(params: Any, rules: Mapping[str, Block] | None, default: Block | None) -> Any:
    unmatched = []

    def find(path: str, leaf: Any) -> _View:
        block = lookup(dict(rules or {}), path)
        if block is None and any(match(pattern, path) for pattern in ("**/bias", "bias")):
            block = "element"
        if block is None and (leaf.ndim < 2 or any(match(p, path) for p in (*VECTORS, EMBEDDINGS_AND_HEADS[0]))):
            block = "row"
        if block is None:
            block = "neuron" if default is None else default
            if default is None:
                unmatched.append(path)
        return _view(path, tuple(leaf.shape), block)

    found = map_with_path(find, params)
    if unmatched:
        warnings.warn(
            f"no rule says what the blocks of {', '.join(unmatched[:8])} are: one per output neuron is taken, which is "
            "wrong of queries and keys (one per head); give rules={pattern: block} or default='neuron'",
            stacklevel=4,
        )
    return found


def _is_view(x: Any) -> bool:
    return isinstance(x, _View)


def adam_mini_state_bytes(
    params: Any, rules: Mapping[str, Block] | None = None, default: Block | None = "neuron", bits: int | None = None
) -> int:
    """Returns the bytes of the state: 4, the first moments, and 4 for every block; arguments as in `adam_mini`."""
    views = jax.tree.leaves(_views(params, rules, default), is_leaf=_is_view)
    form = None if bits is None else state_format(bits)
    first = sum(
        4 * math.prod(leaf.shape) if form is None else moment_bytes(tuple(leaf.shape), form)
        for _, leaf in leaf_paths(params)
    )
    return 4 + first + sum(4 * math.prod(view.blocks) for view in views)


def scale_by_adam_mini(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rules: Mapping[str, Block] | None = None,
    default: Block | None = None,
    bits: int | None = None,
) -> optax.GradientTransformation:
    """Returns Adam's direction with one second moment per block.

    Args:
      b1, b2: decay of the moments, scalars.
      eps: added to the root of the second moment.
      rules: pattern of logical paths -> `Block`; the first that matches. Without one a bias has a second moment per
        element, other vectors and scales one per vector, and embeddings one per token.
      default: block of the matrices that no rule matches; None takes ``"neuron"`` and warns.
      bits: 8 or 4 to keep the first moments in (`quantized_state`); None keeps float32.

    Returns:
      A transform with `AdamMiniState`; ``init`` raises ValueError for blocks that a leaf cannot have.
    """
    form = None if bits is None else state_format(bits)

    def init(params: Any) -> AdamMiniState:
        check_trained(params, floats=False)
        views = _views(params, rules, default)
        if form is None:
            first = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        else:
            first = jax.tree.map(lambda p: zeros(p, form.signed, form), params)
        second = jax.tree.map(lambda view: jnp.zeros(view.blocks, jnp.float32), views, is_leaf=_is_view)
        return AdamMiniState(jnp.zeros((), jnp.int32), first, second)

    def update(updates: Any, state: AdamMiniState, params: Any = None) -> tuple[Any, AdamMiniState]:
        del params
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said by init
            views = _views(updates, rules, default)

        def step(view: _View, g: jax.Array, mu: Any, v: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
            slope = g.astype(jnp.float32)
            square = (slope * slope).reshape(view.shape)
            v = b2 * v + (1 - b2) * (jnp.mean(square, view.axes, keepdims=True) if view.axes else square)
            m = b1 * decode(mu, g.shape) + (1 - b1) * slope
            under = jnp.sqrt(v / (1 - b2**steps)) + eps
            found = ((m / (1 - b1**steps)).reshape(view.shape) / under).reshape(g.shape)
            return found.astype(g.dtype), encode(m, mu), v

        tree: Any = jax.tree.structure(updates)
        made = [step(*leaves) for leaves in zip(*(tree.flatten_up_to(t) for t in (views, updates, *state[1:])))]
        found, first, second = (jax.tree.unflatten(tree, [row[i] for row in made]) for i in range(3))
        return found, AdamMiniState(count, first, second)

    return optax.GradientTransformation(init, update)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    *,
    rules: Mapping[str, Block] | None = None,
    default: Block | None = None,
    bits: int | None = None,
) -> optax.GradientTransformation:
    """Returns Adam-mini; arguments as in `scale_by_adam_mini` and `optax.adamw`."""
    return optax.chain(
        scale_by_adam_mini(b1, b2, eps, rules=rules, default=default, bits=bits),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
