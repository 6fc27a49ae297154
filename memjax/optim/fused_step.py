"""A training step that updates each layer while its gradient exists, so that full gradients never do.

The idea of updating inside the backward pass is LOMO's: Lv et al., "Full Parameter Fine-tuning for Large Language
Models with Limited Resources", 2023; GaLore (Zhao et al., 2024) uses it with stateful optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.core import jaxpr_compat
from memjax.core.paths import leaf_paths
from memjax.core.roles import check_trained

# (params, grads, state, key, layer) -> (params, state); key is None where the step got none
Apply = Callable[[Any, Any, Any, Any, jax.Array], tuple[Any, Any]]


class LossParts(NamedTuple):
    """A loss cut at the layers of a model.

    ``loss = head(params, x, batch)`` where x starts as ``embed(params, batch)`` and goes through
    ``x = block(layer, x, batch, index)`` for every slice ``layer`` of the stacked layers.

    Attributes:
      embed: (params, batch) -> x, an array or a pytree of floats; uses no stacked layer.
      block: (one layer's params, x, batch, int32 scalar) -> x of the same shapes and dtypes.
      head: (params, x, batch) -> scalar loss; uses no stacked layer.
    """

    embed: Callable[[Any, Any], Any]
    block: Callable[[Any, Any, Any, jax.Array], Any]
    head: Callable[[Any, Any, Any], jax.Array]


class FusedMetrics(NamedTuple):
    """What a fused step reports."""

    loss: jax.Array  # scalar, before the update
    grad_norm: jax.Array  # float32 scalar, of all gradients before clipping


def parts_of_stages(
    stages: Callable[[Any], Any], loss: Callable[[Any, Any, Any], Any], *, layers: str = "layers"
) -> LossParts:
    """Returns the loss parts of a model that is cut into stages, such as by `memjax.models.Model.stages`.

    Args:
      stages: batch -> an object with the functions ``embed(params)``, ``layers(params)``, ``block(layer, x)`` and
        ``finish(params, x)``, such as ``lambda batch: model.stages(batch.tokens)``.
      loss: (params, hidden states, batch) -> scalar, or what else ``head`` is to give.
      layers: the key of the stacked layers in params.
    """

    def block(layer: Any, x: Any, batch: Any, index: jax.Array) -> Any:
        own = jax.tree.leaves(layer)
        stage = stages(batch)
        slices = jax.tree.map(
            lambda leaf: leaf if any(leaf is given for given in own) else leaf[index], stage.layers({layers: layer})
        )
        return stage.block(slices, x)

    return LossParts(
        lambda params, batch: stages(batch).embed(params),
        block,
        lambda params, x, batch: loss(params, stages(batch).finish(params, x), batch),
    )


def fused_step(
    loss_parts: LossParts | Sequence[Callable[..., Any]],
    tx: optax.GradientTransformation,
    *,
    clip: float | None = None,
    keep: Literal["inputs", "residuals"] = "inputs",
    layers: str = "layers",
    apply: Apply | None = None,
) -> Callable[..., tuple[Any, Any, FusedMetrics]]:
    """Builds a training step whose backward pass applies the optimizer layer by layer.

    The forward scan keeps what backward needs of each layer; the backward scan goes through the layers in reverse,
    carries the stacks of params and of optimizer state, and overwrites a layer's slices while its gradient exists.
    Beside params, state and what the layers keep, the step holds the gradient of one layer and those of the leaves
    outside of the stack (of which the output head's, where the embedding does not share it, goes before the layers').
    Donate params and state to it: ``jax.jit(step, donate_argnums=(0, 1))``.

    The result is that of ``jax.grad``, ``tx.update`` and ``optax.apply_updates``, up to float rounding, and the state
    is that of ``tx.init(params)``. For that the update of a leaf may depend on no other leaf, which is checked, and the
    update of a stacked leaf must treat its layers alike and apart: a norm over a whole leaf becomes a norm per layer.
    ``tx`` sees stacked leaves as slices ``[1, ...]`` and gets their layer number as extra argument ``layer``.

    Args:
      loss_parts: `LossParts`, or its three functions.
      tx: any optimizer that updates leaf by leaf, such as ``optax.adamw(1e-3)``; of a chain leave out the clipping by
        global norm and give ``clip``.
      clip: largest global norm of the gradients. The norm is known only after a whole backward pass, so the step runs
        two: the first sums squares and drops the gradients, the second applies them. With ``keep="inputs"`` a clipped
        step costs 7/4 of one without (in units of a forward pass: 1 + 3 for each backward pass that computes the
        layers again).
      keep: "inputs" keeps the input of every layer and computes the rest again; "residuals" keeps what reverse mode
        asks for but the params: wrap ``block`` in a policy, such as ``memjax.remat.checkpoint(block, "dots")``, to say
        what that is.
      layers: the key in params of the tree of stacked leaves ``[L, ...]``.
      apply: replaces ``tx.update`` and ``optax.apply_updates``, for an optimizer's fused form or for stochastic
        rounding: ``(params, grads, state, key, layer) -> (params, state)``, where key differs for every layer.

    Returns:
      ``step(params, state, batch, key=None) -> (params, state, FusedMetrics)``; params is a dict, batch any pytree.

    Raises:
      ValueError: settings out of range; by the step, leaves that are no stack, an optimizer that is not leaf by leaf,
        or whose state has no slice per layer.
      TypeError: by the step, params that are no dict, that hold a view or an array that is not of floats.
    """
    if keep not in ("inputs", "residuals"):
        raise ValueError(f"keep must be 'inputs' or 'residuals', got {keep!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive or None")
    parts = LossParts(*loss_parts)
    update = optax.with_extra_args_support(tx).update

    def two_phase(params: Any, grads: Any, state: Any, key: Any, layer: jax.Array) -> tuple[Any, Any]:
        updates, state = update(grads, state, params, layer=layer)
        return optax.apply_updates(params, updates), state

    def step(params: Any, state: Any, batch: Any, key: Any = None) -> tuple[Any, Any, FusedMetrics]:
        count = check_stack(params, layers)
        stack, structure = jax.tree.flatten(params[layers])
        outer_tree = {name: tree for name, tree in params.items() if name != layers}
        outer, outer_structure = jax.tree.flatten(outer_tree)

        def whole(outer: Sequence[Any], stack: Sequence[Any]) -> Any:
            return {**jax.tree.unflatten(outer_structure, outer), layers: jax.tree.unflatten(structure, stack)}

        plan = _Plan(apply or two_phase, tx.init, whole, outer, stack, state, key, layers, count)
        of_embed = _uses(lambda outer, stack: parts.embed(whole(outer, stack), batch), outer, stack, "embed", layers)
        x_shape = jax.eval_shape(lambda p: parts.embed(p, batch), params)
        of_head = _uses(
            lambda outer, stack, x: parts.head(whole(outer, stack), x, batch), outer, stack, "head", layers, x_shape
        )
        known = [*jax.tree.leaves(batch), *outer]

        def block(layer: Sequence[Any], x: Any, index: jax.Array) -> Any:
            return parts.block(jax.tree.unflatten(structure, layer), x, batch, index)

        vjp_structure = None
        kept_leaves: list[Any] = []  # of a layer's vjp: an index into what is known anyway, or None where it is kept

        def forward(x: Any, slices: Any) -> Any:
            nonlocal vjp_structure, kept_leaves
            layer, index = slices
            if keep == "inputs":
                return block(layer, x, index), x
            x, pull = jax.vjp(lambda layer, x: block(layer, x, index), layer, x)
            leaves, vjp_structure = jax.tree.flatten(pull)
            given = [*layer, *known]
            kept_leaves = [next((i for i, v in enumerate(given) if v is leaf), None) for leaf in leaves]
            return x, [leaf for leaf, place in zip(leaves, kept_leaves) if place is None]

        def pullback(layer: Any, kept: Any, index: jax.Array) -> Callable[[Any], Any]:
            if keep == "inputs":
                return jax.vjp(lambda layer, x: block(layer, x, index), layer, kept)[1]
            rest, given = iter(kept), [*layer, *known]
            leaves = [next(rest) if place is None else given[place] for place in kept_leaves]
            return jax.tree.unflatten(vjp_structure, leaves)

        def head(outer: Sequence[Any], x: Any) -> tuple[jax.Array, dict[int, jax.Array], Any]:
            """Returns the loss, its gradients by the number of the outer leaf, and the slope of x."""

            def value(chosen: Sequence[Any], x: Any) -> jax.Array:
                full = _replaced(outer, of_head, chosen)
                return parts.head(whole(full, stack), x, batch)

            loss, pull = jax.vjp(value, [outer[i] for i in of_head], x)
            grads, dx = pull(jnp.ones_like(loss))
            return loss, dict(zip(of_head, grads)), dx

        def embed_grads(dx: Any, head_grads: dict[int, jax.Array]) -> dict[int, jax.Array]:
            """Returns the gradients of the outer leaves that embed uses; those of the head are added."""

            def value(chosen: Sequence[Any]) -> Any:
                return parts.embed(whole(_replaced(outer, of_embed, chosen), stack), batch)

            (grads,) = jax.vjp(value, [outer[i] for i in of_embed])[1](dx)
            return {i: head_grads[i] + g if i in head_grads else g for i, g in zip(of_embed, grads)}

        def zeros(indices: Iterable[int]) -> dict[int, jax.Array]:
            return {i: jnp.zeros_like(outer[i]) for i in indices}

        unused = [i for i in range(len(outer)) if i not in of_embed and i not in of_head]
        numbers = jnp.arange(count, dtype=jnp.int32)
        x, kept = lax.scan(forward, parts.embed(params, batch), (stack, numbers))

        scale: Callable[[jax.Array], jax.Array] = lambda g: g  # noqa: E731
        norm = None
        if clip is not None:

            def sum_squares(carry: Any, slices: Any) -> Any:
                dx, total = carry
                layer, kept, index = slices
                grads, dx = pullback(layer, kept, index)(dx)
                return (dx, total + _squares(grads)), None

            _, grads, dx = head(outer, x)
            total = _squares([g for i, g in grads.items() if i not in of_embed])
            (dx, total), _ = lax.scan(sum_squares, (dx, total), (stack, kept, numbers), reverse=True)
            norm = jnp.sqrt(total + _squares(embed_grads(dx, grads).values()))
            # The second pass must not find the gradients of the first, which would be kept for it.
            x, kept, norm = lax.optimization_barrier((x, kept, norm))

            def scale(g: jax.Array) -> jax.Array:
                return lax.select(norm < clip, g, (g / norm.astype(g.dtype)) * clip)

        loss, grads, dx = head(outer, x)
        early = {i: grads.pop(i) for i in of_head if i not in of_embed} | zeros(unused)
        total = _squares(early.values())
        new_outer, new_state = list(outer), list(plan.state)
        plan.update_outer({i: scale(g) for i, g in early.items()}, new_outer, new_state)
        # Backward waits for the head's update, so that the head's gradient is gone by then.
        (dx, grads), *done = lax.optimization_barrier(((dx, grads), *(new_outer[i] for i in early)))
        for i, leaf in zip(early, done):
            new_outer[i] = leaf

        def backward(carry: Any, slices: Any) -> Any:
            dx, stack, states, total = carry
            kept, index = slices
            layer, parts_of_states = plan.slices(stack, states, index)
            grads, dx = pullback(layer, kept, index)(dx)
            total = total + _squares(grads)
            new = plan.update_layer([scale(g) for g in grads], layer, parts_of_states, index)
            stack, states = plan.overwrite(stack, states, new, index)
            return (dx, stack, states, total), None

        states = plan.stacked(plan.state)
        (dx, stack_out, states, total), _ = lax.scan(
            backward, (dx, list(stack), states, total), (kept, numbers), reverse=True
        )
        late = embed_grads(dx, grads)
        total = total + _squares(late.values())
        plan.update_outer({i: scale(g) for i, g in late.items()}, new_outer, new_state, last=True)
        plan.store(new_state, states)
        new_params = whole(new_outer, stack_out)
        return new_params, plan.unflatten(new_state), FusedMetrics(loss, jnp.sqrt(total) if norm is None else norm)

    return step


def check_stack(params: Any, layers: str) -> int:
    """Returns the number of layers of params whose key ``layers`` holds leaves ``[L, ...]``.

    Raises:
      TypeError: params that are no dict, a view or an array that is not of floats among them.
      ValueError: no such key, no leaves, or leaves of different lengths.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a dict with a tree of stacked layers at {layers!r}, got {type(params).__name__}"
        )
    if layers not in params:
        raise ValueError(f"params have no key {layers!r}; their keys are {', '.join(map(str, params))}")
    check_trained(params)
    return stack_length(params[layers], layers)


def stack_length(stack: Any, layers: str) -> int:
    """Returns the number of layers of a tree of stacked leaves ``[L, ...]``, which params hold at the key ``layers``.

    Raises:
      ValueError: no leaves, or leaves of different lengths.
    """
    lengths = {f"{layers}/{path}": tuple(leaf.shape[:1]) for path, leaf in leaf_paths(stack)}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        found = ", ".join(f"{path} {list(length)}" for path, length in list(lengths.items())[:8])
        raise ValueError(f"expected leaves at {layers!r} that share a leading axis of layers, got {found or 'none'}")
    return next(iter(lengths.values()))[0]


def _replaced(values: Sequence[Any], indices: Sequence[int], chosen: Sequence[Any]) -> list[Any]:
    full = list(values)
    for i, value in zip(indices, chosen):
        full[i] = value
    return full


def _squares(grads: Iterable[jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads), jnp.float32(0))


def _uses(
    f: Callable[..., Any], outer: Sequence[Any], stack: Sequence[Any], name: str, layers: str, *rest: Any
) -> list[int]:
    """Returns the numbers of the outer leaves that ``f(outer, stack, *rest)`` uses."""
    jaxpr, _ = jaxpr_compat.trace(f, list(outer), list(stack), *rest)
    used = _needed(jaxpr, range(len(jaxpr.outvars)))[1]
    if any(i in used for i in range(len(outer), len(outer) + len(stack))):
        raise ValueError(f"{name} uses params at {layers!r}, of which only block gets a gradient")
    return [i for i in range(len(outer)) if i in used]


def _needed(jaxpr: Any, outputs: Iterable[int]) -> tuple[list[Any], set[int]]:
    """Returns the equations that the numbered outputs need, and the numbers of the inputs that they use."""
    known = [*jaxpr.constvars, *jaxpr.invars]
    wanted = [jaxpr.outvars[i] for i in outputs]
    eqns, used = jaxpr_compat.needed(
        _without_order(jaxpr.eqns), known, [v for v in wanted if not isinstance(v, jaxpr_compat.Literal)]
    )
    return eqns, {i for i, v in enumerate(jaxpr.invars) if v in used}


def _without_order(eqns: Iterable[Any]) -> list[Any]:
    """Returns the equations with barriers taken apart: a barrier orders what does not depend on each other."""
    apart: list[Any] = []
    for eqn in eqns:
        if eqn.primitive.name == "optimization_barrier":
            apart += (eqn.replace(invars=[v], outvars=[w]) for v, w in zip(eqn.invars, eqn.outvars))
        else:
            apart.append(eqn)
    return apart


class _Plan:
    """An optimizer's update, cut into the parts that belong to a layer, and to each leaf outside of the stack.

    It is traced for params with one layer, and its equations are divided by which gradient they need.
    """

    def __init__(
        self,
        apply: Apply,
        init: Callable[[Any], Any],
        whole: Callable[[Sequence[Any], Sequence[Any]], Any],
        outer: Sequence[Any],
        stack: Sequence[Any],
        state: Any,
        key: Any,
        layers: str,
        count: int,
    ):
        self.outer, self.key, self.count = list(outer), key, count
        self.state, self.structure = jax.tree.flatten(state)
        self.names = [path or "state" for path, _ in leaf_paths(state)]
        self.axes = self._axes(init, whole, outer, stack)
        one = [jaxpr_compat.abstract_like((1, *leaf.shape[1:]), leaf.dtype, [leaf]) for leaf in stack]
        states = [
            leaf if axis is None else jaxpr_compat.abstract_like(self._slice_shape(leaf, axis), leaf.dtype, [leaf])
            for leaf, axis in zip(self.state, self.axes)
        ]
        self.n_outer, self.n_stack = len(outer), len(stack)

        def flat(outer: Any, stack: Any, d_outer: Any, d_stack: Any, states: Any, key: Any, layer: Any) -> Any:
            params, state = apply(
                whole(outer, stack), whole(d_outer, d_stack), jax.tree.unflatten(self.structure, states), key, layer
            )
            return jax.tree.leaves(whole_out(params)), jax.tree.leaves(state)

        def whole_out(params: Any) -> Any:
            rest = {name: tree for name, tree in params.items() if name != layers}
            return [jax.tree.leaves(rest), jax.tree.leaves(params[layers])]

        index = jax.ShapeDtypeStruct((), jnp.int32)
        self.jaxpr, (out_params, out_states) = jaxpr_compat.trace(
            flat, self.outer, one, self.outer, one, states, key, index
        )
        self._check_outputs([*outer, *one], out_params, states, out_states)
        params = whole(outer, stack)
        rest = {name: tree for name, tree in params.items() if name != layers}
        paths = [path for path, _ in leaf_paths(rest)] + [f"{layers}/{path}" for path, _ in leaf_paths(params[layers])]
        self._divide(paths, layers)

    def _axes(self, init: Any, whole: Any, outer: Sequence[Any], stack: Sequence[Any]) -> list[int | None]:
        """Returns, for each leaf of the state, the axis that grows with the number of layers."""

        def shapes(times: int) -> tuple[list[Any], Any]:
            longer = [jax.ShapeDtypeStruct((times * leaf.shape[0], *leaf.shape[1:]), leaf.dtype) for leaf in stack]
            return jax.tree.flatten(jax.eval_shape(init, whole(outer, longer)))

        (now, structure), (twice, longer_structure) = shapes(1), shapes(2)
        given = [(leaf.shape, leaf.dtype) for leaf in self.state]
        if structure != self.structure or given != [(leaf.shape, leaf.dtype) for leaf in now]:
            raise ValueError("expected the state of tx.init(params), got one of another structure or other shapes")
        if structure != longer_structure:
            raise ValueError("twice as many layers change the structure of the optimizer's state, not its shapes alone")
        axes: list[int | None] = []
        for name, a, b in zip(self.names, now, twice):
            grown = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
            if grown and (
                len(grown) > 1 or 2 * a.shape[grown[0]] != b.shape[grown[0]] or a.shape[grown[0]] % self.count
            ):
                raise ValueError(
                    f"optimizer state {name} of shape {a.shape} has no equal part for each of {self.count} layers"
                )
            axes.append(grown[0] if grown else None)
        return axes

    def _slice_shape(self, leaf: Any, axis: int) -> tuple[int, ...]:
        return (*leaf.shape[:axis], leaf.shape[axis] // self.count, *leaf.shape[axis + 1 :])

    def _check_outputs(self, params: Any, out_params: Any, states: Any, out_states: Any) -> None:
        for kind, before, after in (("params", params, out_params), ("state", states, out_states)):
            expected = [(leaf.shape, leaf.dtype) for leaf in before]
            got = [(leaf.shape, leaf.dtype) for leaf in after]
            if expected != got:
                wrong = next((pair for pair in zip(expected, got) if pair[0] != pair[1]), (len(expected), len(got)))
                raise ValueError(
                    f"the optimizer changes its {kind} in one layer's update: {wrong[0]} became {wrong[1]}"
                )

    def _divide(self, paths: Sequence[str], layers: str) -> None:
        """Finds for each leaf of params the outputs that are its own."""
        n_params = self.n_outer + self.n_stack
        first = n_params  # of the gradients, among the inputs

        def gradients(output: int) -> list[int]:
            used = _needed(self.jaxpr, [output])[1]
            return [i for i in range(n_params) if first + i in used]

        for i in range(n_params):
            others = [paths[j] for j in gradients(i) if j != i]
            if others:
                raise ValueError(
                    f"{paths[i]}: its update depends on the gradient of {others[0]}; a fused step has gradients "
                    "leaf by leaf (for clipping by the global norm give clip=...)"
                )
        self.of_leaf: dict[int, list[int]] = {i: [] for i in range(self.n_outer)}
        self.of_layer: list[tuple[int, int]] = []  # and the axis of layers
        self.of_none: list[int] = []
        for j, (name, axis) in enumerate(zip(self.names, self.axes)):
            sources = gradients(n_params + j)
            if len(sources) > 1:
                raise ValueError(
                    f"optimizer state {name} depends on the gradients of {paths[sources[0]]} and {paths[sources[1]]}; "
                    "a fused step has gradients leaf by leaf"
                )
            stacked = bool(sources) and sources[0] >= self.n_outer
            if stacked and axis is None:
                raise ValueError(
                    f"optimizer state {name} of shape {self.state[j].shape} is shared by the layers of "
                    f"{paths[sources[0]]}; a fused step needs a part for each layer"
                )
            if axis is not None:
                self.of_layer.append((j, axis))
            elif sources:
                self.of_leaf[sources[0]].append(j)
            else:
                self.of_none.append(j)

    def _run(self, outputs: Sequence[int], given: Mapping[int, Any]) -> list[Any]:
        """Evaluates the numbered outputs from numbered inputs."""
        eqns, used = _needed(self.jaxpr, outputs)
        env = dict(zip(self.jaxpr.constvars, jaxpr_compat.consts_of(self.jaxpr)))
        env |= {self.jaxpr.invars[i]: given[i] for i in used}
        jaxpr_compat.run(eqns, env)
        found = [self.jaxpr.outvars[i] for i in outputs]
        return [jnp.asarray(v.val) if isinstance(v, jaxpr_compat.Literal) else env[v] for v in found]

    def _shared(self, layer: Any) -> dict[int, Any]:
        """Returns the inputs that are the same for every part: params and state outside of the stack, key and layer."""
        n_params = self.n_outer + self.n_stack
        given = dict(enumerate(self.outer))
        given |= {2 * n_params + j: leaf for j, leaf in enumerate(self.state) if self.axes[j] is None}
        last = 2 * n_params + len(self.state)
        key = [] if self.key is None else [jax.random.fold_in(self.key, layer)]
        return given | dict(enumerate([*key, jnp.minimum(layer, self.count - 1)], last))

    def update_outer(
        self, grads: Mapping[int, jax.Array], params: list[Any], state: list[Any], *, last: bool = False
    ) -> None:
        """Writes what follows from the gradients of numbered leaves; at ``last`` also what follows from none."""
        n_params = self.n_outer + self.n_stack
        states = [j for i in grads for j in self.of_leaf[i]] + (self.of_none if last else [])
        given = self._shared(jnp.int32(self.count)) | {n_params + i: g for i, g in grads.items()}
        results = self._run([*grads, *(n_params + j for j in states)], given)
        for i, value in zip(grads, results):
            params[i] = value
        for j, value in zip(states, results[len(grads) :]):
            state[j] = value

    def slices(self, stack: Sequence[Any], states: Sequence[Any], index: jax.Array) -> tuple[list[Any], list[Any]]:
        """Returns a layer's params ``[...]`` and its parts of the stacked state."""
        layer = [lax.dynamic_index_in_dim(leaf, index, keepdims=False) for leaf in stack]
        parts = []
        for (_, axis), leaf in zip(self.of_layer, states):
            size = leaf.shape[axis] // self.count
            parts.append(lax.dynamic_slice_in_dim(leaf, index * size, size, axis))
        # Slices that are read late, fused with what overwrites them, would make XLA copy the stacks.
        return lax.optimization_barrier((layer, parts))

    def update_layer(
        self, grads: Sequence[Any], layer: Sequence[Any], parts: Sequence[Any], index: jax.Array
    ) -> list[Any]:
        """Returns a layer's new params ``[1, ...]``, then its new parts of the stacked state."""
        n_params = self.n_outer + self.n_stack
        given = self._shared(index)
        for k, (leaf, grad) in enumerate(zip(layer, grads)):
            given[self.n_outer + k], given[n_params + self.n_outer + k] = leaf[None], grad[None]
        given |= {2 * n_params + j: part for (j, _), part in zip(self.of_layer, parts)}
        return self._run([*range(self.n_outer, n_params), *(n_params + j for j, _ in self.of_layer)], given)

    def overwrite(
        self, stack: Sequence[Any], states: Sequence[Any], new: Sequence[Any], index: jax.Array
    ) -> tuple[list[Any], list[Any]]:
        """Returns the stacks of params and of state with what `update_layer` gave in place of a layer's slices."""
        new = lax.optimization_barrier(list(new))
        stack = [lax.dynamic_update_slice_in_dim(leaf, part, index, 0) for leaf, part in zip(stack, new)]
        states = [
            lax.dynamic_update_slice_in_dim(leaf, part, index * part.shape[axis], axis)
            for (_, axis), leaf, part in zip(self.of_layer, states, new[self.n_stack :])
        ]
        return stack, states

    def stacked(self, state: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the state that have a part for each layer."""
        return [state[j] for j, _ in self.of_layer]

    def store(self, state: list[Any], stacked: Sequence[Any]) -> None:
        """Puts back what `stacked` took out."""
        for (j, _), leaf in zip(self.of_layer, stacked):
            state[j] = leaf

    def unflatten(self, state: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, state)
