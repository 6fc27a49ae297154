"""Arrays that a function closes over, made arguments of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from memjax.core import jaxpr_compat


def hoisted(f: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any], Any]:
    """Returns ``run(consts, *args)`` that computes ``f(*args)``, the arrays that f closes over, and f's output shapes.

    A function with a derivative of its own may not close over what is being differentiated or traced outside.

    Args:
      f: a pure function of pytrees of arrays.
      *args: arrays or abstract arrays of the shapes that f is called with.
    """
    jaxpr, out = jaxpr_compat.trace(f, *args)
    tree = jax.tree.structure(out)

    def run(consts: list[Any], *args: Any) -> Any:
        return jax.tree.unflatten(tree, jax.core.eval_jaxpr(jaxpr, consts, *jax.tree.leaves(args)))

    return run, jaxpr_compat.consts_of(jaxpr), out
