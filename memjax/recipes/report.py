"""Where the bytes of a training step are: by formula, as compiled and as measured; and the leaves of a model."""

from __future__ import annotations

import resource
import sys
from typing import Any, NamedTuple

import jax
from rich.table import Table

from memjax.core.bytes import CompiledBytes, nbytes
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view
from memjax.recipes.train import TrainState

CATEGORIES = (
    "packed weights",
    "dense weights",
    "trained weights",
    "gradients",
    "optimizer state",
    "activations and temporaries",
)


class ByteRow(NamedTuple):
    """One category of `byte_report`."""

    category: str
    formula_bytes: int
    compiled_bytes: int | None  # None: in the next row that has a number
    measured_bytes: int | None  # None: not known of one category


class ByteReport(NamedTuple):
    """Bytes of a training step by category, with the total as the last row."""

    rows: tuple[ByteRow, ...]
    measured_by: str

    @property
    def total(self) -> ByteRow:
        return self.rows[-1]

    def as_dict(self) -> dict[str, Any]:
        """Returns what `json.dumps` takes."""
        return {"rows": [row._asdict() for row in self.rows], "measured_by": self.measured_by}

    def table(self) -> Table:
        """Returns the table for a `rich` console."""
        table = Table(
            "bytes", title="Memory of the training step", caption=f"measured: {self.measured_by}", title_justify="left"
        )
        for column in ("formula", "compiled", "measured"):
            table.add_column(column, justify="right")
        for row in self.rows:
            compiled = "in the next" if row.compiled_bytes is None else human(row.compiled_bytes)
            measured = "" if row.measured_bytes is None else human(row.measured_bytes)
            if row is self.total:
                table.add_section()
            table.add_row(row.category, human(row.formula_bytes), compiled, measured)
        return table


def human(count: int) -> str:
    """Returns bytes in the largest binary unit that leaves at least 1, such as ``98.3 MiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def byte_report(
    frozen: Any, state: TrainState, compiled: CompiledBytes, activation_bytes: int, accumulate: int = 1
) -> ByteReport:
    """Accounts for the bytes of a training step.

    Formula: weights, trained weights and optimizer state as they are stored; gradients as large as the trained weights
    (twice with accumulation: the sum and one microbatch's); activations and temporaries as given. Compiled: the total
    is argument + output + temp - alias; the weights and the state are arguments of the program, and what remains
    is gradients, activations, temporaries and the batch together. Measured: the peak of the device's allocator, or
    without one, on CPU, of the whole process. Call it after training steps have run.

    Args:
      frozen: the frozen params, weight views included.
      state: the training state.
      compiled: of the compiled step, see `memjax.core.bytes.compiled_bytes`.
      activation_bytes: by formula, see `llama_activation_bytes`.
      accumulate: microbatches per step.

    Raises:
      ValueError: the compiled step has smaller arguments than ``frozen`` and ``state``: it is of other shapes.
    """
    packed = sum(nbytes(leaf) for _, leaf in leaf_paths(frozen) if is_view(leaf))
    held = (packed, nbytes(frozen) - packed, nbytes(state.theta), nbytes(state.opt_state))
    if compiled.argument < sum(held):
        raise ValueError(
            f"the compiled step takes {compiled.argument} bytes, less than the {sum(held)} bytes of its weights and "
            "state: it was compiled for others, or does not use all of them"
        )
    formula = (*held[:3], held[2] * (2 if accumulate > 1 else 1), held[3], activation_bytes)
    by_xla = (*held[:3], None, held[3], compiled.total - sum(held))
    peak, measured_by = measured_peak()
    rows = [ByteRow(name, f, c, None) for name, f, c in zip(CATEGORIES, formula, by_xla, strict=True)]
    return ByteReport((*rows, ByteRow("total", sum(formula), compiled.total, peak)), measured_by)


def measured_peak() -> tuple[int, str]:
    """Returns the peak so far in bytes, and what was measured."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], f"allocator peak of {device.device_kind}"
    unit = 1 if sys.platform == "darwin" else 1024
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return rss, "peak resident memory of the whole process on CPU, with Python, libraries, loading and compiling"


def format_of(leaf: Any) -> str:
    """Returns how a leaf is stored: the codec of a packed view, else its dtype."""
    packed = getattr(leaf, "packed", None)
    return str(leaf.dtype) if packed is None else str(getattr(packed.codec, "name", packed.codec))


def leaf_table(params: Any, title: str) -> Table:
    """Returns a table of leaves with their formats, shapes, bytes and bits per weight, for a `rich` console."""
    table = Table("leaf", "format", "shape", title=title, title_justify="left")
    for column in ("weights", "bytes", "bits/weight"):
        table.add_column(column, justify="right")
    leaves = leaf_paths(params)
    for path, leaf in leaves:
        size, count = leaf.size, nbytes(leaf)
        table.add_row(
            path, format_of(leaf), " x ".join(map(str, leaf.shape)), f"{size:,}", human(count), f"{8 * count / size:.2f}"
        )
    size, count = sum(leaf.size for _, leaf in leaves), nbytes(params)
    table.add_section()
    table.add_row("total", "", "", f"{size:,}", human(count), f"{8 * count / size:.2f}")
    return table
