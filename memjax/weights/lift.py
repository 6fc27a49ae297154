"""`lift`: any function of arrays becomes a function that accepts weight views in their place.

The function is traced on the logical shapes and dtypes of its arguments, and its jaxpr is evaluated with views in the
environment. Structural equations rearrange a view, consumers (products, lookups, convolutions) use its rule, control
flow is rebuilt around views, and everything else is bound as it was. A consumer without a rule is an error: a view
never becomes dense in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from memjax.core import jaxpr_compat, rules
from memjax.core.jaxpr_compat import Jaxpr, JaxprEqn
from memjax.core.paths import path_name
from memjax.core.views import is_view
from memjax.weights import arranged
from memjax.weights.arranged import Arranged, Factor, UnsupportedError, arrange


@dataclass
class Usage:
    """How a program consumed one weight: the (negative) axes it contracted, by kind of consumer."""

    dots: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    lookups: list[int] = field(default_factory=list)
    convs: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Mode:
    allow_dense: bool
    usage: dict[str, Usage] | None = None
    line: str = ""  # source line of the enclosing call, for equations of library functions, which have none


def lift(fn: Callable[..., Any], *, allow_dense: bool = False) -> Callable[..., Any]:
    """Returns ``fn`` such that any array in its arguments may be a weight view.

    Works for every pure function of arrays, whatever framework it comes from, and composes with jit, grad, vmap, scan,
    checkpoint, shard_map and pmap, inside and outside. Arguments that are not arrays, Python numbers included, reach
    ``fn`` as they are.

    Args:
      fn: the function; called as before.
      allow_dense: materialise a view where a consumer has no rule for it, instead of raising.

    Returns:
      A function of the same arguments that returns what ``fn`` returns.

    Raises:
      TypeError: (when called) a consumer without a rule takes a view, or the function returns one; names the weight,
        the primitive and the source line.
    """
    return _lift(fn, _Mode(allow_dense))


def lift_and_record(fn: Callable[..., Any], usage: dict[str, Usage]) -> Callable[..., Any]:
    """Returns ``fn`` such that calling it records in ``usage`` how each weight view is consumed, by logical path."""
    return _lift(fn, _Mode(allow_dense=True, usage=usage))


def _lift(fn: Callable[..., Any], mode: _Mode) -> Callable[..., Any]:
    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_weight)
        labels = [path_name(keys[2:]) or path_name(keys[1:]) for keys, _ in flat]
        leaves = [leaf for _, leaf in flat]
        dynamic = [i for i, leaf in enumerate(leaves) if _is_weight(leaf) or _is_array(leaf)]
        if not any(_is_weight(leaf) for leaf in leaves):
            return fn(*args, **kwargs)

        def flat_fn(*values: Any) -> Any:
            full = list(leaves)
            for i, value in zip(dynamic, values):
                full[i] = value
            new_args, new_kwargs = jax.tree.unflatten(tree, full)
            return fn(*new_args, **new_kwargs)

        abstract = [
            jaxpr_compat.abstract_like(leaf.shape, leaf.dtype, jax.tree.leaves(leaf)) if _is_weight(leaf) else leaf
            for leaf in (leaves[i] for i in dynamic)
        ]
        jaxpr, out_shape = jaxpr_compat.trace(flat_fn, *abstract)
        values = [arrange(leaves[i], labels[i]) if is_view(leaves[i]) else leaves[i] for i in dynamic]
        outputs = []
        for value in _evaluate(jaxpr, values, mode):
            if isinstance(value, Arranged):
                if not mode.allow_dense:
                    raise TypeError(
                        f"{value.label}: the function returns this weight, and a view cannot be returned as an array; "
                        "pass allow_dense=True to materialise it"
                    )
                value = value.materialize()
            outputs.append(value)
        return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)

    return lifted


def _is_weight(x: Any) -> bool:
    return isinstance(x, Arranged) or is_view(x)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _evaluate(jaxpr: Jaxpr, args: Sequence[Any], mode: _Mode) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, jaxpr_compat.consts_of(jaxpr)))
    env.update(zip(jaxpr.invars, args))

    for eqn in jaxpr.eqns:
        values = [jaxpr_compat.read(env, atom) for atom in eqn.invars]
        with jaxpr_compat.eqn_context(eqn):
            if any(isinstance(value, Arranged) for value in values):
                outputs = _consume(eqn, values, mode)
            else:
                outputs = jaxpr_compat.bind(eqn, values)
        env.update(zip(eqn.outvars, outputs))
    return [jaxpr_compat.read(env, atom) for atom in jaxpr.outvars]


def _call(jaxpr: Jaxpr, mode: _Mode) -> Callable[..., list[Any]]:
    """Returns a jaxpr as a function of its inputs, views allowed."""
    return lambda *args: _evaluate(jaxpr, args, mode)


def _consume(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    name = eqn.primitive.name
    reason = "packed and adapted weights have no rule for it"
    mode = replace(mode, line=jaxpr_compat.source_line(eqn) or mode.line)
    rule = _RULES.get(name)
    if rule is not None:
        try:
            return rule(eqn, values, mode)
        except UnsupportedError as error:
            reason = str(error)
    if mode.allow_dense:
        return jaxpr_compat.bind(eqn, [v.materialize() if isinstance(v, Arranged) else v for v in values])
    _refuse(eqn, values, reason, mode)


def _refuse(eqn: JaxprEqn, values: Sequence[Any], reason: str, mode: _Mode) -> NoReturn:
    weights = ", ".join(f"{v.label} {v.dtype}{list(v.shape)}" for v in values if isinstance(v, Arranged))
    raise TypeError(
        f"{weights}: `{eqn.primitive.name}` at {mode.line} takes this weight view, but {reason}. "
        "Pass allow_dense=True to lift to materialise the dense weight there."
    )


# ---- structure ----------------------------------------------------------------------------------------------------


def _convert(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    return [values[0].cast(eqn.params["new_dtype"])]


def _transpose(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    return [values[0].transpose(eqn.params["permutation"])]


def _reshape(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    return [values[0].reshape(jaxpr_compat.out_shape(eqn))]


def _squeeze(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    (w,) = values
    return [w.reshape([size for i, size in enumerate(w.shape) if i not in eqn.params["dimensions"]])]


def _broadcast_in_dim(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    w, shape = values[0], tuple(eqn.params["shape"])
    kept = [shape[i] for i in eqn.params["broadcast_dimensions"]]
    if tuple(kept) != w.shape or len(values) > 1:
        raise UnsupportedError(f"it broadcasts the weight to {shape}")
    dims: list[tuple[Factor, ...]] = [()] * len(shape)
    for dim, i in zip(w.dims, eqn.params["broadcast_dimensions"]):
        dims[i] = dim
    if any(size != 1 for i, size in enumerate(shape) if i not in eqn.params["broadcast_dimensions"]):
        raise UnsupportedError(f"it broadcasts the weight to {shape}")
    return [Arranged(w.view, tuple(dims), w.casts, w.label)]


def _slice(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    (w,) = values
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    if (dim := _row_dim(w, [b - a for a, b in zip(start, limit)], mode)) is not None:
        return [arranged.row(w, start[dim], dim)]
    for dim, size in enumerate(w.shape):
        if (start[dim], limit[dim]) != (0, size) or strides[dim] != 1:
            cut = functools.partial(
                lax.slice_in_dim, start_index=start[dim], limit_index=limit[dim], stride=strides[dim]
            )
            w = w.map_batch(dim, lambda leaf, axis, cut=cut: cut(leaf, axis=axis), True)
    return [w]


def _row_dim(w: Arranged, sizes: Sequence[int], mode: _Mode) -> int | None:
    """Returns the input or output axis along which a slice of these sizes takes one row, if that is what it does."""
    cut = [dim for dim, size in enumerate(sizes) if size != w.shape[dim]]
    if len(cut) != 1 or sizes[cut[0]] != 1 or {f.axis < -w.view.axes.ndim for f in w.dims[cut[0]]} != {False}:
        return None
    _record_lookup(w, cut[0], mode)
    return cut[0]


def _record_lookup(w: Arranged, dim: int, mode: _Mode) -> None:
    if mode.usage is not None:
        mode.usage.setdefault(w.label, Usage()).lookups.extend(sorted({f.axis for f in w.dims[dim]}))
        raise UnsupportedError("only recorded")


def _dynamic_slice(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    w, *starts = values
    if (dim := _row_dim(w, eqn.params["slice_sizes"], mode)) is not None:
        return [arranged.row(w, starts[dim], dim)]
    for dim, size in enumerate(eqn.params["slice_sizes"]):
        if size != w.shape[dim]:
            cut = functools.partial(lax.dynamic_slice_in_dim, start_index=starts[dim], slice_size=size)
            w = w.map_batch(dim, lambda leaf, axis, cut=cut: cut(leaf, axis=axis), True)
    return [w]


def _split(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    (w,) = values
    parts, start = [], 0
    for size in eqn.params["sizes"]:
        cut = functools.partial(lax.slice_in_dim, start_index=start, limit_index=start + size)
        parts.append(w.map_batch(eqn.params["axis"], lambda leaf, axis, cut=cut: cut(leaf, axis=axis), True))
        start += size
    return parts


def _unstack(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    (w,) = values
    dim = eqn.params["axis"]
    picks = [functools.partial(lax.index_in_dim, index=i, keepdims=False) for i in range(w.shape[dim])]
    return [w.map_batch(dim, lambda leaf, axis, pick=pick: pick(leaf, axis=axis), False) for pick in picks]


def _per_leaf(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    """For equations that are the identity on values: applies them to every stored leaf."""
    outputs = []
    for value in values:
        bound = jax.tree.map(lambda leaf: jaxpr_compat.bind(eqn, [leaf])[0], value)
        outputs.append(bound)
    return outputs


def _reduce_precision(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    """The identity that checkpoint policies put behind what they save; a true change of precision has no rule."""
    (w,) = values
    format = jnp.finfo(w.dtype)
    if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (format.nexp, format.nmant):
        raise UnsupportedError("it reduces the precision of the weight")
    return [w]


def _barrier(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    return list(lax.optimization_barrier(tuple(values)))


def _constrain(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    (w,) = values
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        raise UnsupportedError("only NamedSharding constraints reach into a view")
    specs = w.view.specs(_view_spec(w, sharding.spec))
    view = jax.tree.map(
        lambda leaf, spec: lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec)), w.view, specs
    )
    return [Arranged(view, w.dims, w.casts, w.label)]


def _view_spec(w: Arranged, spec: Any) -> tuple[Any, ...]:
    """Returns a spec per axis of the view from one per dimension of the program's array."""
    entries = [*spec, *([None] * (len(w.dims) - len(spec)))]
    by_axis = dict(zip(w.permutation(), entries))
    return tuple(by_axis.get(axis) for axis in range(-w.view.ndim, 0))


# ---- consumers ----------------------------------------------------------------------------------------------------


def _dot_general(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    lhs, rhs = values
    if isinstance(lhs, Arranged) and isinstance(rhs, Arranged):
        raise UnsupportedError("it multiplies two weight views with each other")
    weight_first = isinstance(lhs, Arranged)
    w, x = (lhs, rhs) if weight_first else (rhs, lhs)
    if mode.usage is not None:
        side = 0 if weight_first else 1
        contracted = [f for dim in eqn.params["dimension_numbers"][0][side] for f in w.dims[dim]]
        batch = [f for dim in eqn.params["dimension_numbers"][1][side] for f in w.dims[dim]]
        used = {f.axis for f in (*contracted, *batch)}
        free = tuple(a for a in range(-w.view.ndim, 0) if a not in used)
        axes = tuple(dict.fromkeys(f.axis for f in contracted))
        mode.usage.setdefault(w.label, Usage()).dots.append((axes, free))
        raise UnsupportedError("only recorded")
    return [arranged.dot_general(w, x, eqn.params, weight_first)]


def _gather(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    w, indices = values
    if not isinstance(w, Arranged):
        raise UnsupportedError("it uses the weight as indices")
    for dim in eqn.params["dimension_numbers"].start_index_map:
        _record_lookup(w, dim, mode)
    return [arranged.gather(w, indices, eqn.params)]


def _conv(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    x, w = values
    if isinstance(x, Arranged):
        raise UnsupportedError("the weight is the image, not the kernel, of the convolution")
    if mode.usage is not None:
        permutation = w.permutation()
        out = permutation[eqn.params["dimension_numbers"].rhs_spec[0]]
        rest = tuple(sorted(axis for axis in permutation if axis != out))
        mode.usage.setdefault(w.label, Usage()).convs.append((rest, (out,)))
        raise UnsupportedError("only recorded")
    return [arranged.conv(x, w, eqn.params)]


# ---- calls and control flow ---------------------------------------------------------------------------------------


def _jit(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    rule = rules.rule_for(eqn.params["name"])
    if rule is not None and mode.usage is None:
        result = rule(functools.partial(_lift, mode=mode), *values)
        return jax.tree.leaves(result, is_leaf=lambda leaf: isinstance(leaf, Arranged))
    transform = rules.transformation_for(eqn.params["name"])
    if transform is not None and mode.usage is None:
        primal = jaxpr_compat.primal_of(jaxpr_compat.body_of(eqn))
        if primal is not None:
            return list(transform(_lift(primal, mode))(*values))
    if jaxpr_compat.has_shardings(eqn):
        raise UnsupportedError("it is a nested jit with in_shardings or out_shardings; put them on the outer jit")
    return _call(jaxpr_compat.body_of(eqn), mode)(*values)


def _eval_jaxpr(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    return _call(jaxpr_compat.body_of(eqn), mode)(*values)


def _custom(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    if mode.usage is not None:
        return _call(jaxpr_compat.body_of(eqn), mode)(*values)
    raise UnsupportedError(
        "a function with a custom derivative takes it; register a rule for it with memjax.core.operation"
    )


def _checkpoint(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    body, prevent_cse = _call(jaxpr_compat.body_of(eqn), mode), eqn.params["prevent_cse"]
    if isinstance(prevent_cse, bool):
        prevent_cse = (prevent_cse,) * len(values)
    if eqn.params["differentiated"]:  # an inner gradient recomputes here; XLA must not merge that with the original
        barred = iter(lax.optimization_barrier([v for v, bar in zip(values, prevent_cse) if bar]))
        values = [next(barred) if bar else v for v, bar in zip(values, prevent_cse)]
    # jax loses count of a tuple where the gradient rule of an equation brings constants of its own
    uniform = all(prevent_cse) if len(set(prevent_cse)) == 1 else prevent_cse
    return jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=uniform)(*values)


def _cond(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    index, *operands = values
    if isinstance(index, Arranged):
        raise UnsupportedError("it branches on the weight")
    branches = [_call(branch, mode) for branch in eqn.params["branches"]]
    return lax.switch(index, [_no_views(branch, eqn, mode) for branch in branches], *operands)


def _no_views(
    fn: Callable[..., list[Any]], eqn: JaxprEqn, mode: _Mode, fixed: Sequence[Any] = ()
) -> Callable[..., list[Any]]:
    """Returns a body that may return a view only as a carry that is ``fixed``."""

    def checked(*args: Any) -> list[Any]:
        outputs = fn(*args)
        for i, value in enumerate(outputs):
            if isinstance(value, Arranged) and (i >= len(fixed) or fixed[i] is None):
                if not mode.allow_dense:
                    _refuse(eqn, [value], "its body returns it", mode)
                outputs[i] = value.materialize()
        return outputs

    return checked


def _loop_invariant(body: Jaxpr, n_before: int, n_carry: int) -> list[bool]:
    """Returns, per carry, whether the body hands it on unchanged."""
    return [body.outvars[i] is body.invars[n_before + i] for i in range(n_carry)]


def _scan(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    loop = jaxpr_compat.scan_parts(eqn)
    consts = values[: loop.n_consts]
    init = values[loop.n_consts : loop.n_consts + loop.n_carry]
    xs = values[loop.n_consts + loop.n_carry :]
    invariant = _loop_invariant(loop.body, loop.n_consts, loop.n_carry)
    fixed = [v if same and isinstance(v, Arranged) else None for v, same in zip(init, invariant)]
    if any(isinstance(v, Arranged) and f is None for v, f in zip(init, fixed)):
        raise UnsupportedError("it is a loop carry that the body changes")

    sliced: list[_ScanInput | None] = [None] * len(xs)
    for i, x in enumerate(xs):
        if isinstance(x, Arranged):
            try:
                sliced[i] = _ScanInput.of(x)
            except UnsupportedError:
                if not mode.allow_dense:
                    raise
                xs[i] = x.materialize()
    handed_on: dict[int, Arranged] = {}

    def collect(*args: Any) -> list[Any]:
        outputs = _call(loop.body, mode)(*args)
        slices = args[loop.n_consts + loop.n_carry :]
        for i in range(loop.n_carry, len(outputs)):
            for source, x in zip(sliced, slices):
                if source is not None and isinstance(outputs[i], Arranged) and outputs[i].view is x.view:
                    handed_on[i - loop.n_carry] = source.stack(outputs[i])
                    outputs[i] = None
        return outputs

    run = _no_views(collect, eqn, mode, fixed)

    def body(carry: Any, x: Any) -> Any:
        carry = [f if f is not None else c for f, c in zip(fixed, carry)]
        x = [s.rebuild(v) if s is not None else v for s, v in zip(sliced, x)]
        outputs = run(*consts, *carry, *x)
        new = [None if f is not None else c for f, c in zip(fixed, outputs[: loop.n_carry])]
        return new, outputs[loop.n_carry :]

    start = [None if f is not None else c for f, c in zip(fixed, init)]
    scanned = [s.leaves if s is not None else x for s, x in zip(sliced, xs)]
    carry, ys = lax.scan(body, start, scanned, length=loop.length, reverse=loop.reverse, unroll=loop.unroll)
    ys = [handed_on.get(i, y) for i, y in enumerate(ys)]
    return [*(f if f is not None else c for f, c in zip(fixed, carry)), *ys]


@dataclass(frozen=True)
class _ScanInput:
    """A view that a scan slices along its batch axis ``dims[0]``.

    Attributes:
      leaves: the view with that axis in front.
      template: how the program holds the view.
    """

    leaves: Any
    template: Arranged

    @staticmethod
    def of(w: Arranged) -> _ScanInput:
        if not w.dims[0]:
            return _ScanInput(jax.tree.map(lambda leaf: leaf[None], w.view), w)
        axis = w.view.ndim + w.batch_axis(0)
        leaves = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), w.view) if axis else w.view
        return _ScanInput(leaves, w)

    def rebuild(self, view: Any) -> Arranged:
        gone = self.template.dims[0][0].axis if self.template.dims[0] else -self.leaves.ndim
        dims = tuple(
            tuple(f._replace(axis=f.axis + 1) if f.axis < gone else f for f in dim) for dim in self.template.dims[1:]
        )
        return Arranged(view, dims, self.template.casts, self.template.label)

    def stack(self, slice: Arranged) -> Arranged:
        """Returns what the scan stacks when its body hands on a rearranged slice: the whole view, not copied."""
        front = Factor(-self.leaves.ndim, self.leaves.shape[0], 1)
        return Arranged(self.leaves, ((front,), *slice.dims), slice.casts, slice.label)


def _while(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    loop = jaxpr_compat.while_parts(eqn)
    n_consts = loop.n_condition_consts + loop.n_body_consts
    condition_consts = values[: loop.n_condition_consts]
    body_consts = values[loop.n_condition_consts : n_consts]
    init = values[n_consts:]
    invariant = _loop_invariant(loop.body, loop.n_body_consts, len(init))
    fixed = [v if same and isinstance(v, Arranged) else None for v, same in zip(init, invariant)]
    if any(isinstance(v, Arranged) and f is None for v, f in zip(init, fixed)):
        raise UnsupportedError("it is a loop carry that the body changes")
    run = _no_views(_call(loop.body, mode), eqn, mode, fixed)

    def full(carry: Any) -> list[Any]:
        return [f if f is not None else c for f, c in zip(fixed, carry)]

    def body(carry: Any) -> Any:
        outputs = run(*body_consts, *full(carry))
        return [None if f is not None else c for f, c in zip(fixed, outputs)]

    def condition(carry: Any) -> Any:
        return _call(loop.condition, mode)(*condition_consts, *full(carry))[0]

    start = [None if f is not None else c for f, c in zip(fixed, init)]
    return full(lax.while_loop(condition, body, start))


def _shard_map(eqn: JaxprEqn, values: list[Any], mode: _Mode) -> list[Any]:
    parts = jaxpr_compat.shard_map_parts(eqn)
    in_specs = []
    for value, spec in zip(values, parts.in_specs):
        if isinstance(value, Arranged):
            specs = value.view.specs(_view_spec(value, spec))
            check_divisible(value.view, specs, parts.mesh, value.label)
            spec = specs
        in_specs.append(spec)
    permutations = [v.permutation() if isinstance(v, Arranged) else None for v in values]
    views = [v.view if isinstance(v, Arranged) else v for v in values]

    def body(*local: Any) -> tuple[Any, ...]:
        rebuilt = []
        for value, outer, permutation in zip(local, values, permutations):
            if permutation is not None:
                own = arrange(value, outer.label)
                dims = tuple(own.dims[axis + value.ndim] for axis in permutation)
                value = Arranged(value, dims, outer.casts, outer.label)
            rebuilt.append(value)
        return tuple(_no_views(_call(parts.body, mode), eqn, mode)(*rebuilt))

    outputs = jax.shard_map(
        body,
        mesh=parts.mesh,
        in_specs=tuple(in_specs),
        out_specs=tuple(parts.out_specs),
        axis_names=parts.manual_axes,
        check_vma=parts.check_vma,
    )(*views)
    return list(outputs)


def check_divisible(view: Any, specs: Any, mesh: Any, label: str) -> None:
    """Raises a ValueError when a leaf of ``view`` cannot be sharded as ``specs`` says: a shard would cut a group."""

    def check(keys: Any, leaf: Any, spec: PartitionSpec) -> None:
        for axis, entry in enumerate(spec):
            names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            parts = 1
            for name in names:
                parts *= mesh.shape[name]
            if leaf.shape[axis] % parts:
                raise ValueError(
                    f"{label}: sharding axis {axis} of {path_name(keys)} {list(leaf.shape)} over {names} into {parts} "
                    "parts would cut a quantization group; use a smaller group or shard another axis"
                )

    jax.tree_util.tree_map_with_path(check, view, specs)


_Rule = Callable[[JaxprEqn, list[Any], _Mode], list[Any]]
_RULES: dict[str, _Rule] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "copy": _per_leaf,
    "copy_p": _per_leaf,
    "name": _per_leaf,
    "stop_gradient": _per_leaf,
    "pvary": _per_leaf,
    "reduce_precision": _reduce_precision,
    "optimization_barrier": _barrier,
    "sharding_constraint": _constrain,
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "jit": _jit,
    "eval_jaxpr": _eval_jaxpr,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
}
