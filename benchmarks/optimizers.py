"""What optimizers with a small state learn in equally many steps: a byte-level language model, three seeds each.

The model and the text are those of `activation_quality`: 10.7 million parameters, float32 masters, bfloat16 products;
400 steps of 64 windows of 256 bytes, and of some methods of 16, where signs are more of the noise. Seed 0 trains with
each of a method's candidate rates, and the rate of the lowest loss on the second half of the held-out windows is taken
for all seeds; losses that are reported are of the first half, which decides nothing. A step's time is that of the whole
training over its steps.

    python -m benchmarks.optimizers
    python -m benchmarks.optimizers --cases 'FRUGAL*' --keep
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
import optax

from benchmarks import harness, quality
from benchmarks.activation_quality import SEEDS, Task, language_model
from memjax import optim
from memjax.recipes.data import Windows

GAP = 50  # steps between changes of a subspace: eight in the run


class Method(NamedTuple):
    """An optimizer: learning-rate schedule -> transform, candidate peak rates, and windows of a step."""

    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    batch: int = 64


_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
METHODS: dict[str, Method] = {
    "AdamW": Method(lambda lr: optax.adamw(lr, weight_decay=0.0), _RATES),
    "FRUGAL 0.25": Method(lambda lr: optim.frugal(lr, density=0.25, update_gap=GAP), _RATES),
    "FRUGAL 0.25, signs at a quarter of the rate": Method(
        lambda lr: optim.frugal(lr, density=0.25, update_gap=GAP, state_free_scale=0.25), _RATES
    ),
    "FRUGAL 0.25, without its state-free part": Method(
        lambda lr: optim.frugal(lr, density=0.25, update_gap=GAP, state_free_scale=0.0), _RATES
    ),
    "FRUGAL 0": Method(lambda lr: optim.frugal(lr, density=0.0), _RATES),
    "GaLore": Method(lambda lr: optim.galore(lr, 0.25, GAP), _RATES),
    "Fira": Method(lambda lr: optim.fira(lr, 0.25, GAP), _RATES),
    "APOLLO": Method(lambda lr: optim.apollo(lr, 0.25, GAP), _RATES),
    "APOLLO-Mini": Method(lambda lr: optim.apollo_mini(lr, GAP), _RATES),
    "AdamW, 8 bits": Method(lambda lr: optim.adamw8bit(lr, weight_decay=0.0), _RATES),
    "AdamW, 4 bits": Method(lambda lr: optim.adamw4bit(lr, weight_decay=0.0), _RATES),
    "BAdam": Method(lambda lr: optim.badam(lr, GAP), _RATES),
    "LDAdam": Method(lambda lr: optim.ldadam(lr, 0.25), _RATES),
    "Adam-mini": Method(lambda lr: optim.adam_mini(lr), _RATES),
    "MicroAdam": Method(lambda lr: optim.micro_adam(lr), _RATES),
    "Lion, 8 bits": Method(lambda lr: optim.lion8bit(lr, weight_decay=0.0), (1e-4, 3e-4, 1e-3)),
}
METHODS |= {
    f"{name}, 16 windows a step": METHODS[name]._replace(batch=16)
    for name in ("AdamW", "FRUGAL 0.25", "FRUGAL 0.25, without its state-free part", "FRUGAL 0", "BAdam", "GaLore")
}


def compile_programs(task: Task, method: Method) -> tuple[Any, Any]:
    """Returns the training and the evaluation of a method, which all rates and seeds share."""
    loss = task.loss_fn("none")

    def train(theta: Any, batches: Windows, lr: Any) -> Any:
        shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, max(1, task.steps // 10), task.steps, 0.1)
        tx = optax.chain(optax.clip_by_global_norm(1.0), method.make(lambda count: lr * shape(count)))
        return quality.train(loss, tx, theta, {}, batches)[0]

    theta = jax.eval_shape(lambda: task.start(0)[0])
    batches = quality.abstract(task.train, task.steps, task.batch)
    lr = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(train, donate_argnums=0).lower(theta, batches, lr).compile()
    return compiled, quality.compile_evaluate(loss, theta, {}, task.held_out, 16)


def measure(task: Task, method: Method, chosen_on: Windows, programs: tuple[Any, Any]) -> dict[str, Any]:
    """Trains with every rate and seed and returns the row of a method."""
    train, evaluate = programs

    def trained(seed: int, rate: float) -> tuple[Callable[[Windows], float], float]:
        batches = jax.device_put(quality.batches(task.train, task.batch, seed, task.steps))
        start = time.perf_counter()
        theta = jax.block_until_ready(train(task.start(seed)[0], batches, jnp.float32(rate)))
        return lambda windows: evaluate(theta, {}, windows, 16).nll, time.perf_counter() - start

    found = quality.with_best_rate(trained, method.rates, SEEDS, chosen_on, task.held_out, task.steps)
    params = task.start(SEEDS[0])[0]
    state = jax.eval_shape(method.make(found["lr"]).init, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return found | {
        "parameters": count,
        "layers": task.model.config.num_layers,
        "state_bytes": optim.state_bytes(state),
        "state_bytes_per_parameter": optim.state_bytes(state) / count,
        "batch": [task.batch, int(task.train.inputs.shape[1])],
    }


def cases_of(options: argparse.Namespace) -> dict[str, harness.Case]:
    """Returns the cases, which share the text."""

    @quality.once
    def task() -> tuple[Task, Windows]:
        made = language_model(options)
        half = len(made.held_out.inputs) // 2
        reported, chosen_on = quality.head(made.held_out, 0, half), quality.head(made.held_out, half, 2 * half)
        return dataclasses.replace(made, held_out=reported), chosen_on

    def task_of(method: Method) -> Task:
        made = task()[0]
        return made if options.tiny or options.layers else dataclasses.replace(made, batch=method.batch)

    return {
        name: harness.Case(
            lambda method=method: compile_programs(task_of(method), method),
            lambda programs, method=method: measure(task_of(method), method, task()[1], programs),
        )
        for name, method in METHODS.items()
    }


if __name__ == "__main__":
    quality.main("optimizers", cases_of)
