"""`compress_residuals`: any function, with what reverse mode keeps of it stored as packed codes.

Sources: Chen et al., ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training, 2021; Liu et
al., GACT: Activation Compressed Training for Generic Network Architectures, 2022.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.codecs import Codec, Packed, pack, unpack
from memjax.core import jaxpr_compat, packing
from memjax.core.bytes import nbytes
from memjax.core.jaxpr_compat import Jaxpr, JaxprEqn, Literal
from memjax.core.paths import match, path_name
from memjax.core.random_bits import seed_words
from memjax.core.rules import register_transformation, transformation
from memjax.core.views import is_view
from memjax.remat import on_codes
from memjax.remat.policy import ResidualPolicy
from memjax.remat.residuals import Level, Linearized, Origins, Residual, Role, evaluate_levels, linearize

Seed = int | Callable[..., Any]
_NONE: Mapping[Any, Packed] = {}
_compressed: weakref.WeakKeyDictionary[Callable[..., Any], Any] = weakref.WeakKeyDictionary()


def compress_residuals(
    f: Callable[..., Any],
    policy: ResidualPolicy,
    *,
    params: Sequence[int | str] = (0,),
    seed: Seed = 0,
    prevent_cse: bool = True,
) -> Callable[..., Any]:
    """Returns ``f`` such that what reverse mode keeps of it is stored as ``policy`` says.

    Values are those of ``f``; gradients are taken at the stored arrays' decoded values. Nothing is computed twice but
    what follows from the params alone (casts, transposes, decoded weights) or cheaply from captured values and integer
    arguments (masks, rotary angles), and that is not kept. Arrays that differ in layout only are stored once.

    Composes with jit, grad, vmap, scan, shard_map, pmap, `jax.checkpoint` inside and outside (minimise first:
    ``compress_residuals(jax.checkpoint(f, policy=...), ...)``) and `memjax.lift` inside and outside; weight views are
    params wherever they are. Wrap the body of a scan over layers, ``(carry, layer) -> (carry, y)``, with
    ``params=(1,)``. Call it under jit: outside, every call traces and compiles ``f``. Derivatives are first-order and
    reverse-mode only.

    Args:
      f: a function of pytrees; whatever in them is no array reaches it as it is. Values of enclosing traces that it
        captures are kept by reference and differentiated.
      policy: how arrays are stored.
      params: which arguments hold weights: argument numbers, or patterns of paths that start with the number, such as
        ``"1/0/**"``.
      seed: for stochastic rounding: an integer, or a function of the arguments of ``f`` that returns an integer
        scalar or a random key. Pass what tells steps and layers apart, or they share their noise, as examples of a vmap
        do. The arrays of one call have their own, and so have the shards of a shard_map that checks what varies.
      prevent_cse: keep XLA from merging what backward computes again with what forward computed, which would keep it
        alive in between; as in `jax.checkpoint`, False is right and faster in the body of a scan.

    Returns:
      A function of the same arguments.

    Raises:
      ValueError: (when called) ``params`` or ``inputs`` of the policy that name no argument; patterns of the policy
        that match no residual.
      TypeError: (when differentiated) forward-mode or second-order differentiation, for codes have no derivative.
    """
    if not isinstance(policy, ResidualPolicy):
        hint = "; memjax.remat.checkpoint takes policies by name" if isinstance(policy, str) else ""
        raise TypeError(f"policy must be a ResidualPolicy, got {type(policy).__name__}{hint}")
    params = (params,) if isinstance(params, int | str) else tuple(params)

    @functools.wraps(f)
    def compressed(*args: Any, **kwargs: Any) -> Any:
        call = flatten_call(told_of_packing(f, policy), args, kwargs, params, policy.inputs)
        settings = Settings(policy, call.roles, seed if isinstance(seed, int) else 0, prevent_cse)
        words = () if isinstance(seed, int) else seed_words(seed(*args, **kwargs))
        outputs = _transform(call.fn, settings)(*words, *call.values)
        return jax.tree.unflatten(call.out_tree(), outputs)

    _compressed[compressed] = f, policy, params
    return compressed


def told_of_packing(f: Callable[..., Any], policy: ResidualPolicy | None) -> Callable[..., Any]:
    """Returns ``f`` such that operations in it see whether their residuals are packed; see `memjax.core.packing`."""
    packs = policy is not None and policy.packs

    def told(*args: Any, **kwargs: Any) -> Any:
        with packing(packs):
            return f(*args, **kwargs)

    return told


def parts_of(f: Callable[..., Any]) -> tuple[Callable[..., Any], ResidualPolicy, tuple[int | str, ...]] | None:
    """Returns the function, the policy and the params of which `compress_residuals` made ``f``, if it did."""
    return _compressed.get(f) if inspect.isfunction(f) else None


class Call(NamedTuple):
    """A call of a function in terms of its arrays.

    Attributes:
      fn: function of the arrays that returns the flat outputs.
      values: the arrays.
      roles: what each of them is.
      out_tree: returns the structure of the output, once ``fn`` was traced.
    """

    fn: Callable[..., list[Any]]
    values: list[Any]
    roles: tuple[Role, ...]
    out_tree: Callable[[], Any]


def flatten_call(
    f: Callable[..., Any], args: Any, kwargs: Any, params: Sequence[int | str], inputs: Sequence[int | str]
) -> Call:
    """Returns ``f(*args, **kwargs)`` as a call of a flat function.

    Raises:
      ValueError: entries of ``params`` or ``inputs`` that name no argument.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_view)
    labels = [path_name(keys[1:]) for keys, _ in flat]
    leaves = [leaf for _, leaf in flat]
    dynamic = [
        i for i, leaf in enumerate(leaves) if is_view(leaf) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
    ]
    is_param = named("params", params, labels, len(args))
    encode = named("inputs", inputs, labels, len(args))
    values, parts = jax.tree.flatten([leaves[i] for i in dynamic])
    roles: list[Role] = []
    for i in dynamic:
        weight = is_param[i] or is_view(leaves[i])
        for keys, _ in jax.tree_util.tree_leaves_with_path(leaves[i]):
            label = f"{labels[i]}/{path_name(keys)}" if keys else labels[i]
            roles.append(Role(label, "param" if weight else "input", encode[i] and not weight))
    trees: list[Any] = []

    def fn(*values: Any) -> list[Any]:
        full = list(leaves)
        for i, leaf in zip(dynamic, jax.tree.unflatten(parts, values)):
            full[i] = leaf
        args, kwargs = jax.tree.unflatten(tree, full)
        outputs, out_tree = jax.tree.flatten(f(*args, **kwargs))
        trees.append(out_tree)
        return outputs

    return Call(fn, values, tuple(roles), lambda: trees[-1])


def hoist(call: Call) -> tuple[Jaxpr, tuple[Role, ...], list[Any]]:
    """Returns the jaxpr of a call, with what it captures as first arguments; their roles and all arguments."""
    body, _ = jaxpr_compat.trace(call.fn, *call.values)
    captured = jaxpr_compat.consts_of(body)
    roles = tuple(Role(f"captured/{i}", "captured") for i in range(len(captured)))
    return jaxpr_compat.without_consts(body), roles + call.roles, [*captured, *call.values]


def named(field: str, entries: Sequence[int | str], labels: list[str], n_args: int) -> list[bool]:
    """Returns which labels the argument numbers and patterns name."""
    chosen = [False] * len(labels)
    for entry in entries:
        if isinstance(entry, int) and not 0 <= entry < n_args:
            raise ValueError(f"{field} names argument {entry} of a call with {n_args} positional arguments")
        found = [
            label.split("/")[0] == str(entry) if isinstance(entry, int) else match(entry, label) for label in labels
        ]
        if isinstance(entry, str) and not any(found):
            raise ValueError(f"{field} names {entry!r}, which matches no argument; they are: {', '.join(labels)}")
        chosen = [a or b for a, b in zip(chosen, found)]
    return chosen


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one flat function is compressed.

    Attributes:
      roles: of the last arguments; two seed words may come before them.
      takes_seeds: the function takes these words too, and makes nothing of them.
    """

    policy: ResidualPolicy
    roles: tuple[Role, ...]
    seed: int
    prevent_cse: bool
    takes_seeds: bool = False


def _transform(fn: Callable[..., Any], settings: Settings) -> Callable[..., list[Any]]:
    """Returns ``fn`` compressed, as a function of (seed words,) and arrays, or pytrees of a weight's arrays."""

    def call(*values: Any) -> list[Any]:
        seeds, values = values[: len(values) - len(settings.roles)], values[len(values) - len(settings.roles) :]
        leaves, tree = jax.tree.flatten(values)
        roles: list[Role] = []
        for value, role in zip(values, settings.roles):
            inner = jax.tree.leaves(value)
            roles += [role] if len(inner) == 1 and inner[0] is value else [Role(role.label, "param")] * len(inner)
        own_fn = functools.partial(fn, *seeds) if settings.takes_seeds else fn
        flat_fn = functools.partial(_call_on_leaves, own_fn, tree)
        body, all_roles, arrays = hoist(Call(flat_fn, leaves, tuple(roles), lambda: None))
        flat = dataclasses.replace(settings, roles=all_roles, takes_seeds=True)
        if settings.policy.has_patterns:
            rows = make_plan(linearize(body, arrays), all_roles, settings.policy).rows()
            settings.policy.check_names([row.residual.name for row in rows])
        custom = _custom(body, flat, len(seeds))
        if jaxpr_compat.is_staging():  # only then can lift meet it; by itself a jit would compile at every call
            custom = transformation("compress_residuals", flat)(custom)
        return custom(*seeds, *arrays)

    return call


def _call_on_leaves(fn: Callable[..., Any], tree: Any, *leaves: Any) -> Any:
    return fn(*jax.tree.unflatten(tree, leaves))


def _custom(body: Jaxpr, settings: Settings, n_seeds: int) -> Callable[..., list[Any]]:
    """Returns a jaxpr, called with seed words before its arguments, with the derivative of `compress_residuals`."""
    plans: dict[Any, Plan] = {}

    @jax.custom_vjp
    def evaluate(*values: Any) -> list[Any]:
        return jaxpr_compat.evaluate(body, values[n_seeds:])

    def forward(*primals: Any) -> tuple[list[Any], Saved]:
        seeds, values = ([p.value for p in part] for part in (primals[:n_seeds], primals[n_seeds:]))
        types = tuple(map(jax.typeof, values))
        if types not in plans:
            plans[types] = make_plan(linearize(body, values), settings.roles, settings.policy)
        perturbed = [bool(p.perturbed and jnp.issubdtype(p.value.dtype, jnp.inexact)) for p in primals[n_seeds:]]
        return _forward(plans[types], perturbed, settings, values, seeds)

    def backward(saved: Saved, cotangents: list[Any]) -> tuple[Any, ...]:
        given = [jaxpr_compat.instantiate(ct) for ct in cotangents if ct.dtype != jax.dtypes.float0]
        return (*[None] * n_seeds, *_backward(saved, given, settings.prevent_cse))

    evaluate.defvjp(forward, backward, symbolic_zeros=True)
    return evaluate


register_transformation("compress_residuals", _transform)


# ---- what is stored ------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """One bit per element, packed along one axis."""

    axis: int


class Row(NamedTuple):
    """What happens to one array that reverse mode keeps.

    Attributes:
      residual: the array.
      action: "param", "captured", "input", "rebuilt", "shared", "kept", "1-bit", "4-bit" and the like.
      stored_bytes: bytes that are stored for it.
    """

    residual: Residual
    action: str
    stored_bytes: int


class Choice(NamedTuple):
    """What the gradients of some of the arguments take.

    Attributes:
      arguments: which arguments these are.
      stored: which of the stored arrays they need.
      by_reference: which of the arguments that are handed on they need.
      backward: the equations of the function that compute what it kept again.
      transpose: the equations of its transpose.
    """

    arguments: tuple[bool, ...]
    stored: list[bool]
    by_reference: list[bool]
    backward: list[JaxprEqn]
    transpose: list[JaxprEqn]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a linearized function keeps its residuals.

    Attributes:
      linearized: the function.
      stored: variables to store, each with its codec, a `Mask`, or None to keep it as it is.
      offloaded: which of them go to host memory.
      forward: the equations that compute the outputs and what is stored.
      by_reference: numbers of the arguments that are handed on as they are.
      main: variable that is kept -> the variable that stands for it, itself or another of the same values.
      described: variable that is kept, or stands for some -> its row.
      choices: made so far by `choose`.
    """

    linearized: Linearized
    stored: list[tuple[Any, Codec | Mask | None]]
    offloaded: list[bool]
    forward: list[JaxprEqn]
    by_reference: list[int]
    main: dict[Any, Any]
    described: dict[Any, Row]
    choices: list[Choice]

    def choose(self, arguments: Sequence[bool]) -> int:
        """Returns the number in ``choices`` for the gradients of some arguments."""
        for i, choice in enumerate(self.choices):
            if choice.arguments == tuple(arguments):
                return i
        jaxpr, variables = self.linearized.jaxpr, [v for v, _ in self.stored]
        leaves = self.linearized.leaves_for(arguments)
        known = [*jaxpr.invars, *jaxpr.constvars, *variables]
        backward, used = jaxpr_compat.needed(jaxpr.eqns, known, leaves)
        stored = [v in used for v in variables]
        by_reference = [jaxpr.invars[i] in used for i in self.by_reference]
        transpose, _ = self.linearized.gradients_of(arguments)
        self.choices.append(Choice(tuple(arguments), stored, by_reference, backward, transpose))
        return len(self.choices) - 1

    def rows(self, arguments: Sequence[bool] | None = None) -> list[Row]:
        """Returns what is kept for the gradients of some arguments, by default of all."""
        leaves = self.linearized.leaves_for(arguments or [True] * len(self.linearized.jaxpr.invars))
        rows, seen = [], set()
        for v in leaves:
            main = self.main.get(v, v)
            rows.append(self.described[v] if main in seen else self.described[main])
            seen.add(main)
        return rows


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("stored", "arguments", "choice"), meta_fields=("plan",)
)
@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """What forward hands to backward.

    jax keeps the structure of residuals per call of a function, not per choice of the arguments that are
    differentiated, so it is the same for all choices: what a choice does not need is cut to size zero.

    Attributes:
      stored: codes and arrays, as ``plan.stored`` says.
      arguments: those that ``plan.by_reference`` says.
      choice: ``[0, n]`` for choice number n.
    """

    stored: list[Any]
    arguments: list[Any]
    choice: jax.Array
    plan: Plan


def make_plan(linearized: Linearized, roles: Sequence[Role], policy: ResidualPolicy) -> Plan:
    """Decides for every array that reverse mode keeps what is stored of it."""
    jaxpr, origins = linearized.jaxpr, Origins(linearized.jaxpr, roles)
    levels = evaluate_levels(jaxpr, [_argument_level(role, v.aval) for role, v in zip(roles, jaxpr.invars)])
    kept = list(dict.fromkeys(v for v in linearized.leaves if not isinstance(v, Literal)))
    groups: dict[Any, list[Any]] = {}
    for v in kept:
        if levels[v] > Level.CHEAP:
            groups.setdefault(origins.root(v), []).append(v)
    total = sum(nbytes(v.aval) for group in groups.values() for v in group)

    main: dict[Any, Any] = {}
    described: dict[Any, Row] = {}
    stored: list[tuple[Any, Any]] = []
    for root, members in groups.items():
        role, is_smaller = origins.role(root), root.aval.size < members[0].aval.size
        target = root if len(members) > 1 or role is not None or is_smaller else members[0]
        residual = origins.describe(target)
        how: Codec | Mask | None = None
        if target.aval.dtype == jnp.bool_:
            how = _mask(target.aval.shape)
        elif jnp.issubdtype(target.aval.dtype, jnp.floating) and levels[target] == Level.DATA:
            how = policy.codec(residual, total) if role is None or role.encode else None
        if how is None and role is None and nbytes(root.aval) < nbytes(target.aval):
            target = root
        for v in members:
            main[v] = target
            if v is not target:
                described[v] = Row(origins.describe(v), "shared", 0)
        if role is None or role.encode:
            stored.append((target, how))
            described[target] = Row(residual, _action(how), _stored_bytes(how, target.aval))
        else:
            described[target] = Row(residual, "input", residual.nbytes)
    for v in kept:
        if v not in described:
            role = origins.role(v)
            described[v] = Row(origins.describe(v), "rebuilt" if role is None else role.kind, 0)

    variables = [v for v, _ in stored]
    known = [*jaxpr.invars, *jaxpr.constvars]
    outputs = [v for v in jaxpr.outvars[: linearized.n_outputs] if not isinstance(v, Literal)]
    forward, _ = jaxpr_compat.needed(jaxpr.eqns, known, [*outputs, *variables], effects=True)
    _, used = jaxpr_compat.needed(jaxpr.eqns, [*known, *variables], kept)
    by_reference = [i for i, v in enumerate(jaxpr.invars) if v in used and v not in variables]
    offloaded = [policy.offload is not None and v.aval.size >= policy.min_size for v in variables]
    return Plan(linearized, stored, offloaded, forward, by_reference, main, described, [])


def _argument_level(role: Role, aval: Any) -> Level:
    if role.kind == "param":
        return Level.PARAM
    return Level.CHEAP if role.kind == "captured" or not jnp.issubdtype(aval.dtype, jnp.inexact) else Level.DATA


def _mask(shape: tuple[int, ...]) -> Mask | None:
    axes = [axis for axis in range(-1, -len(shape) - 1, -1) if shape[axis] and shape[axis] % 8 == 0]
    return Mask(axes[0]) if axes else None


def _action(how: Codec | Mask | None) -> str:
    if how is None:
        return "kept"
    if isinstance(how, Mask):
        return "1-bit"
    return "fp8" if type(how).__name__ == "Fp8" else f"{how.bits}-bit"


def _stored_bytes(how: Codec | Mask | None, aval: Any) -> int:
    return nbytes(jax.eval_shape(lambda x: _store(how, x), jax.ShapeDtypeStruct(aval.shape, aval.dtype)))


# ---- forward and backward ------------------------------------------------------------------------------------------


def _forward(
    plan: Plan, perturbed: Sequence[bool], settings: Settings, values: Sequence[Any], seeds: Sequence[Any]
) -> tuple[list[Any], Saved]:
    jaxpr, number = plan.linearized.jaxpr, plan.choose(perturbed)
    choice = plan.choices[number]
    env = dict(zip(jaxpr.constvars, jaxpr_compat.consts_of(jaxpr))) | dict(zip(jaxpr.invars, values))
    nearest = settings.policy.rounding == "nearest"
    codecs = {v: how for (v, how), use in zip(plan.stored, choice.stored) if use and nearest and isinstance(how, Codec)}
    made = on_codes.run_and_encode(plan.forward, env, codecs)
    outputs = [jaxpr_compat.read(env, atom) for atom in jaxpr.outvars[: plan.linearized.n_outputs]]
    stored = [
        made[v] if v in made else _store(how, env[v], _key(settings, seeds, i, env[v]))
        for i, (v, how) in enumerate(plan.stored)
    ]
    stored = [x if use else _cut(x) for x, use in zip(stored, choice.stored)]
    # Without the barrier the originals may stay alive until backward, to be encoded there.
    forwarded = [any(output is value for value in values) for output in outputs]
    coded = [how is not None and use for (_, how), use in zip(plan.stored, choice.stored)]
    if any(coded):
        fresh, codes = lax.optimization_barrier(
            ([x for x, same in zip(outputs, forwarded) if not same], [x for x, c in zip(stored, coded) if c])
        )
        rest, packed = iter(fresh), iter(codes)
        outputs = [x if same else next(rest) for x, same in zip(outputs, forwarded)]
        stored = [next(packed) if c else x for x, c in zip(stored, coded)]
    moved = [off and use for off, use in zip(plan.offloaded, choice.stored)]
    stored = [_move(x, jax.memory.Space.Host) if m else x for x, m in zip(stored, moved)]
    arguments = [values[i] if use else _cut(values[i]) for i, use in zip(plan.by_reference, choice.by_reference)]
    return outputs, Saved(stored, arguments, lax.full((0, number), False), plan)


def _cut(tree: Any) -> Any:
    """Cuts arrays to size zero, along an axis that a vmap or a scan outside did not add."""
    return jax.tree.map(lambda x: lax.slice_in_dim(x, 0, 0, axis=x.ndim - 1) if x.ndim else x, tree)


def _backward(saved: Saved, cotangents: list[Any], prevent_cse: bool) -> list[Any]:
    plan, jaxpr = saved.plan, saved.plan.linearized.jaxpr
    choice = plan.choices[saved.choice.shape[-1]]
    env = dict(zip(jaxpr.constvars, jaxpr_compat.consts_of(jaxpr)))
    for i, x, use in zip(plan.by_reference, saved.arguments, choice.by_reference):
        if use:
            env[jaxpr.invars[i]] = x
    if prevent_cse:
        inputs = dict.fromkeys(v for eqn in choice.backward for v in eqn.invars if not isinstance(v, Literal))
        read = [v for v in inputs if _is_numeric(env.get(v))]
        again, cotangents = lax.optimization_barrier(([env[v] for v in read], cotangents))
        env.update(zip(read, again))
    codes: dict[Any, Packed] = {}
    for (v, how), x, off, use in zip(plan.stored, saved.stored, plan.offloaded, choice.stored):
        if use:
            x = _move(x, jax.memory.Space.Device) if off else x
            env[v] = _restore(how, x)
            if isinstance(x, Packed):
                codes[v] = x
    return gradients(plan, choice, env, cotangents, codes)


def gradients(
    plan: Plan, choice: Choice, env: dict[Any, Any], cotangents: Sequence[Any], codes: Mapping[Any, Packed] = _NONE
) -> list[Any]:
    """Returns the gradient of every argument, None for those that were not chosen.

    Args:
      env: the arguments and what is stored, as far as the choice needs them, by variable of the function.
      cotangents: of the floating-point outputs.
      codes: of which variables in ``env`` there are codes.
    """
    on_codes.run(choice.backward, env, codes)
    transpose = plan.linearized.transpose
    inner = dict(zip(transpose.constvars, jaxpr_compat.consts_of(transpose)))
    inner_codes: dict[Any, Packed] = {}
    for v, atom in zip(transpose.invars, plan.linearized.leaves):
        if isinstance(atom, Literal) or atom in env:
            inner[v] = jaxpr_compat.read(env, atom)
        if not isinstance(atom, Literal) and atom in codes:
            inner_codes[v] = codes[atom]
    inner.update(zip(transpose.invars[len(plan.linearized.leaves) :], cotangents))
    on_codes.run(choice.transpose, inner, inner_codes)
    found = iter(transpose.outvars)
    grads = []
    for v, chosen in zip(plan.linearized.jaxpr.invars, choice.arguments):
        atom = next(found) if jnp.issubdtype(_aval_of(v).dtype, jnp.inexact) else None
        grads.append(jaxpr_compat.read(inner, atom) if chosen else None)
    return grads


def _aval_of(v: Any) -> Any:
    return v.aval


def _is_numeric(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, np.number)


def _key(settings: Settings, seeds: Sequence[Any], leaf: int, x: Any) -> Any:
    """Returns the seed of one array for stochastic rounding, None for nearest."""
    if settings.policy.rounding == "nearest":
        return None
    shard = [lax.axis_index(name).astype(jnp.uint32) for name in jaxpr_compat.varying_axes(x)]
    return jnp.stack([*(seeds or [np.uint32(settings.seed & 0xFFFFFFFF)]), np.uint32(leaf), *shard])


def _store(how: Codec | Mask | None, x: Any, key: Any = None) -> Any:
    if how is None:
        return x
    if isinstance(how, Mask):
        return pack(x.astype(jnp.uint8), 1, how.axis, 8)[0]
    return _encode(how, on_codes.mark(x), key)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _encode(codec: Codec, x: jax.Array, key: Any) -> Packed:
    return codec.encode(x, -1, key)


def _restore(how: Codec | Mask | None, stored: Any) -> Any:
    if how is None:
        return stored
    if isinstance(how, Mask):
        return unpack((stored,), 1, how.axis, 8).astype(jnp.bool_)
    return stored.decode()


def _move(x: Any, space: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space), x)
