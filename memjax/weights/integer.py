"""Integer products: packed weights times activations that are quantized on the fly, as in "FlexQ" (2025).

Weights of 6 bits and activations of 8 or 6 bits multiply as int8, which is exact: the int32 sum of every group is that
of the stored integers, and only scales are rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.codecs import Codec, Gguf, Grouped, error, int6
from memjax.codecs.packed import group_blocks
from memjax.core import jaxpr_compat
from memjax.core.paths import Patterns, leaf_paths, map_with_path, match, select
from memjax.core.views import is_view
from memjax.weights.decoded import linear, to_matrix
from memjax.weights.dense import cast_chain, dot_by
from memjax.weights.packed import PackedWeight
from memjax.weights.quantize import AxesTable, axes_of, check_table
from pallas_kernels._bits import unpack

_WIDE = ("**/down_proj/**", "**/fc2/**")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed"],
    meta_fields=["axes", "activation_bits", "activation_group"],
)
@dataclass(frozen=True)
class IntegerWeight(PackedWeight):
    """A packed weight whose forward product quantizes the input too and multiplies integers.

    The input is quantized per row and per ``activation_group`` consecutive inputs; every weight group is one int8
    product, summed in int32 and scaled in float32, one group at a time. The gradient is straight-through: that of the
    product with the decoded weight. Products with the transpose, lookups and convolutions decode the weight and leave
    the input as it is.

    Attributes:
      packed: symmetric codes; groups run along the input axes.
      axes: input and output axes.
      activation_bits: 2 to 8.
      activation_group: inputs that share a scale; a multiple of the weight's group.
    """

    activation_bits: int = 8
    activation_group: int = 128

    def dot(
        self,
        x: jax.Array,
        *,
        transpose: bool = False,
        casts: tuple[Any, ...] = (),
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        settings = {"precision": precision, "preferred_element_type": preferred_element_type}
        if transpose:
            return super().dot(x, transpose=True, casts=casts, **settings)
        self.check()

        def multiply(x: jax.Array, view: IntegerWeight) -> jax.Array:
            dense = cast_chain(view.materialize(), casts)
            return dot_by(lambda fn: fn(x, dense), view, transpose=False, **settings)

        dtype = preferred_element_type or jnp.promote_types(x.dtype, casts[-1] if casts else self.dtype)
        return linear(multiply, x, self, forward=lambda x, view: view._integer_dot(x).astype(dtype))

    def _integer_dot(self, x: jax.Array) -> jax.Array:
        shape, batch = self.shape, self.batch_ndim
        k = math.prod(shape[axis] for axis in self.axes.inputs)
        blocks = group_blocks(shape, self.packed.axes, self.packed.codec.group)
        rows = x.shape[batch : x.ndim - len(self.axes.inputs)]
        planes = tuple(to_matrix(jnp.asarray(plane), self.axes) for plane in self.packed.planes)
        scale = to_matrix(self.packed.codec.scales(self.packed.scale), self.axes)
        one: Callable[..., jax.Array] = functools.partial(
            _product,
            bits=self.activation_bits,
            group=self.activation_group,
            product=functools.partial(_int8_product, codec=self.packed.codec, block=blocks[-1]),
        )
        for _ in range(batch):
            one = jax.vmap(one)
        y = one(x.reshape(*shape[:batch], math.prod(rows), k), planes, scale)
        return y.reshape(*shape[:batch], *rows, *(shape[axis] for axis in self.axes.outputs))

    def check(self) -> None:
        """Raises a ValueError for codes or groups that integer products cannot take."""
        codec, shape = self.packed.codec, self.shape
        if not isinstance(codec, Grouped | Gguf) or not codec.symmetric:
            raise ValueError(f"integer products need symmetric integer codes, got {codec}")
        if self.packed.axes != self.axes.inputs:
            raise ValueError(f"groups along {self.packed.axes} do not run along the inputs {self.axes.inputs}")
        if not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits must be 2 to 8, got {self.activation_bits}")
        k = math.prod(shape[axis] for axis in self.axes.inputs)
        group = math.prod(group_blocks(shape, self.packed.axes, codec.group))
        if k % self.activation_group or self.activation_group % group or group >= 2**17:
            raise ValueError(
                f"activation groups of {self.activation_group} must divide the {k} inputs and be multiples of the "
                f"weight's groups of {group} (below {2**17})"
            )


def quantize_rows(x: jax.Array, bits: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes every group of every row symmetrically, to nearest.

    Args:
      x: floating ``[..., K]``.
      bits: 2 to 8.
      group: consecutive elements that share the scale ``max|x| / (2**(bits - 1) - 1)``, kept within 1e-5 and 1e4.

    Returns:
      int8 codes ``[..., K / group, group]`` and float32 scales ``[..., K / group]``.
    """
    top = 2 ** (bits - 1) - 1
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    scale = jnp.clip(jnp.max(jnp.abs(x), -1) / top, 1e-5, 1e4)
    return jnp.clip(jnp.round(x / scale[..., None]), -top, min(top + 1, 127)).astype(jnp.int8), scale


def sum_over_groups(
    product: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    x_scale: jax.Array,
    stored: Any,
    scale: jax.Array,
) -> jax.Array:
    """Returns the sum over groups of ``product(x, stored) * x_scale * scale``, one group alive at a time.

    Args:
      product: of a group's ``x [T, g]`` and its part of ``stored``; returns int32 ``[T, N]``.
      x: int8 ``[G, T, g]``.
      x_scale: float32 ``[G, T]``.
      stored: a pytree of leaves ``[G, ...]``.
      scale: float32 ``[G, N]``.

    Returns:
      float32 ``[T, N]``.
    """

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        x, x_scale, stored, scale = part
        return total + product(x, stored).astype(jnp.float32) * (x_scale[:, None] * scale), None

    parts = (x, x_scale, stored, scale)
    start = jaxpr_compat.vary_like(jnp.zeros((x.shape[1], scale.shape[1]), jnp.float32), jax.tree.leaves(parts))
    return lax.scan(add, start, parts)[0]


def _product(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    *,
    bits: int,
    group: int,
    product: Callable[[jax.Array, Any], jax.Array],
) -> jax.Array:
    """Multiplies ``x [T, K]`` by a weight whose planes ``[bytes, N]`` and scales ``[G, N]`` run along K."""
    groups, n = scale.shape
    codes, x_scale = quantize_rows(x, bits, group)
    codes = jnp.moveaxis(codes.reshape(x.shape[0], groups, -1), 1, 0)
    x_scale = jnp.repeat(x_scale, groups // x_scale.shape[1], axis=1).T
    return sum_over_groups(product, codes, x_scale, tuple(p.reshape(groups, -1, n) for p in planes), scale)


def _int8_product(x: jax.Array, planes: tuple[jax.Array, ...], *, codec: Codec, block: int) -> jax.Array:
    w = codec.values(unpack(planes, codec.bits, -2, block)).astype(jnp.int8)
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


class ActivationQuant(NamedTuple):
    """How the input of one weight is quantized: bits, inputs that share a scale, and the error that decided."""

    bits: int
    group: int
    error: float | None = None


def flexq(
    params: Any,
    where: Patterns = "**/kernel",
    *,
    wide: Patterns | None = None,
    inputs: Mapping[str, jax.Array] | None = None,
    tolerance: float | None = None,
    codec: Codec | None = None,
    group: int = 128,
    axes: AxesTable | None = None,
) -> dict[str, ActivationQuant]:
    """Plans which weights need inputs of 8 bits; the others take 6.

    Without a tolerance this is FlexQ's rule: the second matrix of a feed-forward block (``down_proj``, ``fc2``) gets 8.
    With one, a weight gets 8 where its error is larger: with ``inputs`` the relative error of its output with 6-bit
    weights and inputs, else the relative Frobenius error of its 6-bit codes.

    Args:
      params: tree of dense arrays or views.
      where: the weights to plan for.
      wide: pattern(s) of the weights that get 8 bits, in place of FlexQ's.
      inputs: path -> calibration inputs ``[*batch, T, *inputs]`` of every selected weight, for the measured rule.
      tolerance: largest error at which 6 bits are kept.
      codec: format of the weights; None for ``int6(group=group)``.
      group: inputs that share a scale.
      axes: pattern -> input and output axes, for weights that are not ``[*batch, in, out]``.

    Returns:
      Path -> `ActivationQuant`, for `integer_activations`.

    Raises:
      ValueError: a pattern that matches nothing, inputs without a tolerance or missing for a weight, ``wide`` together
        with a tolerance.
    """
    if tolerance is None and inputs is not None:
        raise ValueError("inputs were given without the tolerance that decides")
    if tolerance is not None and wide is not None:
        raise ValueError("expected either wide= or tolerance=, got both")
    chosen = set(select(params, where))
    check_table(params, axes)
    codec = int6(group) if codec is None else codec
    eights = set() if wide is None else set(select(params, wide))
    plan = {}
    for path, leaf in leaf_paths(params):
        if path not in chosen:
            continue
        if tolerance is None:
            eight = path in eights if wide is not None else any(match(pattern, path) for pattern in _WIDE)
            plan[path] = ActivationQuant(8 if eight else 6, group)
            continue
        dense = leaf.materialize() if is_view(leaf) else leaf
        leaf_axes = leaf.axes if is_view(leaf) else axes_of(path, leaf.shape, axes)
        packed = codec.encode(dense, leaf_axes.inputs)
        if inputs is None:
            found = error(jnp.asarray(dense), packed).relative_frobenius
        else:
            if path not in inputs:
                raise ValueError(f"{path}: no calibration inputs; inputs= has {sorted(inputs)}")
            found = _output_error(dense, IntegerWeight(packed, leaf_axes, 6, group), inputs[path])
        plan[path] = ActivationQuant(8 if float(found) > tolerance else 6, group, float(found))
    return plan


@jax.jit
def _output_error(dense: jax.Array, view: IntegerWeight, x: jax.Array) -> jax.Array:
    """Returns the relative error of the integer product of ``x [*batch, T, *inputs]`` against the dense one."""
    x, k = x.astype(jnp.float32), len(view.axes.inputs)
    w = to_matrix(dense.astype(jnp.float32), view.axes)
    exact = jnp.matmul(x.reshape(*x.shape[: x.ndim - k], -1), w, precision="highest")
    off = view.astype(jnp.float32).dot(x).reshape(exact.shape) - exact
    return jnp.linalg.norm(off.ravel()) / jnp.linalg.norm(exact.ravel())


def integer_activations(params: Any, plan: Mapping[str, ActivationQuant]) -> Any:
    """Returns ``params`` with integer products at the packed weights that ``plan`` names.

    Args:
      params: tree with packed weights at the paths of ``plan``.
      plan: path -> `ActivationQuant`, such as that of `flexq`.

    Raises:
      ValueError: a path that is no leaf, codes or groups that integer products cannot take.
      TypeError: a leaf that is not a packed weight.
    """
    missing = set(plan) - {path for path, _ in leaf_paths(params)}
    if missing:
        raise ValueError(f"the plan names {sorted(missing)}, which are no leaves of the params")

    def convert(path: str, leaf: Any) -> Any:
        if path not in plan:
            return leaf
        if not isinstance(leaf, PackedWeight):
            raise TypeError(f"{path}: expected a packed weight (quantize it first), got {type(leaf).__name__}")
        view = IntegerWeight(leaf.packed, leaf.axes, plan[path].bits, plan[path].group)
        try:
            view.check()
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
        return view

    return map_with_path(convert, params)
