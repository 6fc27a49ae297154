"""Where the bytes of a training step are: by formula, as compiled and as measured; and a model's leaves."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Var
from rich import box
from rich.table import Table

from memjax.core.bytes import CompiledBytes, nbytes
from memjax.core.paths import leaf_paths
from memjax.core.views import is_view
from memjax.models import LlamaConfig
from memjax.parallel import device_bytes
from memjax.recipes.train import TrainState
from memjax.weights import Anchored, Dense
from memjax.weights.packed import format_of

CATEGORIES = (
    "packed weights",
    "dense weights",
    "adapter constants",
    "trained weights",
    "gradients",
    "optimizer state",
    "activations and temporaries",
)


class ByteRow(NamedTuple):
    """One category of `byte_report`."""

    category: str
    formula_bytes: int
    compiled_bytes: int | None  # None: among the activations and temporaries
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
            compiled = "in temporaries" if row.compiled_bytes is None else human(row.compiled_bytes)
            measured = "" if row.measured_bytes is None else human(row.measured_bytes)
            if row is self.total:
                table.add_section()
            table.add_row(row.category, human(row.formula_bytes), compiled, measured)
        return table


def residual_bytes(loss: Callable[..., Any], theta: Any, *arguments: Any) -> int:
    """Returns the bytes of device memory that reverse mode keeps between forward and backward, found by tracing.

    Weights and batches that are kept as they came in are not counted, nor what is in host memory, and each array
    counts once.

    Args:
      loss: ``loss(theta, *arguments)``, with an auxiliary output.
      theta: what is differentiated; arrays or `jax.ShapeDtypeStruct`, as are the arguments.
    """

    def kept(theta: Any, *arguments: Any) -> Any:
        return jax.vjp(lambda theta: loss(theta, *arguments), theta, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(kept)(theta, *arguments).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    found = {id(var): var.aval for var in jaxpr.outvars if isinstance(var, Var) and id(var) not in given}
    on_host = jax.memory.Space.Host
    return nbytes([aval for aval in found.values() if getattr(aval, "memory_space", None) != on_host])


def working_bytes(
    config: LlamaConfig,
    params: Any,
    batch: int,
    seq: int,
    chunk: int,
    by_blocks: bool = False,
    mlp_chunk: int | None = None,
) -> int:
    """Returns what one layer's backward pass, or one chunk of the loss, holds beside residuals, whichever is
    more.

    A lower bound: the backward pass of an MLP holds gate, up and their product with the gradients of all
    three; that of attention q, k, v and the output with theirs and, without cuDNN or blocks, the scores and
    their gradients in float32. Both hold the layer's input and the normalised input with their gradients. A chunk
    of the loss holds its logits in float32 and their gradients in the dtype of the model. Each product with a
    packed weight holds one decoded matrix. A compiler that fuses less holds more.

    Args:
      config: sizes.
      params: the frozen params, weight views included.
      batch: sequences per microbatch, B.
      seq: tokens per sequence, S.
      chunk: as in `memjax.ops.linear_cross_entropy`.
      by_blocks: attention has a mask or packed documents, and goes by blocks.
      mlp_chunk: as in `memjax.models.Llama`: gate, up and the like are of so many tokens.
    """
    dtype = params["norm"]["scale"].dtype
    item, tokens = dtype.itemsize, batch * seq
    in_layer = [leaf.size // config.num_layers for _, leaf in leaf_paths(params["layers"]) if _is_packed(leaf)]
    at_head = [leaf.size for _, leaf in leaf_paths(params.get("lm_head", params["embed_tokens"])) if _is_packed(leaf)]
    shared = 4 * config.hidden_size
    mlp = 6 * config.intermediate_size
    attention = 4 * config.head_dim * (config.num_heads + config.num_kv_heads)
    fused = jax.default_backend() == "gpu" and item == 2
    scores = 0 if fused or by_blocks else 2 * 4 * tokens * seq * config.num_heads
    in_mlp = shared * tokens + mlp * min(mlp_chunk or tokens, tokens)
    layer = max(in_mlp * item, (shared + attention) * tokens * item + scores)
    logits = (4 + item) * min(chunk, tokens) * config.vocab_size
    return max(layer + item * max(in_layer, default=0), logits + item * sum(at_head))


def human(count: int) -> str:
    """Returns bytes in the largest binary unit that leaves at least 1, such as ``98.3 MiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def byte_report(
    frozen: Any, state: TrainState, compiled: CompiledBytes, activation_bytes: int, gradient_bytes: int | None = None
) -> ByteReport:
    """Accounts for the bytes of a training step, on a mesh for those of one device.

    Formula: weights, trained weights and optimizer state as they are stored; gradients, activations and temporaries
    as given. Compiled: the total is argument + output + temp - alias; the weights and the state are arguments of
    the program, and what remains is gradients, activations, temporaries and the batch together. Measured: the
    peak of the device's allocator, or without one, on CPU, of the whole process. Call it after training steps
    have run.

    Args:
      frozen: the frozen params, weight views included.
      state: the training state.
      compiled: of the compiled step, see `memjax.core.bytes.compiled_bytes`.
      activation_bytes: by formula, see `residual_bytes` and `working_bytes`.
      gradient_bytes: by formula, see `memjax.recipes.optimizers.gradient_bytes`; None: those of all that is trained.

    Raises:
      ValueError: the compiled step has smaller arguments than ``frozen`` and ``state``: it is of other
        shapes.
    """
    anchors = [leaf for _, leaf in leaf_paths(frozen) if isinstance(leaf, Anchored)]
    constants = sum(device_bytes(leaf.constants) for leaf in anchors)
    packed = sum(device_bytes(_weight(leaf)) for _, leaf in leaf_paths(frozen) if _is_packed(leaf))
    dense = device_bytes(frozen) - packed - constants
    held = (packed, dense, constants, device_bytes(state.theta), device_bytes(state.opt_state))
    if compiled.argument < sum(held):
        raise ValueError(
            f"the compiled step takes {compiled.argument} bytes, less than the {sum(held)} bytes of its weights and "
            "state: it was compiled for others, or does not use all of them"
        )
    formula = (*held[:4], held[3] if gradient_bytes is None else gradient_bytes, held[4], activation_bytes)
    by_xla = (*held[:4], None, held[4], compiled.total - sum(held))
    peak, measured_by = measured_peak()
    rows = [ByteRow(name, f, c, None) for name, f, c in zip(CATEGORIES, formula, by_xla, strict=True)]
    return ByteReport((*rows, ByteRow("total", sum(formula), compiled.total, peak)), measured_by)


def _weight(leaf: Any) -> Any:
    """Returns a leaf of a frozen tree without an adapter's constants."""
    return leaf.base if isinstance(leaf, Anchored) else leaf


def _is_packed(leaf: Any) -> bool:
    return is_view(_weight(leaf)) and not isinstance(_weight(leaf), Dense)


def measured_peak() -> tuple[int, str]:
    """Returns the peak so far in bytes, and what was measured."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], f"allocator peak of {device.device_kind}"
    unit = 1 if sys.platform == "darwin" else 1024
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return rss, "peak resident memory of the whole process on CPU, with Python, libraries, loading and compiling"


def leaf_table(params: Any, title: str) -> Table:
    """Returns a `rich` table of leaves with their formats, shapes, bytes and bits of a weight."""
    leaves = leaf_paths(params)
    weights = sum(leaf.size for _, leaf in leaves)
    table = Table(
        title=f"{title}: {weights:,} weights", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("leaf", overflow="fold")
    table.add_column("format", no_wrap=True)
    for column in ("shape", "bytes", "bits"):
        table.add_column(column, justify="right", no_wrap=True)
    for path, leaf in leaves:
        shape = "x".join(map(str, leaf.shape))
        table.add_row(path, format_of(leaf), shape, human(nbytes(leaf)), f"{8 * nbytes(leaf) / leaf.size:.2f}")
    table.add_section()
    table.add_row("total", "", "", human(nbytes(params)), f"{8 * nbytes(params) / weights:.2f}")
    return table
