"""What fine-tuning all weights of SmolLM2-135M learns with little state, beside AdamW and LoRA: three seeds each.

Every row is a run of `memjax finetune` with its settings, from the weights that the packed Q4_1 file decodes to, in
bfloat16 with stochastic rounding, on the King James text: 50 steps of 4 windows of 256 tokens. Seed 0 trains with each
of a method's candidate rates; the rate of the lowest loss on the second half of the held-out windows is taken for all
seeds, and losses that are reported are of the first half.

    python -m benchmarks.full_finetuning
    python -m benchmarks.full_finetuning --cases 'FRUGAL*' --keep
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Trying products out takes longer than training; untried, only cuBLAS chooses well.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false")

import jax
import jax.numpy as jnp

from benchmarks import harness, quality
from memjax import models, optim
from memjax.core.views import is_view, materialize
from memjax.recipes import data
from memjax.recipes.data import Windows
from memjax.recipes.evaluate import Evaluation
from memjax.recipes.finetuning import make_loss, make_parts
from memjax.recipes.methods import Settings, make_adapter
from memjax.recipes.optimizers import make_training
from memjax.recipes.settings import FinetuneSettings, checked
from memjax.recipes.train import Training, init_state, make_schedule

SEEDS = (0, 1, 2)


class Method(NamedTuple):
    """Settings of a run, and candidate rates."""

    settings: dict[str, Any]
    rates: tuple[float, ...]


_ALL = {"adapter": "none"}
_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
METHODS: dict[str, Method] = {
    "AdamW": Method(_ALL, _RATES),
    "AdamW, 8 bits": Method(_ALL | {"optimizer": "adamw8bit"}, _RATES),
    "AdamW, 4 bits": Method(_ALL | {"optimizer": "adamw4bit"}, _RATES),
    "FRUGAL 0.25": Method(_ALL | {"optimizer": "frugal"}, _RATES),
    "FRUGAL 0.25, 8 bits, layer by layer": Method(_ALL | {"optimizer": "frugal8bit", "fused": True}, _RATES),
    "BAdam": Method(_ALL | {"optimizer": "badam"}, (4e-4, 8e-4, 1.6e-3, 3.2e-3)),
    "MeZO": Method(_ALL | {"optimizer": "mezo"}, (1e-7, 1e-6, 1e-5)),
    "LoRA, rank 16": Method({"adapter": "lora", "rank": 16}, (1e-3, 2e-3, 4e-3)),
}


class Task(NamedTuple):
    """The model, its weights dense; windows to train on, to choose a rate by and to report; steps; rows of a batch."""

    model: models.Model
    train: Windows
    chosen_on: Windows
    reported: Windows
    steps: int
    batch: int


def load_task(options: argparse.Namespace) -> Task:
    """Returns the fine-tuning of SmolLM2."""
    model = quality.load_model(options.gguf, options.tiny, options.layers, "bfloat16")
    params = jax.tree.map(lambda leaf: materialize(leaf) if is_view(leaf) else leaf, model.params, is_leaf=is_view)
    small = bool(options.tiny or options.layers)
    length = 64 if small else 256
    train, held_out = (data.text_windows(tokens, length) for tokens in quality.load_text(model.tokenizer))
    half = 2 if small else min(32, len(held_out.inputs) // 2)
    windows = quality.head(held_out, half, 2 * half), quality.head(held_out, 0, half)
    dense = models.Model(model.config, jax.device_put(params), model.tokenizer, model.name)
    return Task(dense, train, *windows, options.steps or (4 if small else 50), 4)


class Programs(NamedTuple):
    """What all rates and seeds of a method share.

    Attributes:
      start: seed -> (frozen, theta).
      train: compiled ``(theta, frozen, batches, rate, seed) -> theta``; theta is donated.
      evaluate: of `make_evaluate`.
      sizes: fields of the row.
    """

    start: Callable[[int], tuple[Any, Any]]
    train: Any
    evaluate: Callable[..., Evaluation]
    sizes: dict[str, int]


def compile_programs(task: Task, method: Method) -> Programs:
    """Returns the programs of a method."""
    settings = checked(
        FinetuneSettings(
            model="smollm2",
            lr=method.rates[0],
            steps=task.steps,
            batch=task.batch,
            schedule="cosine",
            warmup=min(5, task.steps - 1),
            **method.settings,
        )
    )
    assert settings.targets is not None and settings.lr is not None
    chosen = Settings(settings.rank, settings.alpha, settings.targets, settings.lr)
    adapter = make_adapter(settings.adapter, task.model.params, chosen)
    loss = make_loss(task.model, adapter, settings, dropout=False)
    shape = make_schedule(1.0, settings.steps, schedule=settings.schedule, warmup=settings.warmup)

    def training(rate: Any, seed: Any) -> Training:
        seeded = dataclasses.replace(settings, seed=seed)
        parts = make_parts(task.model, settings)
        return make_training(seeded, loss, parts, task.model.config.num_layers, rate=lambda count: rate * shape(count))

    def train(theta: Any, frozen: Any, batches: Windows, rate: Any, seed: Any) -> Any:
        method = training(rate, seed)
        state = init_state(theta, method)
        return jax.lax.scan(lambda state, batch: method.step(state, frozen, batch), state, batches)[0].theta

    def start(seed: int) -> tuple[Any, Any]:
        return adapter.prepare(jax.random.key(seed), task.model.params)

    frozen, theta = jax.eval_shape(lambda: start(0))
    numbers = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32)]
    batches = quality.abstract(task.train, task.steps, task.batch)
    compiled = jax.jit(train, donate_argnums=0).lower(theta, frozen, batches, *numbers).compile()
    sizes = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(theta)),
        "state_bytes": optim.state_bytes(jax.eval_shape(training(settings.lr, 0).init, theta)),
    }
    return Programs(start, compiled, quality.compile_evaluate(loss, theta, frozen, task.reported, 16), sizes)


def measure(task: Task, method: Method, programs: Programs) -> dict[str, Any]:
    """Trains with every rate and seed and returns the row of a method."""

    def trained(seed: int, rate: float) -> tuple[Callable[[Windows], float], float]:
        frozen, theta = programs.start(seed)
        theta = jax.tree.map(jnp.copy, theta)
        given = jax.device_put(quality.batches(task.train, task.batch, seed, task.steps)), jnp.float32(rate), seed
        jax.block_until_ready((theta, given))
        start = time.perf_counter()
        theta = jax.block_until_ready(programs.train(theta, frozen, *given))
        seconds = time.perf_counter() - start
        return lambda windows: programs.evaluate(theta, frozen, windows, 16).nll, seconds

    frozen, theta = programs.start(SEEDS[0])
    before = programs.evaluate(theta, frozen, task.reported, 16).nll
    found = quality.with_best_rate(trained, method.rates, SEEDS, task.chosen_on, task.reported, task.steps)
    return (
        {"before": before}
        | found
        | programs.sizes
        | {
            "settings": method.settings,
            "layers": task.model.config.num_layers,
            "state_bytes_per_parameter": programs.sizes["state_bytes"] / programs.sizes["parameters"],
            "batch": [task.batch, int(task.train.inputs.shape[1])],
        }
    )


def cases_of(options: argparse.Namespace) -> dict[str, harness.Case]:
    """Returns the cases, which share the model and the text."""
    task = quality.once(lambda: load_task(options))
    return {
        name: harness.Case(
            lambda method=method: compile_programs(task(), method),
            lambda programs, method=method: measure(task(), method, programs),
        )
        for name, method in METHODS.items()
    }


if __name__ == "__main__":
    quality.main("full_finetuning", cases_of)
