"""Reversible residual blocks: backward computes a block's input from its output, so no layer keeps anything.

Sources: Gomez et al., "The Reversible Residual Network", 2017; Kitaev et al., "Reformer: The Efficient Transformer",
2020.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.core import jaxpr_compat
from memjax.remat._closures import hoisted

Branch = Callable[[Any, jax.Array], jax.Array]


class Reversible(NamedTuple):
    """A block of two streams and its inverse.

    Attributes:
      forward: ``((f, g), x1, x2) -> (y1, y2)``: ``y1 = x1 + F(f, x2)`` and ``y2 = x2 + G(g, y1)``.
      inverse: ``((f, g), y1, y2) -> (x1, x2)``, exact up to rounding.
    """

    forward: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    inverse: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def reversible(F: Branch, G: Branch) -> Reversible:
    """Returns the reversible block of two residual branches.

    Args:
      F, G: ``branch(params, x) -> y`` with y of the shape of x; pure, so that a second run gives the same (a random
        branch takes its key from params).
    """

    def forward(params: Any, x1: jax.Array, x2: jax.Array) -> tuple[jax.Array, jax.Array]:
        y1 = x1 + F(params[0], x2)
        return y1, x2 + G(params[1], y1)

    def inverse(params: Any, y1: jax.Array, y2: jax.Array) -> tuple[jax.Array, jax.Array]:
        x2 = y2 - G(params[1], y1)
        return y1 - F(params[0], x2), x2

    return Reversible(forward, inverse)


def reversible_scan(F: Branch, G: Branch, params: Any, x1: jax.Array, x2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs a stack of reversible blocks; backward needs the last output alone.

    Backward undoes block by block, which costs one more forward. What it recovers is off by rounding that grows with
    depth: hold the streams in float32 (branches may compute in bfloat16 inside). The gradients of a stack
    of 24 random blocks were off by 2e-6 in float32, and by 0.33 in bfloat16, where plain differentiation was by 0.16.

    Args:
      F, G: ``branch(params, x) -> y`` as in `reversible`; arrays that they close over get gradients too.
      params: a pair of pytrees, for F and for G, of arrays ``[L, ...]``; integers and keys are allowed.
      x1, x2: the two streams, float ``[...]`` of one dtype.

    Returns:
      (y1, y2) after L blocks.

    Raises:
      ValueError: a branch that changes the shape or the dtype of its stream.
    """
    params = tuple(params)
    runs, consts = [], []
    for name, branch, own, x in (("F", F, params[0], x2), ("G", G, params[1], x1)):
        slices = jax.tree.map(lambda leaf: jaxpr_compat.abstract_like(leaf.shape[1:], leaf.dtype, [leaf]), own)
        run, closed, out = hoisted(branch, slices, x)
        if (getattr(out, "shape", None), getattr(out, "dtype", None)) != (x.shape, x.dtype):
            raise ValueError(f"branch {name} must return {x.dtype}{list(x.shape)} like the stream it takes, got {out}")
        runs.append(run)
        consts.append(closed)
    return _scan(tuple(runs), tuple(consts), params, x1, x2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(runs: Any, consts: Any, params: Any, x1: jax.Array, x2: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(carry: Any, params: Any) -> tuple[Any, None]:
        return _block(runs, consts).forward(params, *carry), None

    return lax.scan(step, (x1, x2), params)[0]


def _block(runs: Any, consts: Any) -> Reversible:
    F, G = (functools.partial(run, closed) for run, closed in zip(runs, consts))
    return reversible(F, G)


def _forward(runs: Any, consts: Any, params: Any, x1: jax.Array, x2: jax.Array) -> Any:
    y = _scan(runs, consts, params, x1, x2)
    return y, (consts, params, y)


def _backward(runs: Any, kept: Any, slopes: Any) -> Any:
    consts, params, y = kept

    def undo(carry: Any, params: Any) -> Any:
        """Undoes one block: from its outputs and their gradients to its inputs and theirs."""
        (y1, y2), (d1, d2), sums = carry
        out, back_g = jax.vjp(runs[1], consts[1], params[1], y1)
        x2 = y2 - out
        *of_g, through = back_g(d2)
        d1 = d1 + through
        out, back_f = jax.vjp(runs[0], consts[0], params[0], x2)
        x1 = y1 - out
        *of_f, through = back_f(d1)
        of_consts, of_params = zip(of_f, of_g)
        sums = [total + new.astype(jnp.float32) for total, new in zip(sums, _floats(of_consts, consts))]
        return ((x1, x2), (d1, d2 + through), sums), _floats(of_params, params)

    sums = [jaxpr_compat.vary_like(jnp.zeros(x.shape, jnp.float32), [x]) for x in _floats(consts, consts)]
    (_, slopes, sums), of_params = lax.scan(undo, (y, tuple(slopes), sums), params, reverse=True)
    of_consts = [total.astype(x.dtype) for total, x in zip(sums, _floats(consts, consts))]
    return _refill(of_consts, consts), _refill(of_params, params), *slopes


_scan.defvjp(_forward, _backward)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _floats(tree: Any, like: Any) -> list[Any]:
    """Returns the leaves of ``tree`` where those of ``like``, of the same structure, are floats."""
    return [leaf for leaf, x in zip(jax.tree.leaves(tree), jax.tree.leaves(like)) if _is_float(x)]


def _refill(floats: list[Any], like: Any) -> Any:
    """Returns a tree like ``like`` of gradients: ``floats`` where it holds floats, None elsewhere."""
    rest = iter(floats)
    return jax.tree.map(lambda x: next(rest) if _is_float(x) else None, like)
