"""One technique a rung: from plain JAX to the least memory, at the shapes of an 8B and a 1B on one GPU.

Every memjax rung is a training step of `memjax finetune` with the settings in its row, on random weights and one batch
of random tokens; `plain_jax` and `peft` are those of the suite `finetune`. The quality of a rung is that of the same
technique in the suites that train real models, which the table names.

    python -m benchmarks.ladder
    python -m benchmarks.ladder --cases '8B LoRA*' --keep
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks import finetune, harness
from benchmarks.finetune import Shape
from benchmarks.shapes import LLAMAS


class Rung(NamedTuple):
    """A step of the ladder.

    Attributes:
      shape: model and batch.
      stack: "plain_jax", "peft" or "memjax".
      settings: of the run: what `plain_jax` names remat and moments, or fields of `FinetuneSettings`, and ``rest``, the
        format of embedding and head.
    """

    shape: Shape
    stack: str
    settings: dict[str, Any]


_B2, _B1 = Shape("llama-3.1-8b", 2, 2048), Shape("llama-3.1-8b", 1, 2048)
_LONG, _SMALL_LONG = Shape("llama-3.1-8b", 1, 32768), Shape("llama-3.2-1b", 1, 32768)
_SMALL, _TINY = Shape("llama-3.2-1b", 4, 2048), Shape("tiny", 2, 32)
_QLORA = {"format": "nf4", "remat": "full-4bit"}
_CHUNKS = {"remat": "full-4bit", "mlp_chunk": 4096}
_FULL = {"adapter": "none", "clip": None}
LADDERS: dict[str, tuple[Shape, dict[str, tuple[str, dict[str, Any]]]]] = {
    "8B LoRA, 2 x 2048": (
        _B2,
        {
            "plain_jax": ("plain_jax", {"remat": "none"}),
            "plain_jax, full remat": ("plain_jax", {"remat": "full"}),
            "peft + Liger": ("peft", {}),
            "peft + bitsandbytes + Liger": ("peft", {"format": "nf4"}),
            "memjax: exact operations": ("memjax", {"remat": "none"}),
            "residuals in 8 bits": ("memjax", {"remat": "8bit"}),
            "residuals in 4 bits": ("memjax", {"remat": "4bit"}),
            "what linear layers give in 4 bits": ("memjax", {"remat": "linear-4bit"}),
            "so, and embedding and head in int8": ("memjax", {"remat": "linear-4bit", "rest": "int8"}),
            "base in int8": ("memjax", {"remat": "4bit", "format": "int8"}),
            "base in NF4": ("memjax", {"remat": "4bit", "format": "nf4"}),
            "layer inputs in 4 bits": ("memjax", _QLORA),
            "embedding and head in int8": ("memjax", _QLORA | {"rest": "int8"}),
            "AdamW in 8 bits": ("memjax", _QLORA | {"rest": "int8", "optimizer": "adamw8bit"}),
        },
    ),
    "8B LoRA, 1 x 32768": (
        _LONG,
        {
            "plain_jax, full remat, 1 x 8192": ("plain_jax", {"remat": "full", "length": 8192}),
            "memjax: the last 1024 tokens and 4 sinks": ("memjax", {"attention": "window=1024,sinks=4"}),
            "the last 4096 tokens and 4 sinks": ("memjax", {"attention": "window=4096,sinks=4"}),
            "1024 and 4, layer inputs in 4 bits, the MLP in chunks": (
                "memjax",
                {"attention": "window=1024,sinks=4"} | _CHUNKS,
            ),
            "4096 and 4, layer inputs in 4 bits, the MLP in chunks": (
                "memjax",
                {"attention": "window=4096,sinks=4"} | _CHUNKS,
            ),
        },
    ),
    "1B LoRA, 1 x 32768": (
        _SMALL_LONG,
        {
            "memjax: all past tokens": ("memjax", {}),
            "the last 4096 tokens and 4 sinks": ("memjax", {"attention": "window=4096,sinks=4"}),
        },
    ),
    "8B, all weights, 1 x 2048": (
        _B1,
        {
            "plain_jax LoRA, full remat": ("plain_jax", {"remat": "full"}),
            "memjax: FRUGAL in 8 bits, layer by layer": (
                "memjax",
                _FULL | {"optimizer": "frugal8bit", "fused": True},
            ),
            "AdamW in 4 bits, layer by layer": ("memjax", _FULL | {"optimizer": "adamw4bit", "fused": True}),
            "layer inputs in 8 bits": (
                "memjax",
                _FULL | {"optimizer": "frugal8bit", "fused": True, "remat": "full-8bit"},
            ),
            "BAdam": ("memjax", _FULL | {"optimizer": "badam"}),
            "MeZO": ("memjax", _FULL | {"optimizer": "mezo"}),
        },
    ),
    "1B, all weights, 4 x 2048": (
        _SMALL,
        {
            "plain_jax AdamW, bfloat16 moments, full remat": ("plain_jax", {"remat": "full", "rank": None}),
            "memjax: AdamW": ("memjax", _FULL),
            "AdamW in 8 bits": ("memjax", _FULL | {"optimizer": "adamw8bit"}),
            "FRUGAL in 8 bits": ("memjax", _FULL | {"optimizer": "frugal8bit"}),
            "layer by layer": ("memjax", _FULL | {"optimizer": "frugal8bit", "fused": True}),
            "layer inputs in 8 bits": (
                "memjax",
                _FULL | {"optimizer": "frugal8bit", "fused": True, "remat": "full-8bit"},
            ),
        },
    ),
    "tiny": (
        _TINY,
        {
            "plain_jax": ("plain_jax", {"remat": "full"}),
            "memjax: LoRA": ("memjax", {"remat": "4bit", "format": "int8", "rest": "int8", "group": 32}),
            "all weights": ("memjax", _FULL | {"optimizer": "frugal", "fused": True}),
        },
    ),
}
"""Name of a ladder -> its shape and rungs; ``length`` is a rung's own."""

RUNGS = {
    f"{ladder}/{name}": Rung(
        shape._replace(length=settings.get("length", shape.length)),
        stack,
        {name: value for name, value in settings.items() if name != "length"},
    )
    for ladder, (shape, rungs) in LADDERS.items()
    for name, (stack, settings) in rungs.items()
}


def build(shape: Shape, settings: dict[str, Any]) -> harness.Workload:
    """Returns the training step of `memjax finetune` with some settings, on random weights.

    Args:
      shape: model and batch.
      settings: fields of `FinetuneSettings`, and ``rest``: the format of embedding and head.
    """
    import jax
    import jax.numpy as jnp

    from memjax import models
    from memjax.core.paths import map_with_path
    from memjax.recipes.data import Windows
    from memjax.recipes.finetuning import make_loss, make_parts
    from memjax.recipes.formats import codec_of
    from memjax.recipes.methods import Settings, make_adapter
    from memjax.recipes.optimizers import make_training
    from memjax.recipes.settings import FinetuneSettings, checked
    from memjax.recipes.train import init_state
    from memjax.weights import Axes, PackedWeight

    settings = dict(settings)
    rest = settings.pop("rest", None)
    chosen = checked(
        FinetuneSettings(model=shape.model, batch=shape.batch, seq=shape.length, lr=finetune.LEARNING_RATE, **settings)
    )
    formats = {"layers": chosen.format if chosen.format != "keep" else None, "rest": rest}
    model = models.Model(finetune.memjax_config(LLAMAS[shape.model]))
    abstract = models.abstract(model.config, jnp.bfloat16)
    assert chosen.targets is not None and chosen.lr is not None
    adapter = make_adapter(chosen.adapter, abstract, Settings(chosen.rank, chosen.alpha, chosen.targets, chosen.lr))
    loss = make_loss(model, adapter, chosen, dropout=False)
    training = make_training(chosen, loss, make_parts(model, chosen), model.config.num_layers)

    def init(key: Any) -> tuple[Any, Any]:
        keys = iter(jax.random.split(key, len(jax.tree.leaves(abstract)) + 1))

        def make(path: str, leaf: Any) -> Any:
            mean, std = (1.0, 0.02) if path.endswith("scale") else (0.0, 0.02)
            of_layer = path.startswith("layers/") and path.endswith("_proj/kernel")
            of_rest = path.endswith("embedding") or path.startswith("lm_head/")
            format = formats["layers"] if of_layer else formats["rest"] if of_rest else None
            if format is None:
                return harness.random_leaf(next(keys), leaf.shape, leaf.dtype, mean, std)
            codec, along = codec_of(format, chosen.group), -1 if path.endswith("embedding") else -2
            return harness.random_leaf(
                next(keys), leaf.shape, leaf.dtype, mean, std, lambda x: PackedWeight(codec.encode(x, along), Axes())
            )

        params = map_with_path(make, abstract)
        frozen, theta = adapter.prepare(next(keys), params)
        return init_state(theta, training), frozen

    def step(state: Any, frozen: Any, tokens: Any) -> tuple[Any, Any]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        state, metrics = training.step(state, frozen, Windows(inputs, targets, jnp.ones(targets.shape)))
        return state, metrics.loss

    return harness.Workload(init, step)


def run_case(name: str) -> dict[str, Any]:
    """Runs one rung and returns what it measured."""
    shape, stack, settings = RUNGS[name]
    if stack != "memjax":
        settings = dict(settings)
        rank = settings.pop("rank", finetune.RANK)
        nf4 = settings.get("format") == "nf4"
        row = finetune.measure(shape, stack, settings.get("remat", "full"), rank, nf4)
        return row | {"settings": RUNGS[name].settings}
    rng = np.random.default_rng(finetune.SEED)
    tokens = rng.integers(0, LLAMAS[shape.model].vocab, (shape.batch, shape.length + 1)).astype(np.int32)
    repeats = finetune.REPEATS if tokens.size < 2**15 else finetune.REPEATS // 2
    row = harness.measure_training(
        build(shape, settings), tokens, seed=finetune.SEED, warmup=finetune.WARMUP, repeats=repeats
    )
    return row | {
        "shape": shape.name,
        "stack": stack,
        "settings": settings,
        "tokens_per_s": shape.batch * shape.length / row["median_ms"] * 1e3,
    }


if __name__ == "__main__":
    harness.main("ladder", "benchmarks.ladder", list(RUNGS), run_case, default="[0-9]*")
