"""The registry of lift rules: how an operation consumes weight views.

`memjax.lift` evaluates the jaxpr of a function. Where a view meets an equation, it looks for a rule under the
equation's primitive name; for calls of functions wrapped by `operation`, under the operation's name. A room registers
the rules of its own operations here, so that it need not import the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

_OPERATION_PREFIX = "memjax."
_rules: dict[str, Callable[..., Any]] = {}


def register_rule(name: str, rule: Callable[..., Any]) -> None:
    """Registers how the operation ``name`` is evaluated when at least one of its inputs is a weight view.

    Args:
      name: the name given to `operation`.
      rule: called as ``rule(lift, *arguments)``: the arguments as the operation got them, with opaque weights where
        views stood, which only functions wrapped by the given ``lift`` take in place of arrays; returns what the
        operation returns.

    Raises:
      ValueError: the name has a rule already.
    """
    if name in _rules:
        raise ValueError(f"operation {name!r} has a lift rule already")
    _rules[name] = rule


def operation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function as one operation that `memjax.lift` sees whole instead of tracing into it.

    The function takes arrays as positional arguments; close over settings. A rule registered under ``name`` then
    evaluates it on views; without a rule, lift descends into the function as into any other.
    """

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def named(*arrays: Any) -> Any:
            return fn(*arrays)

        named.__name__ = _OPERATION_PREFIX + name
        return jax.jit(named)

    return wrap


def rule_for(jit_name: str) -> Callable[..., Any] | None:
    """Returns the rule of the operation that a nested jit of this name is, if there is one."""
    if not jit_name.startswith(_OPERATION_PREFIX):
        return None
    return _rules.get(jit_name.removeprefix(_OPERATION_PREFIX))
