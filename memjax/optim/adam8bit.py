"""Adam, AdamW, Lion and SGD with momentum whose moments are kept in 8 or 4 bits.

A step decodes a leaf's moments to float32, updates them, moves the parameters by the new float32 moments, and encodes
them again. Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022); Li et al., "Memory
Efficient Optimizers with 4-bit States" (2023); Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023).

Bytes: `quantized_state.moment_bytes` per moment of a leaf (two for Adam, one for the others), and 4 for the count.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.codecs.fused import varying_like, whole_arrays
from memjax.codecs.packed import Packed
from memjax.core.roles import check_trained
from memjax.optim.quantized_state import LEAST, StateFormat, decode, encode, state_format, zeros
from memjax.optim.tables import leaf_words
from pallas_kernels.optim import adam8bit_step, adam8bit_unsupported, adam_scalars, round_stochastic
from pallas_kernels.packed_matmul import on_hopper

CHUNK = 2**23
"""Elements of an encoded leaf that `scale_by_adam8bit` and its kin take at a time where arrays are whole."""


class MomentState(NamedTuple):
    """Moments of every leaf.

    Attributes:
      count: steps taken, int32 ``[]``.
      mu: first moments, a tree like the parameters of `Packed` or float32.
      nu: second moments, the same; None where the method has none.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any = None


Rule = Callable[[jax.Array, jax.Array, tuple[jax.Array, ...]], tuple[jax.Array, tuple[jax.Array, ...]]]
"""(gradient float32, count, moments) -> (update before the learning rate, new moments), all of a leaf's shape."""


def adam_rule(b1: Any, b2: Any, eps: Any) -> Rule:
    """Returns Adam's rule."""

    def rule(g: jax.Array, count: jax.Array, moments: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        m, v = moments
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        steps = count.astype(jnp.float32)
        return (m / (1 - b1**steps)) / (jnp.sqrt(v / (1 - b2**steps)) + eps), (m, v)

    return rule


def lion_rule(b1: Any, b2: Any) -> Rule:
    """Returns Lion's rule."""

    def rule(g: jax.Array, count: jax.Array, moments: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        del count
        (m,) = moments
        return jnp.sign(b1 * m + (1 - b1) * g), (b2 * m + (1 - b2) * g,)

    return rule


def sgdm_rule(momentum: Any, nesterov: bool) -> Rule:
    """Returns the rule of SGD with (Nesterov) momentum."""

    def rule(g: jax.Array, count: jax.Array, moments: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        del count
        m = momentum * moments[0] + g
        return (momentum * m + g if nesterov else m), (m,)

    return rule


def _scale_by(rule: Rule, form: StateFormat, second: bool) -> optax.GradientTransformation:
    def init(params: Any) -> MomentState:
        check_trained(params, floats=False)
        first = jax.tree.map(lambda p: zeros(p, form.signed, form), params)
        return MomentState(
            jnp.zeros((), jnp.int32),
            first,
            jax.tree.map(lambda p: zeros(p, form.unsigned, form), params) if second else None,
        )

    def update(updates: Any, state: MomentState, params: Any = None) -> tuple[Any, MomentState]:
        del params
        count = optax.safe_increment(state.count)

        def move(first: Any, g: jax.Array, *stored: Any) -> tuple[Any, ...]:
            del first
            found, moments = rule(g.astype(jnp.float32), count, tuple(decode(m, g.shape) for m in stored))
            return found.astype(g.dtype), *map(encode, moments, stored)

        def step(index: int, g: jax.Array, *stored: Any) -> tuple[jax.Array, tuple[Any, ...]]:
            del index
            # What a mesh cuts is taken whole: pieces of it would be put together on every device.
            chunked = isinstance(stored[0], Packed) and whole_arrays()
            pieces = _pieces(g.size, stored[0], CHUNK) if chunked else 1
            found, *moments = move(0, g, *stored) if pieces == 1 else _in_pieces(move, pieces, (g, *stored))
            return found, tuple(moments)

        return _each_leaf(step, (updates,), state, count)

    return optax.GradientTransformation(init, update)


def _each_leaf(
    step: Callable[..., Any], trees: tuple[Any, ...], state: MomentState, count: jax.Array
) -> tuple[Any, MomentState]:
    """Calls ``step(index, *leaves, *moments)`` for one leaf after the other.

    Returns:
      The first results in the structure of the first tree, and the state of the second results.
    """
    tree: Any = jax.tree.structure(trees[0])
    kept = [moment for moment in (state.mu, state.nu) if moment is not None]
    firsts: list[Any] = []
    made: list[tuple[Any, ...]] = []
    for index, operands in enumerate(zip(*(tree.flatten_up_to(part) for part in (*trees, *kept)))):
        if firsts:  # float32 moments of two leaves need not exist together
            operands, firsts[-1] = lax.optimization_barrier((operands, firsts[-1]))
        first, moments = step(index, *operands)
        firsts.append(first)
        made.append(moments)
    columns = zip(*made) if made else [()] * len(kept)
    return jax.tree.unflatten(tree, firsts), MomentState(count, *(jax.tree.unflatten(tree, c) for c in columns))


def scale_by_adam8bit(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    bits: int = 8,
    block: int | None = None,
    least: int = LEAST,
) -> optax.GradientTransformation:
    """Returns Adam's direction from moments kept in 8 (or 4) bits.

    Args:
      b1, b2: decay of the moments, scalars.
      eps: added to the root of the second moment.
      bits: 8 or 4.
      block: elements that share a scale; None takes 256 at 8 bits and 128 at 4.
      least: elements below which a leaf's moments stay float32, as they do where blocks do not divide it.

    Returns:
      A transform with `MomentState`.
    """
    return _scale_by(adam_rule(b1, b2, eps), state_format(bits, block, least), second=True)


def scale_by_lion8bit(
    b1: Any = 0.9, b2: Any = 0.99, *, bits: int = 8, block: int | None = None, least: int = LEAST
) -> optax.GradientTransformation:
    """Returns Lion's direction from a moment kept in 8 (or 4) bits; other arguments as in `scale_by_adam8bit`.

    Args:
      b1: weight of the moment in the direction.
      b2: decay of the moment.
    """
    return _scale_by(lion_rule(b1, b2), state_format(bits, block, least), second=False)


def scale_by_sgdm8bit(
    momentum: Any = 0.9, *, nesterov: bool = False, bits: int = 8, block: int | None = None, least: int = LEAST
) -> optax.GradientTransformation:
    """Returns the direction of SGD with momentum kept in 8 (or 4) bits; other arguments as in `scale_by_adam8bit`.

    Args:
      momentum: decay of the sum of gradients.
      nesterov: look one step ahead.
    """
    return _scale_by(sgdm_rule(momentum, nesterov), state_format(bits, block, least), second=False)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    **storage: Any,
) -> optax.GradientTransformation:
    """Returns AdamW with 8-bit moments.

    Args:
      learning_rate: scalar or schedule.
      b1, b2, eps: as in `scale_by_adam8bit`, which also takes ``storage``.
      weight_decay, mask: as in `optax.adamw`.
      storage: ``bits``, ``block``, ``least``.
    """
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps, **storage),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam8bit(
    learning_rate: optax.ScalarOrSchedule, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, **storage: Any
) -> optax.GradientTransformation:
    """Returns Adam with 8-bit moments; arguments as in `adamw8bit`."""
    return optax.chain(scale_by_adam8bit(b1, b2, eps, **storage), optax.scale_by_learning_rate(learning_rate))


adam4bit = functools.partial(adam8bit, bits=4)
"""`adam8bit` with 4-bit moments."""
adamw4bit = functools.partial(adamw8bit, bits=4)
"""`adamw8bit` with 4-bit moments."""


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 1e-3,
    mask: Any = None,
    **storage: Any,
) -> optax.GradientTransformation:
    """Returns Lion with an 8-bit moment; arguments as in `optax.lion` and `adamw8bit`."""
    return optax.chain(
        scale_by_lion8bit(b1, b2, **storage),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgdm8bit(
    learning_rate: optax.ScalarOrSchedule, momentum: Any = 0.9, *, nesterov: bool = False, **storage: Any
) -> optax.GradientTransformation:
    """Returns SGD with 8-bit momentum; arguments as in `optax.sgd` and `adamw8bit`."""
    return optax.chain(
        scale_by_sgdm8bit(momentum, nesterov=nesterov, **storage), optax.scale_by_learning_rate(learning_rate)
    )


class Applied(NamedTuple):
    """How parameters are moved; the same for every method.

    Attributes:
      weight_decay: times the parameter, added to the direction.
      mask: tree of bools (a prefix of the parameters) or a function of them: which are decayed; None is all.
      seed: of the stochastic rounding of bfloat16 parameters, as `memjax.core.random_bits` takes it; the step and the
        leaf enter the noise. None rounds to nearest.
      chunk: elements of an encoded leaf that are updated at a time, so that no float32 moments of a whole leaf exist;
        None takes leaves whole, as what a mesh cuts must be.
      implementation: ``"mosaic_gpu"`` (Hopper, Adam with 8 bits), ``"xla"``, or None for the kernel where it can run.
    """

    weight_decay: Any = 0.0
    mask: Any = None
    seed: Any = None
    chunk: int | None = None
    implementation: str | None = None


def _apply(
    rule: Rule,
    params: Any,
    grads: Any,
    state: MomentState,
    learning_rate: Any,
    how: Applied,
    kernel: Callable[..., Any] | None = None,
) -> tuple[Any, MomentState]:
    count = optax.safe_increment(state.count)
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    mask = how.mask(params) if callable(how.mask) else how.mask
    if mask is None:
        decays = jax.tree.map(lambda _: how.weight_decay, params)
    else:
        decays = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: how.weight_decay if m else 0.0, sub), mask, params)
    seed = how.seed

    def step(index: int, p: jax.Array, g: jax.Array, decay: Any, *stored: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        words = leaf_words(seed, index, count) if seed is not None and p.dtype == jnp.bfloat16 else None

        def move(first: Any, p: jax.Array, g: jax.Array, *stored: Any) -> tuple[Any, ...]:
            found, moments = rule(g.astype(jnp.float32), count, tuple(decode(m, g.shape) for m in stored))
            dense = p.astype(jnp.float32)
            dense = dense + -rate * (found + decay * dense)
            new = dense.astype(p.dtype) if words is None else round_stochastic(dense, words, first)
            return new, *map(encode, moments, stored)

        if kernel is not None and all(isinstance(m, Packed) for m in stored):
            made = kernel(p, g, decay, rate, count, words, *stored)
            if made is not None:
                return made
        pieces = 1 if how.chunk is None or not isinstance(stored[0], Packed) else _pieces(p.size, stored[0], how.chunk)
        if pieces == 1:
            new, *moments = move(0, p, g, *stored)
        else:
            slopes = g.reshape(pieces, -1)

            def with_slopes(first: Any, p: jax.Array, *stored: Any) -> tuple[Any, ...]:
                return move(first, p, slopes[first // slopes.shape[1]], *stored)

            new, *moments = _in_pieces(with_slopes, pieces, (p, *stored))
        return new, tuple(moments)

    return _each_leaf(step, (params, grads, decays), state, count)


def _pieces(size: int, moment: Packed, chunk: int) -> int:
    """Returns into how many equal parts of whole blocks, of ``chunk`` elements if that can be, a leaf is cut."""
    assert isinstance(moment.codec.group, int)
    blocks = size // moment.codec.group
    return next(n for n in range(min(-(-size // chunk), blocks), blocks + 1) if blocks % n == 0)


def _in_pieces(move: Callable[..., Any], pieces: int, leaf: tuple[Any, ...]) -> list[Any]:
    """Returns what ``move(first element, *parts)`` makes of a leaf piece by piece, in the place of what was there."""
    cut = jax.tree.map(lambda part: part.reshape(pieces, -1), leaf)
    size = cut[0].shape[1]

    def body(i: Any, cut: Any) -> Any:
        made = tuple(move(i * size, *jax.tree.map(lambda part: part[i], cut)))
        return jax.tree.map(lambda part, new: lax.dynamic_update_index_in_dim(part, new, i, 0), cut, made)

    cut = lax.fori_loop(0, pieces, body, cut)
    return list(jax.tree.map(lambda part, like: part.reshape(like.shape), cut, leaf))


_step_by_kernel: Callable[..., tuple[jax.Array, ...]] = functools.partial(adam8bit_step, implementation="mosaic_gpu")


def apply_adam8bit(
    params: Any,
    grads: Any,
    state: MomentState,
    learning_rate: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    **how: Any,
) -> tuple[Any, MomentState]:
    """Moves parameters by a step of Adam (AdamW with a ``weight_decay``) whose moments are kept in 8 or 4 bits.

    On a Hopper GPU a kernel passes over memory once per leaf of 8-bit moments and no float32 moment is ever in memory;
    donate parameters and state, which it changes in place.

    Args:
      params: tree of arrays.
      grads: tree of the gradients.
      state: of `scale_by_adam8bit`; its formats are those that the moments have.
      learning_rate: scalar, or a schedule of the count.
      b1, b2, eps: as in `scale_by_adam8bit`.
      how: the fields of `Applied`.

    Returns:
      The new parameters and state.

    Raises:
      ValueError: ``implementation="mosaic_gpu"`` where the kernel cannot take a leaf of encoded moments.
    """
    options = Applied(**how)
    if options.implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation must be 'mosaic_gpu', 'xla' or None, got {options.implementation!r}")

    def kernel(p: jax.Array, g: jax.Array, decay: Any, rate: Any, count: jax.Array, words: Any, m: Any, v: Any) -> Any:
        block = m.codec.group if m.codec.bits == 8 else None
        reason = adam8bit_unsupported(p.size, block, p.dtype, g.dtype)
        if options.implementation is None and (reason or not on_hopper() or not whole_arrays()):
            return None
        steps = count.astype(jnp.float32)
        scalars = adam_scalars(rate, b1, b2, eps, steps, decay)
        flat = [part.reshape(-1) for part in (p, g, m.planes[0], m.scale, v.planes[0], v.scale)]
        made = varying_like(flat, _step_by_kernel(*flat, scalars=scalars, words=words))
        parts = [part.reshape(like.shape) for part, like in zip(made, (p, m.planes[0], m.scale, v.planes[0], v.scale))]
        new, m_codes, m_scale, v_codes, v_scale = parts
        return new, (
            dataclasses.replace(m, planes=(m_codes,), scale=m_scale),
            dataclasses.replace(v, planes=(v_codes,), scale=v_scale),
        )

    uses = None if options.implementation == "xla" else kernel
    return _apply(adam_rule(b1, b2, eps), params, grads, state, learning_rate, options, uses)


def apply_lion8bit(
    params: Any, grads: Any, state: MomentState, learning_rate: Any, *, b1: Any = 0.9, b2: Any = 0.99, **how: Any
) -> tuple[Any, MomentState]:
    """Moves parameters by a step of Lion with the state of `scale_by_lion8bit`; the rest as in `apply_adam8bit`."""
    return _apply(lion_rule(b1, b2), params, grads, state, learning_rate, _by_xla(how))


def apply_sgdm8bit(
    params: Any,
    grads: Any,
    state: MomentState,
    learning_rate: Any,
    *,
    momentum: Any = 0.9,
    nesterov: bool = False,
    **how: Any,
) -> tuple[Any, MomentState]:
    """Moves parameters by a step of SGD with the state of `scale_by_sgdm8bit`; the rest as in `apply_adam8bit`."""
    return _apply(sgdm_rule(momentum, nesterov), params, grads, state, learning_rate, _by_xla(how))


def _by_xla(how: dict[str, Any]) -> Applied:
    options = Applied(**how)
    if options.implementation not in (None, "xla"):
        raise ValueError(f"only Adam has a kernel: implementation 'xla' or None, got {options.implementation!r}")
    return options
