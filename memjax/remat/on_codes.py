"""Evaluates equations of which some variables are stored as codes, by the rules that operations have for codes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from memjax.codecs import Codec, Packed
from memjax.core import jaxpr_compat
from memjax.core.first_order import first_order
from memjax.core.jaxpr_compat import Jaxpr, JaxprEqn, Literal
from memjax.core.packing import CodesRule, codes_rules
from memjax.core.rules import operation_of

mark = first_order(
    "second-order differentiation through compress_residuals: what backward reads are codes, which have no "
    "derivative; differentiate the function without compress_residuals, or use ResidualPolicy(bits=32)"
)


def run_and_encode(eqns: Sequence[JaxprEqn], env: dict[Any, Any], codecs: Mapping[Any, Codec]) -> dict[Any, Packed]:
    """Evaluates equations as `jaxpr_compat.run` does.

    Args:
      eqns: equations.
      env: values by variable, to which those of the equations are added.
      codecs: variables that are to be encoded to nearest.

    Returns:
      The codes of those variables that an operation encoded in its own pass; the others are left.
    """
    made: dict[Any, Packed] = {}

    def by(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        own = [None if isinstance(atom, Literal) or atom in made else codecs.get(atom) for atom in eqn.invars]
        rule, settings = _rule(eqn) if any(own) else (CodesRule(), None)
        found = rule.make([mark(value) for value in values], own, settings) if rule.make is not None else None
        if found is None:
            return jaxpr_compat.bind(eqn, values)
        made.update((v, code) for v, how, code in zip(eqn.invars, own, found[1]) if how is not None)
        return jax.tree.leaves(found[0])

    jaxpr_compat.run(eqns, env, by)
    return made


def run(eqns: Sequence[JaxprEqn], env: dict[Any, Any], codes: Mapping[Any, Packed]) -> None:
    """Evaluates equations as `jaxpr_compat.run` does; operations read ``codes`` of variables where they have a rule.

    Values that only such operations read must be in ``env`` all the same; decoding them is dead code then.
    """
    jaxpr_compat.run(eqns, env, functools.partial(_bind, codes))


def _bind(codes: Mapping[Any, Packed], eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    own = [None if isinstance(atom, Literal) else codes.get(atom) for atom in eqn.invars]
    outputs = _read(eqn, values, own) if any(code is not None for code in own) else None
    return jaxpr_compat.bind(eqn, values) if outputs is None else outputs


def _read(eqn: JaxprEqn, values: Sequence[Any], codes: Sequence[Packed | None]) -> list[Any] | None:
    """Returns the outputs of an equation some of whose inputs are codes, or None if it is to be bound as it is."""
    rule, settings = _rule(eqn)
    if rule.read is not None:
        outputs = rule.read([mark(value) if code is None else code for value, code in zip(values, codes)], settings)
        return None if outputs is None else jax.tree.leaves(outputs)
    calls = jaxpr_compat.is_call(eqn) or jaxpr_compat.is_recomputation(eqn)
    if not calls or _operation(eqn)[0]:  # an operation without a rule stays one, for `memjax.lift`
        return None
    body = jaxpr_compat.body_of(eqn)
    inside = {v: code for v, code in zip(body.invars, codes) if code is not None}
    return jaxpr_compat.evaluate(body, values, functools.partial(_bind, inside))


def _rule(eqn: JaxprEqn) -> tuple[CodesRule, Any]:
    """Returns the rule and the settings of the whole operation that an equation is, with its derivative or without."""
    if eqn.primitive.name == "custom_vjp_call":
        body: Jaxpr = jaxpr_compat.body_of(eqn)
        whole = len(body.eqns) == 1 and body.eqns[0].invars == body.invars and body.eqns[0].outvars == body.outvars
        return _rule(body.eqns[0]) if whole else (CodesRule(), None)
    name, settings = _operation(eqn)
    rule = codes_rules.get(name, CodesRule())
    return (rule if len(eqn.outvars) == rule.results else CodesRule()), settings


def _operation(eqn: JaxprEqn) -> tuple[str, Any]:
    return operation_of(eqn.params["name"]) if eqn.primitive.name == "jit" else ("", None)
