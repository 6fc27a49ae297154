"""Bits per residual: a byte budget spent where the gradient needs it.

Sources: Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training", 2021; Liu et
al., "GACT: Activation Compressed Training for Generic Network Architectures", 2022 (measured sensitivities). Both take
bits away greedily, which is not the best choice where they go in steps of 2 and 4; here it is. GACT compares three
whole gradients for every array; here it is one backward pass with only that array packed, and one compiled program
serves all arrays.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.codecs import Codec
from memjax.core import jaxpr_compat
from memjax.remat.compress import Plan, flatten_call, gradients, hoist, make_plan, named
from memjax.remat.policy import ResidualPolicy
from memjax.remat.residuals import Residual, linearize

_PROBE = 4  # bits at which sensitivities are measured
_SUMS = 4096  # of sizes and errors that `allocate_bits` keeps


class Allocation(NamedTuple):
    """Bits for every residual that is packed.

    Attributes:
      policy: for `compress_residuals` of the same function.
      bits: residual name -> bits.
      sensitivity: residual name -> c, where packing it alone at b bits puts a relative error of about
        ``c / (2**b - 1)`` into the gradient.
      error: predicted relative error of the gradient: the root of the sum of their squares.
      stored_bytes: of all residuals of a call, those included that are not packed.
    """

    policy: ResidualPolicy
    bits: dict[str, int]
    sensitivity: dict[str, float]
    error: float
    stored_bytes: int


def allocate(
    f: Callable[..., Any],
    args: Sequence[Any],
    budget_bytes: int,
    *,
    params: Sequence[int | str] = (0,),
    policy: ResidualPolicy | None = None,
    choices: Sequence[int] = (2, 4, 8),
    wrt: Sequence[int | str] | None = None,
    slopes: Any = None,
) -> Allocation:
    """Chooses the bits of each residual for the least gradient error within a budget.

    Each residual's sensitivity is measured on the given arguments: the relative error, over all gradients together,
    when it alone is packed at 4 bits. Errors of several are taken to add as squares, and to be proportional to the
    step between codes; the bits are then `allocate_bits`.

    Args:
      f: the function that `compress_residuals` will wrap, such as the body of a scan over layers.
      args: one calibration batch of its arguments, arrays; for a scan's body those of one layer.
      budget_bytes: for all residuals of one call, as `report` counts them.
      params: which arguments hold weights, as in `compress_residuals`.
      policy: everything but the bits: group, inputs and so on; residuals that it keeps as they are stay so.
      choices: bits to choose from.
      wrt: which arguments are differentiated, as in `report`; give it where not all are, or names may differ.
      slopes: of the outputs of ``f``, for the gradients that are compared; by default 1 for a scalar output, else
        random normal.

    Raises:
      ValueError: a budget below what the fewest bits take, a policy with bits of its own for single residuals, a
        function of which nothing is packed, or gradients that are zero.
    """
    base = ResidualPolicy() if policy is None else policy
    if base.per_leaf is not None:
        raise ValueError("the policy has per_leaf already, which is what allocate chooses")
    if not choices or any(b not in (2, 3, 4, 6, 8) for b in choices):
        raise ValueError(f"choices must be among 2, 3, 4, 6 and 8 bits, got {choices!r}")
    params = (params,) if isinstance(params, int | str) else tuple(params)
    call = flatten_call(f, args, {}, params, base.inputs)
    chosen = [True] * len(call.roles)
    if wrt is not None:
        entries = (wrt,) if isinstance(wrt, int | str) else wrt
        chosen = named("wrt", entries, [role.label for role in call.roles], len(args))
    body, roles, values = hoist(call)
    chosen = [False] * (len(roles) - len(chosen)) + chosen
    linearized = linearize(body, values)
    packed = {row.residual.name for row in make_plan(linearized, roles, base).rows(chosen) if _is_packed(row.action)}
    if not packed:
        raise ValueError("of this function nothing is packed: all residuals are small, or kept by the policy")

    def plan_at(bits: Mapping[str, int]) -> Plan:
        policy = dataclasses.replace(base, per_leaf=lambda residual: bits.get(residual.name, 32))
        return make_plan(linearized, roles, policy)

    order: list[str] = []

    def probe(residual: Residual) -> int:
        order.append(residual.name)
        return _PROBE if residual.name in packed else 32

    plan = make_plan(linearized, roles, dataclasses.replace(base, per_leaf=probe))
    order = [name for name in order if name in packed]
    outputs = [v.aval for v in linearized.jaxpr.outvars[: linearized.n_outputs]]
    given = None if slopes is None else jax.tree.leaves(slopes)
    errors = _errors(plan, chosen, values, _slopes(outputs) if given is None else given, len(order))
    sensitivity = {name: float(error) * (2**_PROBE - 1) for name, error in zip(order, errors)}

    def stored(bits: Mapping[str, int]) -> int:
        return sum(row.stored_bytes for row in plan_at(bits).rows(chosen))

    lowest = dict.fromkeys(order, min(choices))
    least = stored(lowest)
    sizes = {name: {b: stored({**lowest, name: b}) - least for b in choices} for name in order}
    if budget_bytes < least:
        raise ValueError(f"budget_bytes={budget_bytes} is less than the {least} bytes that {min(choices)} bits take")
    found = allocate_bits(list(sizes.values()), list(sensitivity.values()), budget_bytes - least)
    bits = dict(zip(order, found))
    return Allocation(
        dataclasses.replace(base, per_leaf={glob.escape(name): b for name, b in bits.items()}),
        bits,
        sensitivity,
        math.sqrt(sum((sensitivity[name] / (2**b - 1)) ** 2 for name, b in bits.items())),
        least + sum(sizes[name][b] for name, b in bits.items()),
    )


def allocate_bits(sizes: Sequence[Mapping[int, float]], sensitivities: Sequence[float], budget: float) -> list[int]:
    """Returns bits b for each array such that the sum of ``(c / (2**b - 1))**2`` is least and sizes fit a budget.

    Array after array, all sums that no other sum beats in both size and error are kept. Beyond 4096 of them, only the
    best of those whose sizes differ by less than a 4096th of the budget.

    Args:
      sizes: for each array, bits -> bytes.
      sensitivities: c of each array.
      budget: bytes for all.

    Raises:
      ValueError: a budget below the sum of the smallest sizes.
    """
    rest = sum(min(size.values()) for size in sizes)
    if rest > budget:
        raise ValueError(f"a budget of {budget} bytes is less than the {rest} that the fewest bits take")
    front: list[tuple[float, float, tuple[int, ...]]] = [(0, 0, ())]  # size, error, bits
    for size, c in zip(sizes, sensitivities):
        rest -= min(size.values())
        longer = sorted(
            (total + own, error + (c / (2**b - 1)) ** 2, (*bits, b))
            for total, error, bits in front
            for b, own in size.items()
            if total + own + rest <= budget
        )
        front = []
        for sum_ in longer:
            if not front or sum_[1] < front[-1][1]:
                front.append(sum_)
        if len(front) > _SUMS:
            front = list({int(sum_[0] * _SUMS / budget): sum_ for sum_ in front}.values())
    return list(front[-1][2])


def _is_packed(action: str) -> bool:
    return action == "fp8" or (action.endswith("-bit") and action != "1-bit")


def _slopes(outputs: Sequence[Any]) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), max(len(outputs), 1))
    slopes: list[Any] = []
    for key, out in zip(keys, outputs):
        if not jnp.issubdtype(out.dtype, jnp.inexact):
            slopes.append(np.zeros(out.shape, jax.dtypes.float0))
        else:
            slopes.append(jax.random.normal(key, out.shape, out.dtype) if out.shape else jnp.ones((), out.dtype))
    return slopes


def _errors(plan: Plan, chosen: Sequence[bool], values: Sequence[Any], slopes: Sequence[Any], count: int) -> np.ndarray:
    """Returns the relative error of the gradients when one packed array alone is packed, for each of them."""
    jaxpr, choice = plan.linearized.jaxpr, plan.choices[plan.choose(chosen)]
    cotangents = [slope for slope in slopes if slope.dtype != jax.dtypes.float0]
    coded = [(v, how) for v, how in plan.stored if isinstance(how, Codec)]
    assert len(coded) == count

    @jax.jit
    def gradients_at(which: jax.Array, values: Sequence[Any]) -> Any:
        env = dict(zip(jaxpr.constvars, jaxpr_compat.consts_of(jaxpr))) | dict(zip(jaxpr.invars, values))
        jaxpr_compat.run(plan.forward, env)
        for i, (v, codec) in enumerate(coded):
            env[v] = lax.cond(which == i, lambda x, codec=codec: codec.encode(x, -1).decode(), lambda x: x, env[v])
        return [grad for grad in gradients(plan, choice, env, cotangents) if grad is not None]

    @jax.jit
    def error(got: Any, exact: Any) -> tuple[jax.Array, jax.Array]:
        wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(got, exact)]
        return jnp.stack([jnp.sum((a - b) ** 2) for a, b in wide]).sum(), jnp.stack(
            [jnp.sum(b**2) for _, b in wide]
        ).sum()

    exact = gradients_at(jnp.int32(-1), values)
    parts = [error(gradients_at(jnp.int32(i), values), exact) for i in range(count)]
    off, whole = np.asarray(parts, np.float64).T
    if not np.all(whole > 0):
        raise ValueError(
            f"the gradients that are compared have norm {math.sqrt(whole[0])}: choose other slopes or args"
        )
    return np.sqrt(off / whole)
