"""The only module that touches jax internals, and the parts of jaxpr equations that differ between jax versions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util
from jax._src.ad_util import SymbolicZero, Zero
from jax._src.core import trace_ctx
from jax._src.interpreters import partial_eval
from jax._src.interpreters.ad import instantiate_zeros
from jax._src.named_sharding import UNSPECIFIED
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

__all__ = ["Jaxpr", "JaxprEqn", "Literal", "Var"]


class Loop(NamedTuple):
    """Parts of a scan equation; its inputs are ``consts + init + xs``."""

    body: Jaxpr
    n_consts: int
    n_carry: int
    length: int
    reverse: bool
    unroll: int


class While(NamedTuple):
    """Parts of a while equation; its inputs are ``condition consts + body consts + init``."""

    condition: Jaxpr
    body: Jaxpr
    n_condition_consts: int
    n_body_consts: int


class ShardMap(NamedTuple):
    """Parts of a shard_map equation."""

    body: Jaxpr
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    check_vma: bool
    manual_axes: frozenset[str]


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Any]:
    """Returns the jaxpr of ``fn(*args)`` with its constants attached, and the pytree of output shapes."""
    return jax.make_jaxpr(fn, return_shape=True)(*args)


def _varying(leaves: Sequence[Any]) -> frozenset[str]:
    names: frozenset[str] = frozenset()
    for leaf in leaves:
        kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
        names |= frozenset(getattr(kind, "varying", None) or ())
    return names


def abstract_like(shape: tuple[int, ...], dtype: Any, leaves: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """Returns an abstract array that varies over every manual mesh axis over which a leaf does."""
    varying = _varying(leaves)
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    inside = next(leaf for leaf in leaves if _varying([leaf]))  # others may be constants from outside the shard_map
    sharding = jax.typeof(inside).sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind)


def vary_like(x: jax.Array, leaves: Sequence[Any]) -> jax.Array:
    """Returns ``x`` marked as varying over every manual mesh axis over which a leaf does (its transpose sums)."""
    missing = tuple(sorted(_varying(leaves) - _varying([x])))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def consts_of(jaxpr: Jaxpr) -> list[Any]:
    """Returns the constants of a (nested) jaxpr, one per ``jaxpr.constvars``."""
    return list(jaxpr.consts)


def without_consts(jaxpr: Jaxpr) -> Jaxpr:
    """Returns a jaxpr that takes its constants as its first arguments."""
    return partial_eval.convert_constvars_jaxpr(jaxpr)


def varying_axes(x: Any) -> tuple[str, ...]:
    """Returns the manual mesh axes over which ``x`` is known to vary; none where shard_map does not check."""
    return tuple(sorted(_varying([x])))


def is_staging() -> bool:
    """Returns whether the code that runs is being traced into a jaxpr, at whatever depth of other transforms."""
    trace: Any = trace_ctx.trace
    while trace is not None:
        if isinstance(trace, partial_eval.DynamicJaxprTrace):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


def source_line(eqn: JaxprEqn) -> str:
    """Returns ``file:line (function)`` of the user code behind an equation."""
    return source_info_util.summarize(eqn.source_info)


def source_function(eqn: JaxprEqn) -> str:
    """Returns the name of the user function behind an equation, or an empty string."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return "" if frame is None else frame.function_name


@contextlib.contextmanager
def eqn_context(eqn: JaxprEqn) -> Iterator[None]:
    """Restores the name stack, the source line and the configuration under which an equation was traced."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation on arrays; custom derivative rules stay attached."""
    outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def read(env: Mapping[Any, Any], atom: Any) -> Any:
    """Returns the value of a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]


Bind = Callable[[JaxprEqn, Sequence[Any]], Sequence[Any]]


def evaluate(jaxpr: Jaxpr, args: Sequence[Any], by: Bind = bind) -> list[Any]:
    """Evaluates a jaxpr, each equation by ``by``; every equation keeps its source line."""
    env = dict(zip(jaxpr.constvars, consts_of(jaxpr))) | dict(zip(jaxpr.invars, args))
    run(jaxpr.eqns, env, by)
    return [read(env, atom) for atom in jaxpr.outvars]


def run(eqns: Sequence[JaxprEqn], env: dict[Any, Any], by: Bind = bind) -> None:
    """Evaluates equations in turn by ``by(eqn, values) -> outputs``, reading and writing their variables in ``env``."""
    for eqn in eqns:
        values = [read(env, atom) for atom in eqn.invars]
        with eqn_context(eqn):
            env.update(zip(eqn.outvars, by(eqn, values)))


def inline(jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with its nested jits and checkpoints evaluated in place.

    Equations of library functions, which have no source line, get the line of the enclosing call.
    """
    env = dict(zip(jaxpr.constvars, consts_of(jaxpr))) | dict(zip(jaxpr.invars, args))
    for eqn in jaxpr.eqns:
        values = [read(env, atom) for atom in eqn.invars]
        with eqn_context(eqn) if source_function(eqn) else contextlib.nullcontext():
            env.update(zip(eqn.outvars, (inline(body_of(eqn), values) if is_call(eqn) else bind(eqn, values))))
    return [read(env, atom) for atom in jaxpr.outvars]


def is_call(eqn: JaxprEqn) -> bool:
    """Returns whether an equation calls a jaxpr and does nothing else that evaluating its body would lose."""
    name = eqn.primitive.name
    if name == "jit":
        return not has_shardings(eqn)
    return name in ("closed_call", "core_call", "eval_jaxpr") or (
        name in ("checkpoint", "remat2") and not eqn.params["differentiated"]
    )


def is_recomputation(eqn: JaxprEqn) -> bool:
    """Returns whether an equation is what `jax.checkpoint` does backward, and nothing keeps it apart from the rest."""
    return eqn.primitive.name in ("checkpoint", "remat2") and not eqn.params["prevent_cse"]


def needed(
    eqns: Sequence[JaxprEqn], known: Iterable[Any], wanted: Iterable[Any], effects: bool = False
) -> tuple[list[JaxprEqn], set[Any]]:
    """Returns the equations that compute ``wanted`` variables from ``known`` ones, and which known ones they use.

    Outputs of a loop or a branch that nothing needs are taken out of it. With ``effects``, equations that have
    effects stay.

    Raises:
      ValueError: a variable that does not follow from the known ones.
    """
    known = set(known)
    missing = {v for v in wanted if v not in known}
    used = {v for v in wanted if v in known}
    kept: list[JaxprEqn] = []
    for eqn in reversed(eqns):
        uses = [v in missing for v in eqn.outvars]
        if not any(uses) and not (effects and eqn.effects):
            continue
        rule = partial_eval.dce_rules.get(eqn.primitive)
        pruned = rule(uses, eqn)[1] if rule is not None and not all(uses) else eqn
        if pruned is None:
            continue
        kept.append(pruned)
        missing.difference_update(eqn.outvars)
        inputs = {v for v in pruned.invars if not isinstance(v, Literal)}
        used |= inputs & known
        missing |= inputs - known
    if missing:
        raise ValueError(f"variables {missing} do not follow from the known ones")
    return kept[::-1], used


def primal_of(jaxpr: Jaxpr) -> Callable[..., list[Any]] | None:
    """Returns the function that a jaxpr computes without its rule, if all it does is to call a custom_vjp function."""
    if [eqn.primitive.name for eqn in jaxpr.eqns] != ["custom_vjp_call"]:
        return None
    (eqn,) = jaxpr.eqns
    known = dict(zip(jaxpr.constvars, consts_of(jaxpr)))

    def primal(*args: Any) -> list[Any]:
        env = known | dict(zip(jaxpr.invars, args))
        env |= zip(eqn.outvars, evaluate(body_of(eqn), [read(env, atom) for atom in eqn.invars]))
        return [read(env, atom) for atom in jaxpr.outvars]

    return primal


def instantiate(x: Any) -> Any:
    """Returns the cotangent that a custom_vjp rule got as an array; symbolic zeros become zeros."""
    return instantiate_zeros(Zero(x.aval)) if isinstance(x, SymbolicZero) else x


def scan_parts(eqn: JaxprEqn) -> Loop:
    p = eqn.params
    n_consts, n_carry, _ = (len(part) for part in p["ft_in"].unpack())
    return Loop(p["jaxpr"], n_consts, n_carry, p["length"], p["reverse"], p["unroll"])


def while_parts(eqn: JaxprEqn) -> While:
    p = eqn.params
    return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])


def shard_map_parts(eqn: JaxprEqn) -> ShardMap:
    p = eqn.params
    return ShardMap(
        p["jaxpr"],
        p["mesh"],
        p["in_specs"],
        p["out_specs"],
        p["check_vma"],
        frozenset(p["newly_manual_axes"]),
    )


def out_shape(eqn: JaxprEqn) -> tuple[int, ...]:
    """Returns the shape of the first output of an equation."""
    aval: Any = eqn.outvars[0].aval
    return tuple(aval.shape)


def local_size(aval: Any) -> int:
    """Returns the size of the last axis on one device, as far as the type tells (with explicit mesh axes it does)."""
    if not aval.shape:
        return 1
    sharding: Any = getattr(aval, "sharding", None)
    entry = sharding.spec[-1] if sharding is not None and len(sharding.spec) == len(aval.shape) else None
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return aval.shape[-1] // math.prod(sharding.mesh.shape[name] for name in names)


def has_shardings(eqn: JaxprEqn) -> bool:
    """Returns whether a nested jit fixes the sharding of an input or output."""
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return any(sharding is not UNSPECIFIED for sharding in shardings)


def body_of(eqn: JaxprEqn) -> Jaxpr:
    """Returns the jaxpr that a jit, checkpoint or custom-derivative equation calls."""
    return eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["jaxpr"]
