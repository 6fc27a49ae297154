"""A loss of a layered model on a mesh: every device works on its part of the batch, and of the weights.

Sources: Rajbhandari et al., "ZeRO", 2020, and Zhao et al., "PyTorch FSDP", 2023 (weights, gradients and optimizer state
split among data-parallel devices); Shoeybi et al., "Megatron-LM", 2019 (columns, then rows, then one sum).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.core.paths import Patterns, map_with_path
from memjax.core.views import Axes, WeightView, is_view
from memjax.optim import LossParts
from memjax.parallel.mesh import axis_size, batch_axes, batch_parts
from memjax.parallel.splits import COLUMNS, ROWS, chosen, specs
from memjax.weights import Dense
from memjax.weights.adapted import other_words
from memjax.weights.arranged import UnsupportedError
from memjax.weights.lift import lift


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where a batch lives, whose arrays all lead with the batch axis: split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh) or None))


def on_mesh(
    parts: LossParts | Sequence[Callable[..., Any]],
    mesh: Mesh,
    *,
    checkpoint: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    layers: str = "layers",
    columns: Patterns = COLUMNS,
    rows: Patterns = ROWS,
) -> Callable[[Any, Any], Any]:
    """Returns the sums that a model makes of a batch, as a function of params and batch, computed on a mesh.

    It is differentiable, jit-able, and gives every device the same sums. Params live where `shardings` says, and so do
    their gradients. Each part of the model is computed inside `jax.shard_map` on local arrays, by kernels where there
    are any. What travels, per step:

    - data: the gradients of all that is trained are summed once (an all-reduce), after the backward pass.
    - fsdp: a layer's split leaves are gathered, as they are stored (packed weights as codes and scales), just before
      the layer runs, and are not kept: backward gathers them again. The gradients of those that are trained come back
      summed and split (a reduce-scatter per layer); those of whole leaves are summed once. The leaves outside of the
      layers are gathered for ``embed`` and for ``head``, in forward and in backward.
    - model: two sums of ``[B, S, D]`` per layer in forward and two in backward, of this device's part of the batch.
      ``embed`` and ``head`` are computed by every device of the axis alike, from leaves that each holds whole.

    Args:
      parts: the model cut at its layers, as for `memjax.optim.fused_step`: its functions take weight views too. The
        result of ``head`` is a pytree of sums over the batch, such as (weighted losses, weights).
      mesh: with some of the axes data, fsdp and model, of `AxisType.Auto`.
      checkpoint: puts a policy around ``(x, (layer, batch, index)) -> x``, such as ``lambda f:
        memjax.remat.checkpoint(f, "full", params=(1,), prevent_cse=False)``. A layer is gathered inside of it; a policy
        within ``parts.block`` would not hold under fsdp, where all of a layer but what it gathers would be kept.
      layers, columns, rows: as in `specs`.

    Returns:
      ``sums(params, batch)``: params is a dict of arrays and views (an adapter is attached to it already; leaves
      called ``key`` are words for dropout and are made different for every part of the batch), batch a pytree of
      arrays ``[B, ...]``.

    Raises:
      ValueError: by the function, a batch that the mesh does not divide, or params that it cannot split.
    """
    parts = LossParts(*parts)
    names, count, by_model = batch_axes(mesh), batch_parts(mesh), axis_size(mesh, "model") > 1
    again = _again if axis_size(mesh, "fsdp") > 1 else _once

    def summing(layer: Any) -> Any:
        """Returns a layer whose rows are multiplied by as the whole weights would be."""

        def wrap(path: str, leaf: Any) -> Any:
            if not chosen(rows, f"{layers}/{path}", leaf):
                return leaf
            return _Summed(leaf if is_view(leaf) else Dense(leaf, Axes()))

        return map_with_path(wrap, layer) if by_model else layer

    def sums(params: Any, batch: Any) -> Any:
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] % count:
                raise ValueError(
                    f"a batch of {leaf.shape[0]} is not divisible among {count} devices, as {dict(mesh.shape)} asks"
                )
        split = specs(params, mesh, layers=layers, columns=columns, rows=rows)
        stack = jax.tree.map(_abstract, params[layers], is_leaf=is_view)

        def outer(tree: Any) -> Any:
            return {name: part for name, part in tree.items() if name != layers}

        outer_specs, stack_specs = outer(split), split[layers]

        def whole(params: Any) -> Any:
            return {**_gather(params, outer_specs, 0), layers: stack}

        def local(params: Any, batch: Any) -> Any:
            if names:  # parts of the batch drop different elements
                params = other_words(params, lax.axis_index(names))
            around = outer(params)
            x = again(lambda params: lift(parts.embed)(whole(params), batch))(around)

            def block(x: Any, rest: Any) -> Any:
                layer, batch, index = rest
                return lift(parts.block)(summing(_gather(layer, stack_specs, 1)), x, batch, index)

            kept = block if checkpoint is None else checkpoint(block)
            kept = again(block, prevent_cse=False) if kept is block else kept

            def body(x: Any, slices: Any) -> tuple[Any, None]:
                return kept(x, (slices[0], batch, slices[1])), None

            numbers = jnp.arange(len(jax.tree.leaves(params[layers])[0]), dtype=jnp.int32)
            x, _ = lax.scan(body, x, (params[layers], numbers))
            found = again(lambda params, x: lift(parts.head)(whole(params), x, batch))(around, x)
            return jax.tree.map(lambda leaf: lax.psum(leaf, names) if names else leaf, found)

        place = PartitionSpec(names or None)
        # Unchecked, a sum's transpose is a sum, which is what a summed product needs: its slope is in parts as it is.
        run = jax.shard_map(local, mesh=mesh, in_specs=(split, place), out_specs=PartitionSpec(), check_vma=False)
        return run(params, batch)

    return sums


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _gather(tree: Any, split: Any, gone: int) -> Any:
    """Returns the leaves that ``fsdp`` splits whole, when ``gone`` leading axes of what ``split`` says are gone."""

    def gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "fsdp" not in spec:
            return leaf
        return lax.all_gather(leaf, "fsdp", axis=tuple(spec).index("fsdp") - gone, tiled=True)

    return jax.tree.map(gather, tree, split)


def _once(fn: Callable[..., Any], prevent_cse: bool = True) -> Callable[..., Any]:
    return fn


def _again(fn: Callable[..., Any], prevent_cse: bool = True) -> Callable[..., Any]:
    """Returns ``fn``, for whose backward pass what it gathers is gathered again and all else is kept as ever."""
    return jax.checkpoint(fn, policy=lambda prim, *_, **__: prim.name != "all_gather", prevent_cse=prevent_cse)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=[])
@dataclass(frozen=True)
class _Summed(WeightView):
    """This device's inputs of a weight; a product is summed over the mesh axis ``model``."""

    part: WeightView

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        return self.part.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def dtype(self) -> Any:
        return self.part.dtype

    def dot(self, x: jax.Array, *, transpose: bool = False, **settings: Any) -> jax.Array:
        if transpose:
            return self.part.dot(x, transpose=True, **settings)
        return lax.psum(self.part.dot(x, **settings), "model")

    def take(self, indices: jax.Array, *, axis: int, casts: tuple[Any, ...] = ()) -> jax.Array:
        raise UnsupportedError("the mesh axis model splits its inputs: a device has no other rows to look up")

    def conv(self, x: jax.Array, *, permutation: Any, casts: tuple[Any, ...], params: dict[str, Any]) -> jax.Array:
        return lax.psum(self.part.conv(x, permutation=permutation, casts=casts, params=params), "model")

    def materialize(self) -> jax.Array:
        return self.part.materialize()

    def astype(self, dtype: Any) -> _Summed:
        return replace(self, part=self.part.astype(dtype))

    def specs(self, spec: tuple[Any, ...]) -> Any:
        return replace(self, part=self.part.specs(spec))
