"""Moments of optimizers as blockwise codes, and any elementwise optax transform with its moments kept so.

A moment of a leaf is a `Packed` of the leaf's numbers, or float32 where the leaf is small. As many trailing axes of the
leaf as fill whole blocks become one, so that axes before them (stacked layers) stay in front, and codes of a leaf whose
last axis fills blocks are cut by a mesh as the leaf is. Few rows that do not fill blocks may be vectors of layers that
are updated apart: blocks are then the largest that fill rows, if of 64 elements or more.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022); Li et al., "Memory Efficient Optimizers
with 4-bit States" (2023).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.codecs.dynamic import dynamic, positive
from memjax.codecs.packed import Codec, Packed
from memjax.core.jaxpr_compat import Literal, trace
from memjax.core.paths import Patterns, match, path_name
from memjax.core.roles import check_trained
from pallas_kernels._bits import pack

LEAST = 4096
"""Elements below which a leaf's moments stay float32."""
BLOCKS = {8: 256, 4: 128}
"""Bits -> elements that share a scale."""
_LEAST_BLOCK, _MOST_LAYERS = 64, 256


class StateFormat(NamedTuple):
    """How moments are kept.

    Attributes:
      signed: codec of moments that have signs.
      unsigned: codec of second moments.
      least: elements below which a leaf's moments stay float32.
    """

    signed: Codec
    unsigned: Codec
    least: int = LEAST

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        assert isinstance(self.signed.group, int)
        return self.signed.group


def state_format(bits: int = 8, block: int | None = None, least: int = LEAST) -> StateFormat:
    """Returns the format of moments: dynamic codes; at 4 bits second moments have even levels without zero.

    Args:
      bits: 8 or 4.
      block: elements that share a scale; None takes 256 at 8 bits and 128 at 4.
      least: elements below which a leaf's moments stay float32.

    Raises:
      ValueError: other bits, or a block that is not positive and even.
    """
    if bits not in BLOCKS:
        raise ValueError(f"moments are kept in 8 or 4 bits, got {bits}")
    block = BLOCKS[bits] if block is None else block
    if block < 2 or block % 2:
        raise ValueError(f"expected an even number of elements in a block, got {block}")
    unsigned = dynamic(bits, block, signed=False) if bits == 8 else positive(bits, block)
    return StateFormat(dynamic(bits, block), unsigned, least)


def stored_shape(shape: tuple[int, ...], form: StateFormat) -> tuple[tuple[int, ...], int] | None:
    """Returns the shape as which a leaf's moments are encoded and their block, None where they stay float32."""
    size = math.prod(shape)
    if size < form.least:
        return None
    if len(shape) == 2 and shape[0] <= _MOST_LAYERS and shape[1] % form.block:
        fitting = (
            b for b in range(min(form.block, shape[1]), _LEAST_BLOCK - 1, -1) if shape[1] % b == 0 and b % 2 == 0
        )
        block = next(fitting, None)
        if block is not None:
            return shape, block
    if size % form.block:
        return None
    axis, part = len(shape), 1
    while part % form.block:
        axis -= 1
        part *= shape[axis]
    return (*shape[:axis], part), form.block


def moment_bytes(shape: tuple[int, ...], form: StateFormat) -> int:
    """Returns the bytes of one moment: ``size * bits / 8 + 4 * size / block``, or ``4 * size`` in float32."""
    size, found = math.prod(shape), stored_shape(shape, form)
    return 4 * size if found is None else size * form.signed.bits // 8 + 4 * (size // found[1])


def zeros(leaf: Any, codec: Codec, form: StateFormat) -> Any:
    """Returns the moment zero of a leaf: scales and codes of zero, or float32 zeros."""
    found = stored_shape(leaf.shape, form)
    if found is None:
        return jnp.zeros(leaf.shape, jnp.float32)
    shape, block = found
    codes = jnp.zeros((*shape[:-1], shape[-1] * codec.bits // 8), jnp.uint8)
    scale = jnp.zeros((*shape[:-1], shape[-1] // block), jnp.uint32)
    own: Any = codec
    return Packed((codes,), scale, None, dataclasses.replace(own, group=block), (-1,), jnp.dtype(jnp.float32))


def encode(moment: jax.Array, like: Any) -> Any:
    """Returns a moment as ``like`` keeps it.

    Args:
      moment: float32, of the leaf's shape.
      like: the moment before, `Packed` or float32.
    """
    if not isinstance(like, Packed):
        return moment
    codec = like.codec
    assert isinstance(codec.group, int)
    blocks = moment.reshape(*like.shape[:-1], -1, codec.group)
    codes, scale, offset = codec.quantize(blocks, (-1,), None)
    planes = pack(codes.reshape(like.shape), codec.bits, -1, codec.group)
    return Packed(planes, scale.squeeze(-1), None if offset is None else offset.squeeze(-1), codec, (-1,), like.dtype)


def decode(moment: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns the float32 moment of a leaf of this shape."""
    return moment.decode().reshape(shape) if isinstance(moment, Packed) else moment


def _constant(value: Any, leaf: Any, codec: Codec, form: StateFormat) -> Packed:
    """Returns the code of a moment that is ``value`` everywhere: that of one block, whose bytes are all alike."""
    whole = jax.eval_shape(lambda: zeros(leaf, codec, form))
    size = whole.codec.group
    planes, scale = (jnp.zeros(size * codec.bits // 8, jnp.uint8),), jnp.zeros(1, jnp.uint32)
    block = encode(jnp.full(size, value, jnp.float32), dataclasses.replace(whole, planes=planes, scale=scale))
    return jax.tree.map(lambda part, like: jnp.broadcast_to(part[0], like.shape), block, whole)


def is_moment(x: Any) -> bool:
    """Returns whether ``x`` is an encoded moment (use as ``is_leaf=`` in `jax.tree` functions)."""
    return isinstance(x, Packed)


def quantize_state(
    inner: optax.GradientTransformation,
    bits: int = 8,
    *,
    block: int | None = None,
    least: int = LEAST,
    unsigned: Patterns = ("**/{nu,v}", "**/{nu,v}/**"),
) -> optax.GradientTransformation:
    """Returns ``inner`` with the float32 arrays of its state kept as blockwise codes between steps.

    Right for transforms whose large float32 state are moments: elementwise, and none the worse for a relative error
    of a few percent. A step decodes them, so it takes room for float32 moments while it runs, which `apply_adam8bit`
    does not.

    Args:
      inner: the transform.
      bits: 8 or 4.
      block, least: as in `state_format`.
      unsigned: patterns (of paths within the state, such as ``nu/layers/kernel``) of second moments, never below zero.

    Returns:
      A transform whose state is that of ``inner`` with `Packed` for arrays of at least ``least`` elements.
    """
    form = state_format(bits, block, least)
    patterns = [unsigned] if isinstance(unsigned, str) else unsigned

    def is_unsigned(path: str, leaf: Any) -> bool:
        return patterns(path, leaf) if callable(patterns) else any(match(pattern, path) for pattern in patterns)

    def is_coded(leaf: Any) -> bool:
        return leaf.dtype == jnp.float32 and stored_shape(leaf.shape, form) is not None

    def init(params: Any) -> Any:
        check_trained(params, floats=False)
        program, state = trace(inner.init, params)
        filled = {
            eqn.outvars[0]: eqn.invars[0].val
            for eqn in program.eqns
            if eqn.primitive.name == "broadcast_in_dim" and isinstance(eqn.invars[0], Literal)
        }
        places = jax.tree_util.tree_leaves_with_path(state)
        # Zeros (and other constants) are never made in float32, only their codes are.
        values = [
            filled.get(out) if is_coded(leaf) and not isinstance(out, Literal) else None
            for out, (_, leaf) in zip(program.outvars, places)
        ]
        made = jax.jit(
            lambda params: [leaf for leaf, v in zip(jax.tree.leaves(inner.init(params)), values) if v is None]
        )
        rest = iter(made(params))

        def start(keys: Any, leaf: Any, value: Any) -> Any:
            codec = form.unsigned if is_unsigned(path_name(keys), leaf) else form.signed
            if value is not None:
                return _constant(value, leaf, codec, form)
            leaf = next(rest)
            return encode(leaf, zeros(leaf, codec, form)) if is_coded(leaf) else leaf

        coded = [start(keys, leaf, value) for (keys, leaf), value in zip(places, values)]
        return jax.tree.unflatten(jax.tree.structure(state), coded)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        shapes = jax.eval_shape(inner.init, updates if params is None else params)
        dense = jax.tree.map(lambda m, s: decode(m, s.shape), state, shapes, is_leaf=is_moment)
        found, dense = optax.with_extra_args_support(inner).update(updates, dense, params, **extra)
        return found, jax.tree.map(encode, dense, state)

    return optax.GradientTransformationExtraArgs(init, update)
