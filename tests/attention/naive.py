"""Attention with a table of S x T scores, and values with gradients, for tests."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.random_views import array


def operands(s, t=None, h=4, hk=2, b=2, d=8, dv=12):
    t = s if t is None else t
    return tuple(array(i, b, *shape) for i, shape in enumerate(((s, h, d), (t, hk, d), (t, hk, dv))))


def weights(q, k, table, scale=None):
    """Returns the softmax weights ``[B, H, S, T]`` of keys where ``table`` is true, 0 in rows with none."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    some = table.any(-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(table | ~some, scores, -jnp.inf)), 0) * table


def naive(q, k, v, table):
    v = jnp.repeat(v, q.shape[2] // v.shape[2], 2)
    return jnp.einsum("bhqk,bkhd->bqhd", weights(q, k, table), v)


def value_and_gradients(fn, *args):
    """Returns ``fn(*args)`` and the gradients for a cotangent that differs from element to element."""
    y, back = jax.vjp(fn, *args)
    return y, back(jnp.cos(y))


def same(fn, expected, *args, tolerance=2e-5):
    """Asserts that two functions have the same values and gradients."""
    pair = jax.jit(lambda *a: [value_and_gradients(f, *a) for f in (fn, expected)])(*args)
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(a, b, tolerance, tolerance)
    return pair[0]


def shapes_of(fn, *args):
    """Returns the sizes of all arrays in the program of a function."""
    text = str(jax.make_jaxpr(fn)(*args))
    return {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}


def causal(s, t):
    return np.arange(t) <= np.arange(s)[:, None] + t - s
