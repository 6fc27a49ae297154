"""FRUGAL: Adam on a part of the gradient that changes, sign descent on the rest.

Source: FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training, 2025.

Every matrix of density d keeps moments for a share d of its coordinates; the others step by the sign of their gradient
(or by SGD), so that no part of the gradient is dropped. Every ``update_gap`` steps another part is chosen. What is no
matrix, the embedding and the output head keep all their moments.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from memjax.codecs.fused import varying_like, whole_arrays
from memjax.core.paths import leaf_paths, lookup
from memjax.core.views import Axes
from memjax.optim import routing, splits, tables
from memjax.optim.adam8bit import scale_by_adam8bit
from memjax.optim.bf16 import apply_updates_stochastic
from memjax.optim.matrices import MatrixSpec, as_matrices, from_matrices, matrix_shape, matrix_spec
from memjax.optim.quantized_state import quantize_state
from memjax.optim.sharding import sliced
from memjax.optim.splits import Blocks, Columns, Orthogonal, RandK, Split
from pallas_kernels.optim import adam_scalars
from pallas_kernels.optim.api import frugal_adam_step, frugal_unsupported
from pallas_kernels.optim.reference import Scalars
from pallas_kernels.packed_matmul import on_hopper

SplitName = Literal["columns", "blockwise", "randk", "svd", "eigh", "subspace_iteration", "random"]
StateFree = Literal["sign", "sgd", "none"]
OnSwitch = Literal["reset", "project", "keep"]
frugal_static = (
    "density", "mask", "split", "axis", "group", "shards", "block_order", "state_free", "inner", "state_bits",
    "on_switch", "stagger", "rules", "axes",
)  # fmt: skip
"""Arguments of `frugal` that decide shapes or structure, for `optax.inject_hyperparams`."""


@sliced("moments")
class FrugalState(NamedTuple):
    """State of `scale_by_frugal`; a unit is a leaf, or for blocks the first leaf of those with matrices of one size.

    Attributes:
      count: int32 scalar, optimizer steps done.
      tables: at every unit what its split draws at a switch, for columns int32 ``[B, strata, groups]``.
      moments: at every unit the state of the inner transform for the selected ``[B, k, n]`` (or ``[B, m, k]``).
      full: the state of the inner transform for the leaves that are kept whole.
    """

    count: jax.Array  # type: ignore[assignment]
    tables: Any
    moments: Any
    full: Any


@dataclasses.dataclass(frozen=True)
class Unit:
    """What shares a table and moments.

    Attributes:
      number: of the unit in the tree.
      leaves: numbers of its leaves.
      specs: how they are read as matrices.
      split: which of their coordinates have state; None: none.
    """

    number: int
    leaves: tuple[int, ...]
    specs: tuple[MatrixSpec, ...]
    split: Split | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of `scale_by_frugal` that decide shapes."""

    density: float | Mapping[str, float]
    split: SplitName
    axis: Literal["input", "output"] | None
    group: int | None
    shards: int
    block_order: splits.BlockOrder
    rules: Mapping[str, routing.Label] | None
    axes: Mapping[str, Axes] | None

    def __post_init__(self) -> None:
        if self.split not in get_args(SplitName):
            raise ValueError(f"split must be one of {', '.join(get_args(SplitName))}, got {self.split!r}")
        if self.block_order not in get_args(splits.BlockOrder):
            raise ValueError(f"block_order must be one of {', '.join(get_args(splits.BlockOrder))}")
        if self.axis not in (None, "input", "output"):
            raise ValueError(f"axis must be 'input' or 'output', got {self.axis!r}")
        if self.split != "columns" and (self.axis, self.group, self.shards) != (None, None, 1):
            raise ValueError(f"axis, group and shards are settings of split='columns', not of {self.split!r}")
        if self.split != "blockwise" and self.block_order != "random":
            raise ValueError(f"block_order is a setting of split='blockwise', not of {self.split!r}")
        for density in self.density.values() if isinstance(self.density, Mapping) else [self.density]:
            routing.check_density(density)

    def plan(self, tree: Any) -> tuple[list[Unit], set[int]]:
        """Returns the units of ``tree``, and the numbers of the leaves that are kept whole."""
        single = None if isinstance(self.density, Mapping) else self.density
        labels = jax.tree.leaves(routing.label(tree, self.rules, density=single))
        leaves = leaf_paths(tree)
        whole = {i for i, name in enumerate(labels) if name == "full"}
        routed = [i for i in range(len(leaves)) if i not in whole]
        densities = {i: self._density(leaves[i][0]) for i in routed}
        specs = {i: matrix_spec(leaves[i][1], lookup(dict(self.axes or {}), leaves[i][0])) for i in routed}
        shapes = {i: matrix_shape(tuple(leaves[i][1].shape), specs[i]) for i in routed}
        whole |= {i for i in routed if densities[i] == 1}
        routed = [i for i in routed if i not in whole]
        if self.split == "blockwise":
            chosen = self._blocks(routed, densities, shapes)
        else:
            chosen = [((i,), self._split(leaves[i][0], shapes[i], densities[i])) for i in routed]
        units = [
            Unit(number, members, tuple(specs[i] for i in members), split)
            for number, (members, split) in enumerate(chosen)
        ]
        return units, whole

    def _density(self, path: str) -> float:
        if not isinstance(self.density, Mapping):
            return self.density
        found = lookup(dict(self.density), path)
        if found is None:
            raise ValueError(f"{path}: no pattern of density matches it ({list(self.density)}); add '**' for the rest")
        return found

    def _split(self, path: str, shape: tuple[int, int, int], density: float) -> Split | None:
        if density == 0:
            return None
        if self.split == "randk":
            return RandK(shape, tables.kept_count(shape[2], density))
        if self.split != "columns":
            assert self.split != "blockwise"
            return Orthogonal(shape, max(1, round(min(shape[1:]) * density)), self.split)
        axis = -1 if self.axis == "output" else -2
        size = shape[axis] // self.shards
        group = (math.gcd(size, 32) if axis == -1 else 1) if self.group is None else self.group
        if shape[axis] % (self.shards * group):
            raise ValueError(
                f"{path}: {self.shards} shards of groups of {group} do not divide its {shape[axis]} "
                f"{'inputs' if axis == -2 else 'outputs'}"
            )
        return Columns(shape, axis, group, self.shards, tables.kept_count(size // group, density))

    def _blocks(
        self, routed: list[int], densities: dict[int, float], shapes: dict[int, tuple[int, int, int]]
    ) -> list[tuple[tuple[int, ...], Split | None]]:
        found: list[tuple[tuple[int, ...], Split | None]] = []
        for density in dict.fromkeys(densities[i] for i in routed):
            sizes: dict[tuple[int, int], list[int]] = {}
            for i in routed:
                if densities[i] == density:
                    sizes.setdefault(shapes[i][1:], []).append(i)
            counts = [tuple(shapes[i][0] for i in members) for members in sizes.values()]
            quotas = splits.block_quotas([sum(count) for count in counts], density)
            for (size, members), count, kept in zip(sizes.items(), counts, quotas):
                found.append((tuple(members), Blocks(count, size, kept, self.block_order) if kept else None))
        return found


def _switching(inner: optax.GradientTransformation, on_switch: OnSwitch) -> optax.GradientTransformationExtraArgs:
    """Returns ``inner`` on selected coordinates: its state is reset or carried over where the selection changes."""
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, *, due: Any, transport: splits.Transport, **extra: Any
    ) -> Any:
        if on_switch == "reset":
            fresh = inner.init(jnp.zeros_like(updates))
            state = jax.tree.map(lambda start, now: jnp.where(due, start, now), fresh, state)
        elif on_switch == "project":

            def carry(keys: Any, leaf: jax.Array) -> jax.Array:
                if leaf.shape != updates.shape:
                    return leaf
                squared = any(getattr(key, "name", None) in ("nu", "v") for key in keys)
                return jnp.where(due, transport(leaf, squared), leaf)

            state = jax.tree_util.tree_map_with_path(carry, state)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _state_free(kind: StateFree, scale: Any) -> Callable[[jax.Array], jax.Array]:
    if kind == "none":
        return jnp.zeros_like
    return lambda g: scale * (jnp.sign(g) if kind == "sign" else g)


def scale_by_frugal(
    density: float | Mapping[str, float] = 0.25,
    *,
    update_gap: int = 200,
    split: SplitName = "columns",
    axis: Literal["input", "output"] | None = None,
    group: int | None = None,
    shards: int = 1,
    block_order: splits.BlockOrder = "random",
    state_free: StateFree = "sign",
    state_free_scale: float = 1.0,
    inner: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    state_bits: Literal[32, 8, 4] = 32,
    on_switch: OnSwitch = "reset",
    stagger: bool = False,
    subspace_scale: float = 1.0,
    seed: int = 0,
    rules: Mapping[str, routing.Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """Scales gradients by FRUGAL: part of each matrix by the inner transform, the rest of it by sign.

    Leaves that are no matrices are scaled by the inner transform whole. Moments are float32 whatever the parameters
    are. A leaf of density 1 is kept whole too, with nothing to switch; one of density 0 has no state.

    Args:
      density: share of the coordinates of matrices that have state, in [0, 1]; or pattern -> share, of which the first
        that matches a leaf's path holds.
      update_gap: steps from one switch to the next.
      split: what has state: ``"columns"``, or rows, of every matrix; ``"blockwise"``, whole matrices in turn (of a
        stack, its slices), each size of matrix with its share; ``"randk"``, as many entries of every row; or a subspace
        of the shorter side: ``"svd"``, of the leading singular vectors of the gradient, the same by ``"eigh"``, nearly
        so by ``"subspace_iteration"`` (see `low_rank.find_subspace`), or ``"random"``.
      axis: of columns: ``"input"`` (default) or ``"output"``. Choose one that is not sharded.
      group: columns: adjacent ones that are chosen together; default 1 for inputs, which lie in rows, and 32 (or what
        divides) for outputs.
      shards: columns: of a sharded axis, the number of shards, each of which then keeps its share of its own.
      block_order: blockwise: ``"random"`` (each once in a pass), ``"ascending"``, ``"descending"`` or ``"mirror"``.
      state_free: update of what has no state: ``"sign"`` of the gradient, ``"sgd"`` the gradient, ``"none"``.
      state_free_scale: factor of that update.
      inner: any optax transform that needs no parameters to start; default Adam with ``b1``, ``b2``, ``eps``.
      b1, b2, eps: of Adam, where ``inner`` is None.
      state_bits: 32, or 8 or 4 for moments as blockwise codes, see `quantize_state`.
      on_switch: ``"reset"`` starts the inner transform anew, ``"project"`` keeps the moments of what stays selected and
        carries others over into the new basis, ``"keep"`` leaves moments where they are, as GaLore does.
      stagger: switch leaves (for blocks, sizes) one after the other, spread over the gap, instead of all at once.
      subspace_scale: factor of the update of leaves that are split.
      seed: of what is chosen.
      rules: pattern -> ``"subspace"`` or ``"full"``, before the default of `label`.
      axes: pattern -> `Axes` of leaves that are not ``[*batch, inputs, outputs]``.

    Returns:
      A transformation with `FrugalState`: float32 bytes ``8 * (selected + whole) + 4 * table entries`` with Adam, and
      4 for every counter. Its update takes slices of stacks too, with the number of the first as extra argument
      ``layer`` (as `fused_step` gives it; not with blocks, which span layers).

    Raises:
      ValueError: settings out of range or that the split does not have; by ``init``, what `label` refuses, groups that
        do not divide a leaf.
      TypeError: by ``init``, a weight view among the parameters.
    """
    settings = Settings(density, split, axis, group, shards, block_order, rules, axes)
    for name, value, known in (("state_free", state_free, StateFree), ("on_switch", on_switch, OnSwitch)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    if isinstance(update_gap, int) and update_gap < 1:
        raise ValueError(f"update_gap must be at least 1, got {update_gap}")
    base = optax.scale_by_adam(b1, b2, eps) if inner is None else inner
    whole_inner = optax.with_extra_args_support(base)
    selected_inner = _switching(base, on_switch)
    if state_bits != 32:
        selected_inner = quantize_state(selected_inner, state_bits)
        if inner is None:  # which goes through large leaves piece by piece
            whole_inner = optax.with_extra_args_support(scale_by_adam8bit(b1, b2, eps, bits=state_bits))
        else:
            whole_inner = quantize_state(whole_inner, state_bits)
    whole_dtype = None if state_bits != 32 and inner is None else jnp.float32
    free = _state_free(state_free, state_free_scale)

    def keep_whole(tree: Any, whole: set[int]) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        kept = [
            (leaf if whole_dtype is None else leaf.astype(whole_dtype)) if i in whole else optax.MaskedNode()
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, kept)

    def init(params: Any) -> FrugalState:
        units, whole = settings.plan(params)
        treedef: Any = jax.tree.structure(params)
        first_tables, moments = ([optax.MaskedNode()] * treedef.num_leaves for _ in range(2))
        for unit in units:
            if unit.split is not None:
                first_tables[unit.leaves[0]] = unit.split.init()
                moments[unit.leaves[0]] = selected_inner.init(jnp.zeros(unit.split.selected_shape, jnp.float32))
        full = whole_inner.init(keep_whole(params, whole))
        return FrugalState(jnp.zeros((), jnp.int32), treedef.unflatten(first_tables), treedef.unflatten(moments), full)

    def update(
        updates: Any, state: FrugalState, params: Any = None, *, layer: Any = 0, **extra: Any
    ) -> tuple[Any, FrugalState]:
        units, whole = settings.plan(updates)
        treedef: Any = jax.tree.structure(updates)
        gradients = treedef.flatten_up_to(updates)
        weights = None if params is None else treedef.flatten_up_to(params)
        new_tables, moments = treedef.flatten_up_to(state.tables), treedef.flatten_up_to(state.moments)
        out: list[Any] = list(gradients)

        beside = None if params is None else keep_whole(params, whole)
        scaled, full = whole_inner.update(keep_whole(updates, whole), state.full, beside, **extra)
        for i, leaf in enumerate(treedef.flatten_up_to(scaled)):
            if i in whole:
                out[i] = leaf.astype(gradients[i].dtype)

        def update_selected(unit: Unit, split: Split, parts: list[jax.Array]) -> list[jax.Array]:
            place = unit.leaves[0]
            offset = tables.stagger_offset(unit.number, len(units), update_gap) if stagger else 0
            due = tables.is_due(state.count, update_gap, offset)
            epoch = tables.epoch(state.count, update_gap, offset)
            before = new_tables[place]
            words = tables.leaf_words(seed, unit.number)
            first = layer if unit.specs[0].batch else 0
            table = tables.refresh(due, lambda: split.draw(words, epoch, first, parts, before), before)
            selected, rest = split.divide(parts, table)
            beside = None
            if weights is not None:
                views = [as_matrices(jnp.asarray(weights[i]), spec) for i, spec in zip(unit.leaves, unit.specs)]
                beside = split.divide(views, table)[0].astype(jnp.float32)
            step, moments[place] = selected_inner.update(
                selected.astype(jnp.float32),
                moments[place],
                beside,
                due=due,
                transport=split.transport(before, table),
                **extra,
            )
            new_tables[place] = table
            return split.join(step, [free(part) for part in rest], table)

        for unit in units:
            parts = [as_matrices(gradients[i], spec) for i, spec in zip(unit.leaves, unit.specs)]
            if unit.split is None:
                steps = [free(part) for part in parts]
            else:
                steps = update_selected(unit, unit.split, parts)
            for i, spec, step in zip(unit.leaves, unit.specs, steps):
                if not (isinstance(subspace_scale, float) and subspace_scale == 1):
                    step = subspace_scale * step
                out[i] = from_matrices(step, spec, gradients[i].shape).astype(gradients[i].dtype)
        new = FrugalState(state.count + 1, treedef.unflatten(new_tables), treedef.unflatten(moments), full)
        return treedef.unflatten(out), new

    return optax.GradientTransformationExtraArgs(init, update)


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    density: float | Mapping[str, float] = 0.25,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    update_gap: int = 200,
    split: SplitName = "columns",
    axis: Literal["input", "output"] | None = None,
    group: int | None = None,
    shards: int = 1,
    block_order: splits.BlockOrder = "random",
    state_free: StateFree = "sign",
    state_free_scale: float = 1.0,
    inner: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    state_bits: Literal[32, 8, 4] = 32,
    on_switch: OnSwitch = "reset",
    stagger: bool = False,
    subspace_scale: float = 1.0,
    seed: int = 0,
    rules: Mapping[str, routing.Label] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformation:
    """FRUGAL with decoupled weight decay and a learning rate.

    With `optax.inject_hyperparams`, pass ``static_args=mj.optim.frugal_static``.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: parameters shrink by ``learning_rate * weight_decay`` of themselves, split or not.
      mask: of the leaves that decay, as `optax.add_decayed_weights` takes it.
      density and all others: as in `scale_by_frugal`.

    Raises:
      ValueError, TypeError: as `scale_by_frugal`.
    """
    scaled = scale_by_frugal(
        density,
        update_gap=update_gap,
        split=split,
        axis=axis,
        group=group,
        shards=shards,
        block_order=block_order,
        state_free=state_free,
        state_free_scale=state_free_scale,
        inner=inner,
        b1=b1,
        b2=b2,
        eps=eps,
        state_bits=state_bits,
        on_switch=on_switch,
        stagger=stagger,
        subspace_scale=subspace_scale,
        seed=seed,
        rules=rules,
        axes=axes,
    )
    return optax.chain(
        scaled, optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
    )


_step_by_kernel: Callable[..., Any] = functools.partial(frugal_adam_step, implementation="mosaic_gpu")


def _runs(split: Split | None, table: Any) -> tuple[tuple[int, int, int], int, jax.Array] | None:
    """Returns how the kernel sees a unit: (outer, runs, run), kept runs, and their places; or None where it cannot."""
    if isinstance(split, Blocks) and len(split.counts) == 1:
        return (1, split.total, math.prod(split.size)), split.kept, tables.positions(table)[None]
    if not isinstance(split, Columns):
        return None
    batch, rows, cols = split.shape
    kept, position = split.strata * split.kept, tables.positions(table)
    first = jnp.arange(split.strata, dtype=jnp.int32)[:, None] * split.kept
    place = jnp.where(position < split.kept, position + first, kept).reshape(batch, -1)
    if split.axis == -2:
        return (batch, rows // split.group, split.group * cols), kept, place
    places = jnp.broadcast_to(place[:, None], (batch, rows, place.shape[1])).reshape(batch * rows, -1)
    return (batch * rows, cols // split.group, split.group), kept, places


def apply_frugal(
    params: Any,
    grads: Any,
    state: FrugalState,
    learning_rate: Any,
    *,
    weight_decay: Any = 0.0,
    key: Any = None,
    implementation: Literal["mosaic_gpu", "xla"] | None = None,
    **settings: Any,
) -> tuple[Any, FrugalState]:
    """One step of `frugal` from gradients to parameters; jit it, and donate params and state.

    On a Hopper GPU a kernel passes once over the matrices of columns and of stacks of blocks, if the inner transform is
    the default with float32 moments, the rest goes by sign, and moments are not projected.

    Args:
      params: pytree of arrays.
      grads: tree of ``params``.
      state: of ``scale_by_frugal(**settings).init(params)``.
      learning_rate, weight_decay: scalars, traced or not.
      key: rounds bfloat16 parameters stochastically, see `apply_updates_stochastic`; None rounds to nearest.
      implementation: ``"mosaic_gpu"``, ``"xla"``, or None for the kernel where it can run.
      settings: of `scale_by_frugal`.

    Returns:
      (params, state), equal to what ``frugal(learning_rate, ...)`` and `optax.apply_updates` give.

    Raises:
      ValueError: ``implementation="mosaic_gpu"`` where the kernel cannot take the settings or a matrix; says why.
    """
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(f"implementation must be 'mosaic_gpu', 'xla' or None, got {implementation!r}")
    direction, new = scale_by_frugal(**settings).update(grads, state, params)

    def scale(u: jax.Array, p: jax.Array) -> jax.Array:
        return -learning_rate * (u + weight_decay * p)

    updates = jax.tree.map(scale, direction, params)
    moved = optax.apply_updates(params, updates) if key is None else apply_updates_stochastic(params, updates, key)
    bound = inspect.signature(scale_by_frugal).bind(**settings)
    bound.apply_defaults()
    given = bound.arguments
    wanted = {"inner": None, "state_bits": 32, "state_free": "sign"}
    unfit = [f"{name}={given[name]!r}" for name, value in wanted.items() if given[name] != value]
    if given["on_switch"] == "project":
        unfit.append("on_switch='project'")
    if implementation == "mosaic_gpu" and unfit:
        raise ValueError(f"the kernel has no {', '.join(unfit)}; use implementation='xla'")
    if implementation == "xla" or unfit or (implementation is None and not (on_hopper() and whole_arrays())):
        return moved, new

    units, _ = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)}).plan(grads)
    treedef: Any = jax.tree.structure(params)
    leaves, slopes, done = (treedef.flatten_up_to(tree) for tree in (params, grads, moved))
    old, moments, places = (treedef.flatten_up_to(t) for t in (state.moments, new.moments, new.tables))
    rate = learning_rate * given["subspace_scale"]
    for unit in units:
        leaf = unit.leaves[0]
        seen = _runs(unit.split, places[leaf])
        if seen is None:
            if implementation == "mosaic_gpu" and unit.split is not None:
                raise ValueError(f"the kernel has no {unit.split}; use implementation='xla'")
            continue
        shape, kept, place = seen
        p, g = (as_matrices(x[leaf], unit.specs[0]).reshape(shape) for x in (leaves, slopes))
        if implementation is None and frugal_unsupported(*shape[1:], kept, p.dtype, g.dtype):
            continue
        offset = tables.stagger_offset(unit.number, len(units), given["update_gap"]) if given["stagger"] else 0
        due = tables.is_due(state.count, given["update_gap"], offset) & (given["on_switch"] == "reset")
        scalars = adam_scalars(
            rate,
            given["b1"],
            given["b2"],
            given["eps"],
            moments[leaf].count.astype(jnp.float32),
            free_rate=rate * given["state_free_scale"],
            keep=jnp.where(due, 0.0, 1.0),
        )
        shrink = Scalars._fields.index("shrink")
        scalars = scalars.at[shrink].set(1 - learning_rate * weight_decay)
        words = None if key is None or p.dtype != jnp.bfloat16 else tables.leaf_words(key, leaf)
        held = [moment.reshape(shape[0], kept, shape[2]) for moment in (old[leaf].mu, old[leaf].nu)]
        made = varying_like((p, g, *held), _step_by_kernel(p, g, *held, place, scalars, words))
        batched = matrix_shape(leaves[leaf].shape, unit.specs[0])
        done[leaf] = from_matrices(made[0].reshape(batched), unit.specs[0], leaves[leaf].shape)
        mu, nu = (x.reshape(old[leaf].mu.shape) for x in made[1:])
        moments[leaf] = moments[leaf]._replace(mu=mu, nu=nu)
    return treedef.unflatten(done), new._replace(moments=treedef.unflatten(moments))


def resize_frugal(tx: optax.GradientTransformation, state: FrugalState, params: Any) -> FrugalState:
    """Returns a state of ``tx``, of another density, that goes on where ``state`` is; call it outside jit at a switch.

    A density decides shapes, so a schedule of densities is a sequence of transformations. Counter, tables and the
    moments of whole leaves go on; the moments of what is selected start anew, as they do at a switch.

    Args:
      tx: `scale_by_frugal` of the new density, in all else as before.
      state: of the old density.
      params: pytree of arrays or abstract arrays.

    Raises:
      ValueError: another split, or leaves that were split and are now whole, or the reverse.
    """
    fresh = tx.init(params)
    for name in ("tables", "full"):
        found, wanted = (jax.tree.map(jnp.shape, getattr(s, name)) for s in (state, fresh))
        if found != wanted:
            raise ValueError(f"{name} of the state have shapes {found}, and of the new transformation {wanted}")
    return FrugalState(state.count, state.tables, fresh.moments, state.full)
