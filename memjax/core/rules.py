"""The registry of lift rules: how an operation consumes weight views.

`memjax.lift` evaluates the jaxpr of a function. Where a view meets an equation, it looks for a rule under the
equation's primitive name; for calls of functions wrapped by `operation`, under the operation's name; and a function
wrapped by `transformation` it lifts before it transforms it again. A room registers its own operations and
transformations here, so that it need not import the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

_OPERATION_PREFIX = "memjax."
_rules: dict[str, Callable[..., Any]] = {}
_transformations: dict[str, Callable[..., Callable[..., Any]]] = {}


def register_rule(name: str, rule: Callable[..., Any]) -> None:
    """Registers how the operation ``name`` is evaluated when at least one of its inputs is a weight view.

    Args:
      name: the name given to `operation`.
      rule: called as ``rule(lift, *arguments)``: the arguments as the operation got them, with opaque weights where
        views stood, which only functions wrapped by the given ``lift`` take in place of arrays; returns what the
        operation returns. Operations with settings get them as ``settings=``.

    Raises:
      ValueError: the name has a rule already.
    """
    if name in _rules:
        raise ValueError(f"operation {name!r} has a lift rule already")
    _rules[name] = rule


class _SettingsName(str):
    """The name of a nested jit, which jax hands through its transformations, with settings attached."""

    settings: Any


def operation(name: str, settings: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function as one operation that `memjax.lift` sees whole instead of tracing into it.

    The function takes arrays as positional arguments; close over settings. A rule registered under ``name`` then
    evaluates it on views, with ``settings`` where they are given; without a rule, lift descends into the function as
    into any other.
    """

    return functools.partial(_named, name, settings)


def _named(name: str, settings: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fn`` as a nested jit whose name `memjax.lift` knows."""

    @functools.wraps(fn)
    def named(*arrays: Any) -> Any:
        return fn(*arrays)

    named.__name__ = jit_name = _SettingsName(_OPERATION_PREFIX + name)
    jit_name.settings = settings
    return jax.jit(named)


def rule_for(jit_name: str) -> Callable[..., Any] | None:
    """Returns the rule of the operation that a nested jit of this name is, if there is one."""
    name, settings = operation_of(jit_name)
    rule = _rules.get(name)
    return rule if rule is None or settings is None else functools.partial(rule, settings=settings)


def operation_of(jit_name: str) -> tuple[str, Any]:
    """Returns the name and the settings of the operation that a nested jit of this name is; else "" and None."""
    own = jit_name.startswith(_OPERATION_PREFIX)
    return (jit_name.removeprefix(_OPERATION_PREFIX), getattr(jit_name, "settings", None)) if own else ("", None)


def register_transformation(name: str, apply: Callable[..., Callable[..., Any]]) -> None:
    """Registers how a function transformation is applied again to a function of weight views.

    Args:
      name: the name given to `transformation`.
      apply: called as ``apply(fn, settings)``; returns the transformed ``fn``, a function of the same positional
        arguments, any of which may be a pytree of arrays that stands for a weight.

    Raises:
      ValueError: the name has a transformation already.
    """
    if name in _transformations:
        raise ValueError(f"transformation {name!r} is registered already")
    _transformations[name] = apply


def transformation(name: str, settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a `jax.custom_vjp` function of arrays as what the transformation ``name`` made of its primal function.

    `memjax.lift` cannot look into a function with its own derivative. Where views reach one that is marked, it lifts
    the primal function and applies the registered transformation with the same ``settings`` to the result.
    """

    return functools.partial(_named, name, settings)


def transformation_for(jit_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Returns ``fn -> transformed fn`` if a nested jit of this name is what `transformation` marked."""
    name = jit_name.removeprefix(_OPERATION_PREFIX)
    if not isinstance(jit_name, _SettingsName) or name not in _transformations:
        return None
    return functools.partial(_transformations[name], settings=jit_name.settings)
