"""What packed activations cost in loss: SmolLM2-135M under LoRA, and a byte-level language model from scratch.

Both train on the King James text, three seeds for every policy, the same batches for all policies of a seed; only what
backward reads differs. Losses are of held-out text. SmolLM2 keeps its packed Q4_1 base and trains rank-16 factors for
50 steps of 2 windows of 128 tokens; the language model has 10.6 million parameters and trains 400 steps of 16 windows
of 256 bytes. All is computed in bfloat16 but for float32 master weights.

    python -m benchmarks.activation_quality
    python -m benchmarks.activation_quality --cases 'LM*' --keep
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

# Trying products out takes longer than training; untried, only cuBLAS chooses well.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false")

import jax
import jax.numpy as jnp
import optax

import memjax as mj
from benchmarks import harness, quality
from benchmarks.quality import KERNELS
from memjax import models
from memjax.recipes import data
from memjax.recipes.data import Windows

SEEDS = (0, 1, 2)


POLICIES: dict[str, Any] = {
    "exact": "none",
    "8 bits": "8bit",
    "4 bits": "4bit",
    "4 bits, stochastic": dataclasses.replace(mj.remat.parse("4bit").store, rounding="stochastic"),
    "2 bits": "2bit",
    "2 bits, stochastic": dataclasses.replace(mj.remat.parse("2bit").store, rounding="stochastic"),
    "linear layers in 4 bits": "linear-4bit",
    "full from 8 bits": "full-8bit",
    "full from 4 bits": "full-4bit",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and how it is trained.

    Attributes:
      model: the model; its params are the frozen ones, or where the run starts if ``adapter`` is None.
      adapter: what is trained beside the params, or None to train the params.
      train: windows to train on.
      held_out: windows whose loss is reported.
      batch, steps, lr: of the training.
    """

    model: models.Model
    adapter: Any
    train: Windows
    held_out: Windows
    batch: int
    steps: int
    lr: float

    def loss_fn(self, remat: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Returns the loss ``(theta, frozen, batch, key) -> (sum, count)``."""

        def nll(params: Any, batch: Windows) -> tuple[jax.Array, jax.Array]:
            hidden = self.model.hidden(params, batch.inputs, remat=remat)
            weight, axis = self.model.head(params)
            total = mj.ops.linear_cross_entropy(
                hidden, weight, batch.targets, weights=batch.weights, w_axis=axis, reduction="sum"
            )
            return total, batch.weights.sum()

        def loss(theta: Any, frozen: Any, batch: Windows, key: Any) -> tuple[jax.Array, jax.Array]:
            if self.adapter is None:
                return nll(jax.tree.map(lambda x: x.astype(jnp.bfloat16), theta), batch)
            return mj.lift(nll)(self.adapter.attach(frozen, theta), batch)

        return loss

    def start(self, seed: int) -> tuple[Any, Any]:
        """Returns the trained pytree and the frozen one."""
        key = jax.random.key(seed)
        if self.adapter is None:
            return models.random_params(self.model.config, key, jnp.dtype("float32")), {}
        return self.adapter.init(key, self.model.params), self.model.params

    def compile_programs(self, remat: Any) -> tuple[Any, Any]:
        """Returns the training and the evaluation of a policy, which all seeds share."""
        rate = optax.warmup_cosine_decay_schedule(0.1 * self.lr, self.lr, max(1, self.steps // 10), self.steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
        theta, frozen = jax.eval_shape(lambda: self.start(0))
        batches = quality.abstract(self.train, self.steps, self.batch)
        train = jax.jit(functools.partial(quality.train, self.loss_fn(remat), tx))
        evaluate = quality.compile_evaluate(self.loss_fn("none"), theta, frozen, self.held_out, 16)
        return train.lower(theta, frozen, batches).compile(), evaluate

    def measure(self, programs: tuple[Any, Any]) -> dict[str, Any]:
        """Trains with every seed and returns the row of a policy."""
        train, evaluate = programs
        after, trained = [], []
        for seed in SEEDS:
            theta, frozen = self.start(seed)
            theta, metrics = train(theta, frozen, quality.batches(self.train, self.batch, seed, self.steps))
            after.append(evaluate(theta, frozen, self.held_out, 16).nll)
            trained.append(float(metrics.loss[-self.steps // 10 :].mean()))
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(theta)),
            "layers": self.model.config.num_layers,
            "steps": self.steps,
            "batch": [self.batch, int(self.train.inputs.shape[1])],
            "lr": self.lr,
            "seeds": list(SEEDS),
            "after": after,
            "after_mean": statistics.mean(after),
            "after_std": statistics.stdev(after),
            "last_losses": trained,
        }


def smollm2(options: argparse.Namespace) -> Task:
    """Returns the fine-tuning of SmolLM2."""
    model = quality.load_model(options.gguf, options.tiny, options.layers, "bfloat16")
    train, held_out = (data.text_windows(tokens, 128) for tokens in quality.load_text(model.tokenizer))
    adapter = mj.adapters.lora(16, 32.0, targets=KERNELS)
    small = options.tiny or options.layers
    model = dataclasses.replace(model, params=jax.device_put(model.params))
    return Task(
        model,
        adapter,
        train,
        quality.head(held_out, 0, 2 if small else 64),
        2,
        options.steps or (2 if small else 50),
        1e-3,
    )


def language_model(options: argparse.Namespace) -> Task:
    """Returns the training of a language model over bytes."""
    small = bool(options.tiny or options.layers)
    sizes = (64, 128, 2, 2) if small else (384, 1024, 6, 6)
    config = models.LlamaConfig(
        vocab_size=256,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_layers=sizes[2],
        num_heads=sizes[3],
        num_kv_heads=sizes[3],
        head_dim=64,
        tie_embeddings=True,
    )
    tokens = quality.load_text(quality.Bytes())
    train, held_out = (data.text_windows(part, 64 if small else 256) for part in tokens)
    model = models.Model(config, {}, quality.Bytes(), "bytes")
    steps = options.steps or (2 if small else 400)
    return Task(model, None, train, quality.head(held_out, 0, 2 if small else 64), 2 if small else 16, steps, 2e-3)


def cases_of(options: argparse.Namespace) -> dict[str, harness.Case]:
    """Returns the cases; those of a task share what the first of them loads."""
    tasks = {
        "SmolLM2": quality.once(lambda: smollm2(options)),
        "LM": quality.once(lambda: language_model(options)),
    }
    return {
        f"{name}, {policy}": harness.Case(
            lambda task=task, remat=remat: task().compile_programs(remat),
            lambda programs, task=task: task().measure(programs),
        )
        for name, task in tasks.items()
        for policy, remat in POLICIES.items()
    }


if __name__ == "__main__":
    quality.main("activation_quality", cases_of)
