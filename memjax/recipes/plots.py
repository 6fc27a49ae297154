"""One picture of a run: the loss, and where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax.recipes.report import ByteReport

_INK, _GRID = "#333333", "#e3e3e3"
_BLUE, _LIGHT, _ORANGE = "#2f6db5", "#a9c6e8", "#e07b39"
_MIB = 2**20


def plot_run(
    path: str | Path,
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    report: ByteReport,
    title: str = "",
) -> None:
    """Writes a PNG with the loss curve on the left and bars of bytes on the right.

    Args:
      path: of the PNG.
      losses: training loss of every step, in nats.
      held_out: (steps done, loss in nats) of every evaluation.
      report: bytes by category.
      title: above both.
    """
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    figure.suptitle(title, color=_INK, fontsize=11)
    _loss(left, losses, held_out)
    _bytes(right, report)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _loss(axes: Axes, losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> None:
    axes.plot(range(len(losses)), losses, color=_LIGHT, linewidth=1, label="training, each batch")
    width = max(1, len(losses) // 5)
    means = [sum(losses[i - width : i]) / width for i in range(width, len(losses) + 1)]
    axes.plot(range(width - 1, len(losses)), means, color=_BLUE, linewidth=1.6, label=f"training, mean of {width}")
    axes.plot(*zip(*held_out), color=_ORANGE, marker="o", markersize=5, linewidth=1.6, label="held out")
    for (step, nll), offset in ((held_out[0], (8, 6)), (held_out[-1], (-4, 8))):
        axes.annotate(
            f"{nll:.3f}",
            (step, nll),
            xytext=offset,
            textcoords="offset points",
            fontsize=8,
            color=_ORANGE,
            ha="left" if step == held_out[0][0] else "right",
        )
    axes.set_xlabel("step", color=_INK, fontsize=9)
    axes.set_ylabel("loss (nats per token)", color=_INK, fontsize=9)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)


def _bytes(axes: Axes, report: ByteReport) -> None:
    names = [row.category.replace(" and ", " and\n") for row in report.rows]
    for shift, color, label in ((-0.19, _LIGHT, "formula"), (0.19, _BLUE, "compiled")):
        known = [(i + shift, getattr(row, f"{label}_bytes")) for i, row in enumerate(report.rows)]
        places, counts = zip(*((place, count / _MIB) for place, count in known if count is not None))
        bars = axes.barh(places, counts, height=0.36, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7, color=_INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("MiB", color=_INK, fontsize=9)
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="center right")
