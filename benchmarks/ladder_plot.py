"""The picture of one ladder: memory against speed, a point per rung."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

LADDER = "8B LoRA, 2 x 2048"
_INK, _GRID, _PAPER = "#333333", "#e3e3e3", "#ffffff"
_TICKS = (6, 8, 10, 15, 20, 30, 40, 50)
_LOOKS = {"memjax": ("#2f6db5", "o"), "plain_jax": ("#e07b39", "s"), "peft": ("#7a4fa3", "D")}
_PLACES = {
    "plain_jax": (0, -18, "center"),
    "memjax: exact operations": (0, 9, "center"),
    "residuals in 8 bits": (10, -2, "left"),
    "residuals in 4 bits": (5, -20, "left"),
    "what linear layers give in 4 bits": (8, 20, "right"),
    "base in int8": (-4, -17, "right"),
    "base in NF4": (-9, 2, "right"),
    "so, and embedding and head in int8": (9, -10, "left"),
    "embedding and head in int8": (9, -6, "left"),
    "AdamW in 8 bits": (-7, -18, "left"),
}
"""Rung -> where its name stands: points right of and above its mark, and the end that is there; others to the right."""


def ladder_svg(recorded: dict[str, Any], ladder: str = LADDER) -> str:
    """Returns an SVG of a ladder's rungs: GiB at their peak, in a logarithmic scale, and tokens/s.

    Args:
      recorded: of the suite `ladder`: ``runs`` and ``rows``.
      ladder: which; its rungs must be of one run.

    Raises:
      ValueError: if there are no such rungs, or some of another run.
    """
    rows = [row for row in recorded["rows"] if row["case"].startswith(f"{ladder}/") and "error" not in row]
    runs = {row["run"] for row in rows}
    if len(runs) != 1:
        raise ValueError(f"the rungs of {ladder!r} must be of one run, they are of {sorted(runs)}")
    facts = recorded["runs"][runs.pop()]

    with matplotlib.rc_context({"svg.hashsalt": "memjax", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9, 5.2), facecolor=_PAPER)
        axes = figure.add_axes((0.085, 0.11, 0.89, 0.77), facecolor=_PAPER)
        for stack, (color, marker) in _LOOKS.items():
            points = [(row["peak_gib"], row["tokens_per_s"]) for row in rows if row["stack"] == stack]
            line = "-" if stack == "memjax" else "none"
            axes.plot(*zip(*points), linestyle=line, color=color, marker=marker, markersize=7, label=stack)
        for row in rows:
            _name(axes, row)
        _frame(axes, rows)
        figure.text(0.085, 0.945, f"{ladder}, {facts['device']}", color=_INK, fontsize=12)
        figure.text(
            0.085, 0.9, f"jax {facts['versions']['jax']}; further left and higher is better", color=_INK, fontsize=9
        )
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def _name(axes: Any, row: dict[str, Any]) -> None:
    rung = row["case"].partition("/")[2]
    right, up, end = _PLACES.get(rung, (10, -4, "left"))
    axes.annotate(
        rung.removeprefix("memjax: "),
        (row["peak_gib"], row["tokens_per_s"]),
        xytext=(right, up),
        textcoords="offset points",
        ha=end,
        color=_LOOKS[row["stack"]][0],
        fontsize=9,
    )


def _frame(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    sizes, speeds = ([row[key] for row in rows] for key in ("peak_gib", "tokens_per_s"))
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    axes.set_ylim(min(speeds) * 0.9, max(speeds) * 1.07)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("peak GiB", color=_INK)
    axes.set_ylabel("tokens/s", color=_INK)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, labelcolor="linecolor")
