"""`report`: what reverse mode keeps of a function, array by array, and what a policy makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memjax.remat.compress import Row, flatten_call, hoist, make_plan, named, parts_of, told_of_packing
from memjax.remat.policy import ResidualPolicy
from memjax.remat.residuals import Level, Linearized, Origins, Role, evaluate_levels, linearize


@dataclass(frozen=True)
class Report:
    """What reverse mode keeps of one call of a function.

    Attributes:
      rows: one for each array.
    """

    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are stored for the call; under a scan, each step adds as many."""
        return sum(row.stored_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("residual", "shape", "dtype", "bytes", "action", "stored", "origin")
        table = [header]
        for row in self.rows:
            r = row.residual
            shape = "x".join(map(str, r.shape)) or "scalar"
            table.append((r.name, shape, str(r.dtype), f"{r.nbytes:,}", row.action, f"{row.stored_bytes:,}", r.origin))
        table.append(("total", "", "", "", "", f"{self.nbytes:,}", ""))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        right = {3, 5}
        return "\n".join(
            "  ".join(x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths))).rstrip()
            for line in table
        )


def report(
    f: Callable[..., Any],
    *args: Any,
    params: Sequence[int | str] = (0,),
    policy: ResidualPolicy | None = None,
    wrt: Sequence[int | str] | None = None,
) -> Report:
    """Returns what reverse mode keeps of ``f(*args)``, and where it comes from; nothing is computed.

    Weights and captured values are kept by reference and count nothing; other arguments count in full, as under a scan
    over layers they do. Rows of one array in several layouts count once where the policy stores it once.

    Args:
      f: a function of pytrees; of what `compress_residuals` returned, its policy and its params are taken.
      args: arrays or `jax.ShapeDtypeStruct` s.
      params: which arguments hold weights, as in `compress_residuals`.
      policy: how arrays would be stored; None: as jax does without `compress_residuals`.
      wrt: which arguments are differentiated, given like ``params``; None: all that are floating point. Captured values
        are not.

    Raises:
      ValueError: ``params``, ``wrt`` or the policy name what is not there.
    """
    if (parts := parts_of(f)) is not None:
        f, own_policy, params = parts
        policy = own_policy if policy is None else policy
    params = (params,) if isinstance(params, int | str) else tuple(params)
    call = flatten_call(told_of_packing(f, policy), args, {}, params, () if policy is None else policy.inputs)
    chosen = [True] * len(call.roles)
    if wrt is not None:
        entries = (wrt,) if isinstance(wrt, int | str) else wrt
        chosen = named("wrt", entries, [role.label for role in call.roles], len(args))
    body, roles, values = hoist(call)
    chosen = [False] * (len(roles) - len(chosen)) + chosen
    linearized = linearize(body, values)
    if policy is None:
        rows = plain_rows(linearized, roles, chosen)
    else:
        rows = make_plan(linearized, roles, policy).rows(chosen)
    return Report(tuple(rows))


def plain_rows(linearized: Linearized, roles: Sequence[Role], chosen: Sequence[bool]) -> list[Row]:
    """Returns the rows of a function that jax differentiates by itself."""
    origins = Origins(linearized.jaxpr, roles)
    # A scan keeps one copy for all steps of what depends on nothing that differs between them.
    same = [Level.PARAM if role.kind == "captured" else Level.DATA for role in roles]
    levels = evaluate_levels(linearized.jaxpr, same)
    rows = []
    for v in linearized.leaves_for(chosen):
        residual, role = origins.describe(v), origins.role(v)
        action = "kept" if levels[v] == Level.DATA else "invariant"
        action = action if role is None else str(role.kind)
        rows.append(Row(residual, action, residual.nbytes if action in ("input", "kept") else 0))
    return rows
