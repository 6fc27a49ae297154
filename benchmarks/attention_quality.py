"""What hiding keys costs in loss: SmolLM2-135M at its native 8192 tokens on the King James text, not trained for it.

Every case is a policy ``(q, k) -> mask`` that all layers ask; weights are the checkpoint's Q4_1, decoded, and all is
computed in bfloat16. Density is counted in the program, from the masks that the layers are given, in two ways that are
the same for all: elements that the masks show and blocks that hold such an element, as fractions of the causal ones.

    python -m benchmarks.attention_quality
    python -m benchmarks.attention_quality --cases dense 'window*' --keep
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # compiling takes longer than running

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from benchmarks import quality
from memjax import models
from memjax.attention import Mask, block_scores, block_topk, make_block_mask, masks, select_mass, vertical_slash
from memjax.ops import linear_cross_entropy
from memjax.recipes import data
from memjax.recipes.data import Windows

CONTEXT, BLOCK = 8192, 128
TINY_CONTEXT, TINY_BLOCK = 512, 32
PARTS = 8
"""Of a window, for the loss by position."""
SINKS = 4

Policy = Callable[[jax.Array, jax.Array], Mask]


def dense(q: jax.Array, k: jax.Array) -> Mask:
    """Returns the mask of all past keys."""
    return masks.causal()


def windowed(q: jax.Array, k: jax.Array, *, width: int) -> Mask:
    """Returns the mask of the last ``width`` keys, the query's own among them, and of the first few."""
    return masks.causal() & (masks.window(width - 1, 0) | masks.sink(SINKS))


def block_mass(q: jax.Array, k: jax.Array, *, tau: float, block: int) -> Mask:
    """Returns the mask of the blocks with ``tau`` of the mass of pooled scores, of the first one and the query's."""
    size = block, block
    scores = block_scores(q, k, blocks=size, mask=masks.causal())
    always = np.eye(scores.shape[-1], dtype=bool)
    always[:, 0] = True
    return masks.blocks(select_mass(scores, tau, scores.shape[-1])[0] | always, size) & masks.causal()


def policies(context: int, block: int) -> dict[str, Policy]:
    """Returns the policies for windows of ``context`` tokens, which select blocks of ``block`` queries and keys.

    The last one selects all blocks: what it differs by from dense attention is rounding.
    """
    size, count = (block, block), context // block
    found: dict[str, Policy] = {"dense": dense}
    for width in (context // 32, context // 8, context // 2):
        found[f"window {width} + {SINKS} sinks"] = functools.partial(windowed, width=width)
    for n in (4, 8, 16):
        found[f"block top-k, {n} of {count}"] = functools.partial(block_topk, n=n, size=size)
    for tau in (0.8, 0.95, 0.99):
        found[f"block mass {tau:g}"] = functools.partial(block_mass, tau=tau, block=block)
    for vertical, slash in ((64, 8), (256, 32), (1024, 128)):
        name = f"vertical-slash, {vertical} keys, {slash} diagonals"
        found[name] = functools.partial(vertical_slash, n_vertical=vertical, n_slash=slash, size=size)
    return found | {f"block top-k, {count} of {count}": functools.partial(block_topk, n=count, size=size)}


class Measured(NamedTuple):
    """What a policy gives.

    Attributes:
      nll: float32 ``[windows, context]``, of every target.
      shown: float32 ``[L]``, causal elements that the masks of a layer show, as a fraction.
      visited: float32 ``[L]``, likewise of blocks.
    """

    nll: Any
    shown: Any
    visited: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The model and the text.

    Attributes:
      model: with dense params.
      windows: held-out text ``[windows, context]``, evaluated in one batch.
      block: queries and keys of a block.
    """

    model: models.Model
    windows: Windows
    block: int

    def density(self, mask: Mask) -> tuple[jax.Array, jax.Array]:
        """Returns the fractions of causal elements shown and of causal blocks visited, means over batch and heads."""
        length, count = self.windows.inputs.shape[1], self.windows.inputs.shape[1] // self.block
        lists = make_block_mask(mask, length, length, blocks=(self.block, self.block))
        shown, visited = (
            jnp.asarray(per_row, jnp.float32).mean()
            for per_row in (mask.keys_seen(length, length), lists.by_query.total)
        )
        return shown / ((length + 1) / 2), visited / ((count + 1) / 2)

    def run(self, policy: Policy) -> Measured:
        """Returns the loss of every token and the density of every layer."""

        @jax.jit
        def measured(params: Any, batch: Windows) -> Measured:
            asked: list[tuple[jax.Array, jax.Array]] = []

            def counted(q: jax.Array, k: jax.Array) -> Mask:
                mask = policy(q, k)
                asked.append(self.density(mask))
                return mask

            stages = self.model.stages(batch.inputs, attention=counted)

            def layer(x: jax.Array, params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                return stages.block(params, x), asked.pop()

            x, (shown, visited) = jax.lax.scan(layer, stages.embed(params), stages.layers(params))
            weight, axis = self.model.head(params)
            hidden = stages.finish(params, x)
            nll = linear_cross_entropy(hidden, weight, batch.targets, w_axis=axis, reduction="none")
            return Measured(nll, shown, visited)

        return jax.device_get(measured(self.model.params, self.windows))

    @functools.cached_property
    def base(self) -> Measured:
        return self.run(dense)

    def measure(self, policy: Policy) -> dict[str, Any]:
        """Returns the row of a policy; losses are compared with those of dense attention on the same tokens."""
        found = self.base if policy is dense else self.run(policy)
        nll = np.asarray(found.nll, np.float64)
        increase = nll - self.base.nll

        def by_part(x: np.ndarray) -> list[float]:
            return x.reshape(len(x), PARTS, -1).mean((0, 2)).tolist()

        return {
            "layers": self.model.config.num_layers,
            "windows": list(nll.shape),
            "block": self.block,
            "shown": float(found.shown.mean()),
            "visited": float(found.visited.mean()),
            "shown_by_layer": found.shown.tolist(),
            "visited_by_layer": found.visited.tolist(),
            "nll": float(nll.mean()),
            "nll_by_part": by_part(nll),
            "increase": float(increase.mean()),
            "increase_by_part": by_part(increase),
            "increase_by_window": increase.mean(1).tolist(),
        }


def load(options: argparse.Namespace) -> Bench:
    """Loads the model and cuts the held-out text, of which a cut model, or a CPU, gets the first window only."""
    model = quality.load_model(options.gguf, options.tiny, options.layers, "bfloat16")
    model = dataclasses.replace(model, params=jax.jit(mj.core.materialize)(model.params))
    context, block = (TINY_CONTEXT, TINY_BLOCK) if options.tiny else (CONTEXT, BLOCK)
    small = options.tiny or options.layers or jax.default_backend() == "cpu"
    held_out = data.text_windows(quality.load_text(model.tokenizer)[1], context)
    return Bench(model, quality.head(held_out, 0, 1) if small else held_out, block)


def cases_of(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the cases, which share a `Bench` that the first of them loads."""
    bench = functools.cache(lambda: load(options))
    sizes = (TINY_CONTEXT, TINY_BLOCK) if options.tiny else (CONTEXT, BLOCK)
    return {name: lambda policy=policy: bench().measure(policy) for name, policy in policies(*sizes).items()}


if __name__ == "__main__":
    quality.main("attention_quality", cases_of)
