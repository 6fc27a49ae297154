"""What reverse mode keeps of a function, and where each array of it comes from."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.core import jaxpr_compat
from memjax.core.bytes import nbytes
from memjax.core.jaxpr_compat import Jaxpr, JaxprEqn
from memjax.core.jaxpr_compat import Literal as Constant


class Role(NamedTuple):
    """What one flat argument of a function is.

    Attributes:
      label: its path, starting with the argument number.
      kind: a weight; captured from an enclosing trace; or any other argument.
      encode: the policy names it among the inputs to encode.
    """

    label: str
    kind: Literal["param", "captured", "input"]
    encode: bool = False


@dataclass(frozen=True)
class Residual:
    """An array that reverse mode keeps.

    Attributes:
      name: the path of the argument that it is, else the name that `jax.ad_checkpoint.checkpoint_name` gave it, else
        ``function/primitive``; numbered where that is not unique.
      shape, dtype: of the array.
      origin: ``file:line (function)`` of the equation that made it; empty for arguments.
      is_input: whether it is an argument.
      local_size: size of the last axis on one device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    origin: str
    is_input: bool
    local_size: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return nbytes(jax.ShapeDtypeStruct(self.shape, self.dtype))


class Level(enum.IntEnum):
    """What a value depends on; it is at the highest level of its inputs.

    PARAM: weights and constants. CHEAP: also on captured values and integer arguments, through cheap operations; both
    can be computed again in backward. CHOSEN: one of several such values, by a condition on data. DATA: all else.
    """

    PARAM = 0
    CHEAP = 1
    CHOSEN = 2
    DATA = 3


_EXPENSIVE = {
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "conv_general_dilated",
    "pallas_call",
    "ffi_call",
    "while",
    "sort",
    "fft",
    "random_bits",
    "random_gamma",
    "rng_bit_generator",
    "threefry2x32",
}
_LAYOUT = {
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "convert_element_type",
    "name",
    "copy",
    "copy_p",
    "reduce_precision",
    "stop_gradient",
}


def levels_of(jaxpr: Jaxpr, inputs: Sequence[Level]) -> list[Level]:
    """Returns the levels of the outputs of a jaxpr."""
    env = evaluate_levels(jaxpr, inputs)
    return [_level(env, atom) for atom in jaxpr.outvars]


def evaluate_levels(jaxpr: Jaxpr, inputs: Sequence[Level]) -> dict[Any, Level]:
    """Returns the level of every variable at the top of a jaxpr."""
    env: dict[Any, Level] = dict.fromkeys(jaxpr.constvars, Level.PARAM)
    env.update(zip(jaxpr.invars, inputs))
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _output_levels(eqn, [_level(env, atom) for atom in eqn.invars])))
    return env


def _level(env: dict[Any, Level], atom: Any) -> Level:
    return Level.PARAM if isinstance(atom, Constant) else env[atom]


def _output_levels(eqn: JaxprEqn, inputs: list[Level]) -> list[Level]:
    name, highest = eqn.primitive.name, max(inputs, default=Level.PARAM)
    if highest in (Level.PARAM, Level.DATA) and min(inputs, default=highest) == highest:
        return [highest] * len(eqn.outvars)
    if name == "scan":
        loop = jaxpr_compat.scan_parts(eqn)
        start, stop = loop.n_consts, loop.n_consts + loop.n_carry
        while True:
            outputs = levels_of(loop.body, inputs)
            carry = [max(a, b) for a, b in zip(inputs[start:stop], outputs)]
            if carry == inputs[start:stop]:
                return outputs
            inputs = [*inputs[:start], *carry, *inputs[stop:]]
    if name == "cond":
        condition, *operands = inputs
        branches = [levels_of(branch, operands) for branch in eqn.params["branches"]]
        at_least = Level.CHOSEN if condition >= Level.CHOSEN else condition
        return [max(at_least, *outputs) for outputs in zip(*branches)]
    if name in ("jit", "custom_jvp_call", "custom_vjp_call", "closed_call", "eval_jaxpr", "checkpoint", "remat2"):
        return levels_of(jaxpr_compat.body_of(eqn), inputs)
    if name == "shard_map":
        return levels_of(jaxpr_compat.shard_map_parts(eqn).body, inputs)
    if highest == Level.CHEAP and name in _EXPENSIVE:
        highest = Level.DATA
    return [highest] * len(eqn.outvars)


class Linearized(NamedTuple):
    """A function's forward pass for reverse mode and what remains to be done backward.

    Attributes:
      jaxpr: flat arguments -> outputs, then what is kept; nested jits are in line.
      n_outputs: how many outputs come first.
      transpose: what is kept, then cotangents of floating-point outputs -> gradients of floating-point arguments.
    """

    jaxpr: Jaxpr
    n_outputs: int
    transpose: Jaxpr

    @property
    def leaves(self) -> list[Any]:
        """The variables and constants that are kept."""
        return self.jaxpr.outvars[self.n_outputs :]

    def gradients_of(self, arguments: Sequence[bool]) -> tuple[list[JaxprEqn], set[Any]]:
        """Returns the equations of ``transpose`` that the gradients of some arguments take, and the inputs they use."""
        floating = [_is_floating(v) for v in self.jaxpr.invars]
        chosen = [a for a, f in zip(arguments, floating) if f]
        wanted = [v for v, c in zip(self.transpose.outvars, chosen) if c and not isinstance(v, Constant)]
        known = [*self.transpose.invars, *self.transpose.constvars]
        return jaxpr_compat.needed(self.transpose.eqns, known, wanted)

    def leaves_for(self, arguments: Sequence[bool]) -> list[Any]:
        """Returns the variables of ``leaves`` that the gradients of some arguments take."""
        used = self.gradients_of(arguments)[1]
        pairs = zip(self.leaves, self.transpose.invars)
        return list(dict.fromkeys(v for v, inner in pairs if inner in used and not isinstance(v, Constant)))


def linearize(jaxpr: Jaxpr, values: Sequence[Any]) -> Linearized:
    """Traces reverse mode of a jaxpr at ``values``, with respect to all that are floating point."""
    floating = [bool(jnp.issubdtype(x.dtype, jnp.inexact)) for x in values]
    seen: list[Any] = []

    def forward(*values: Any) -> list[Any]:
        def of(*variables: Any) -> list[Any]:
            rest = iter(variables)
            return jaxpr_compat.evaluate(jaxpr, [next(rest) if f else v for v, f in zip(values, floating)])

        outputs, vjp = jax.vjp(of, *(v for v, f in zip(values, floating) if f))
        leaves, tree = jax.tree.flatten(vjp)

        def backward(leaves: list[Any], cotangents: list[Any]) -> Any:
            given = iter(cotangents)
            full = [next(given) if _is_floating(y) else np.zeros(y.shape, jax.dtypes.float0) for y in outputs]
            return jax.tree.unflatten(tree, leaves)(full)

        seen.append((len(outputs), jax.make_jaxpr(backward)(leaves, [y for y in outputs if _is_floating(y)])))
        return [*outputs, *leaves]

    traced = jax.make_jaxpr(forward)(*values)
    if any(map(jaxpr_compat.is_call, traced.eqns)):
        traced = jax.make_jaxpr(lambda *values: jaxpr_compat.inline(traced, values))(*values)
    return Linearized(traced, *seen[-1])


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(getattr(x, "aval", x).dtype, jnp.inexact))


class Origins:
    """The equation behind every variable at the top of a jaxpr, and names for what it makes."""

    def __init__(self, jaxpr: Jaxpr, roles: Sequence[Role]):
        self._eqns = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._roles = dict(zip(jaxpr.invars, roles))
        self._tags = {
            self.root(eqn.outvars[0]): eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"
        }
        self._count: dict[str, int] = {}

    def role(self, variable: Any) -> Role | None:
        """Returns the role of an argument, None for other variables."""
        return self._roles.get(variable)

    def root(self, variable: Any) -> Any:
        """Returns the first variable of which this one is another layout, or a cast that loses nothing."""
        while (eqn := self._eqns.get(variable)) is not None and _is_layout(eqn):
            variable = eqn.invars[0]
        return variable

    def describe(self, variable: Any) -> Residual:
        """Returns a description with a name that no description before had."""
        role, root = self._roles.get(variable), self.root(variable)
        eqn = self._eqns.get(root if root in self._eqns else variable)
        aval = _aval(variable)
        if role is not None:
            name = role.label
        elif root in self._tags:
            name = self._tags[root]
        elif eqn is None:
            name = "constant"
        else:
            parts = [
                part for part in jaxpr_compat.source_function(eqn).split(".<locals>.") if part[:1] not in ("", "<")
            ]
            name = "/".join([*parts[-1:], eqn.primitive.name])
        self._count[name] = self._count.get(name, 0) + 1
        if self._count[name] > 1:
            name = f"{name}#{self._count[name]}"
        origin = "" if eqn is None else jaxpr_compat.source_line(eqn)
        return Residual(name, tuple(aval.shape), aval.dtype, origin, role is not None, jaxpr_compat.local_size(aval))


def _is_layout(eqn: JaxprEqn) -> bool:
    name = eqn.primitive.name
    if name not in _LAYOUT or len(eqn.invars) != 1 or isinstance(eqn.invars[0], Constant):
        return False
    if name == "convert_element_type":
        return _holds(eqn.params["new_dtype"], _aval(eqn.invars[0]).dtype)
    if name == "reduce_precision":
        format = jnp.finfo(_aval(eqn.outvars[0]).dtype)
        return (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) == (format.nexp, format.nmant)
    return True


def _aval(atom: Any) -> Any:
    return atom.aval


def _holds(wide: Any, narrow: Any) -> bool:
    """Returns whether every value of the dtype ``narrow`` is one of ``wide``."""
    if narrow == jnp.bool_ or narrow == wide:
        return True
    if not (jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)):
        return False
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return a.nmant >= b.nmant and a.nexp >= b.nexp
