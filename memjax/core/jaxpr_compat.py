"""The only module that touches jax internals, and the parts of jaxpr equations that differ between jax versions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util
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


def source_line(eqn: JaxprEqn) -> str:
    """Returns ``file:line (function)`` of the user code behind an equation."""
    return source_info_util.summarize(eqn.source_info)


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


def has_shardings(eqn: JaxprEqn) -> bool:
    """Returns whether a nested jit fixes the sharding of an input or output."""
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return any(sharding is not UNSPECIFIED for sharding in shardings)


def body_of(eqn: JaxprEqn) -> Jaxpr:
    """Returns the jaxpr that a jit, checkpoint or custom-derivative equation calls."""
    return eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["jaxpr"]
