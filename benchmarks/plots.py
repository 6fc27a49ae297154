"""Pictures of memory against speed: the rungs of a ladder, and the policies for activations."""

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


_POLICY_PLACES = {
    "plain_jax none": (0, -17, "center"),
    "memjax none": (0, 8, "center"),
    "memjax 4bit": (9, -9, "left"),
    "memjax linear-4bit": (-6, 8, "right"),
    "plain_jax full": (8, -14, "left"),
    "memjax full": (10, 4, "left"),
    "memjax full-4bit": (-6, 9, "right"),
    "memjax full-8bit": (-10, -9, "right"),
    "memjax offload": (-9, -12, "right"),
}


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
    names = [row["case"].partition("/")[2] for row in rows]
    return _svg([(ladder, rows, names)], recorded["runs"][runs.pop()], _PLACES, "-")


def activations_svg(recorded: dict[str, Any]) -> str:
    """Returns an SVG of policies for activations, a picture for each model.

    Args:
      recorded: of the suite `activations`: ``runs`` and ``rows``; of each model, those of the run of its last
        `plain_jax` are taken.

    Raises:
      ValueError: if no row is of `plain_jax`.
    """
    rows = [row for row in recorded["rows"] if "error" not in row]
    panels, runs = [], []
    for model in dict.fromkeys(row["case"].rpartition("/")[0] for row in rows):
        of_model = [row for row in rows if row["case"].rpartition("/")[0] == model]
        runs.append(max((row["run"] for row in of_model if row["stack"] == "plain_jax"), default=""))
        chosen = [row for row in of_model if row["run"] == runs[-1]]
        panels.append((model, chosen, [row["case"].rpartition("/")[2] for row in chosen]))
    if not runs or "" in runs:
        raise ValueError(f"expected rows of plain_jax for every model, got {[row['case'] for row in rows]}")
    return _svg(panels, recorded["runs"][runs[0]], _POLICY_PLACES, "none")


def _svg(panels: Sequence[tuple[str, Any, Sequence[str]]], facts: Any, places: Any, line: str) -> str:
    """Returns panels below each other; each is (title, rows, what their points are called)."""
    with matplotlib.rc_context({"svg.hashsalt": "memjax", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        height = 5.2
        figure = Figure(figsize=(9, height * len(panels)), facecolor=_PAPER)
        for i, (title, rows, names) in enumerate(panels):
            bottom = 1 - (i + 1) / len(panels)

            def at(y: float, bottom: float = bottom) -> float:
                return bottom + y / len(panels)

            axes = figure.add_axes((0.085, at(0.11), 0.89, 0.77 / len(panels)), facecolor=_PAPER)
            for stack, (color, marker) in _LOOKS.items():
                points = [(row["peak_gib"], row["tokens_per_s"]) for row in rows if row["stack"] == stack]
                if points:
                    style = line if stack == "memjax" else "none"
                    axes.plot(*zip(*points), linestyle=style, color=color, marker=marker, markersize=7, label=stack)
            for row, name in zip(rows, names):
                _name(axes, row, name, places)
            _frame(axes, rows)
            figure.text(0.085, at(0.945), f"{title}, {facts['device']}", color=_INK, fontsize=12)
            about = f"jax {facts['versions']['jax']}; further left and higher is better"
            figure.text(0.085, at(0.9), about, color=_INK, fontsize=9)
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def _name(axes: Any, row: dict[str, Any], name: str, places: Any) -> None:
    right, up, end = places.get(name, (10, -4, "left"))
    axes.annotate(
        name.removeprefix("memjax").removeprefix(":").strip() or name,
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
