"""What the suites of losses share: SmolLM2-135M, the text that it is trained and evaluated on, and the command line."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from benchmarks import harness
from memjax import models
from memjax.recipes import data
from memjax.recipes.data import Windows
from memjax.recipes.evaluate import Evaluation, make_evaluate
from memjax.recipes.train import LossFn, Metrics, init_state, make_step

KERNELS = "layers/**/kernel"
TINY = models.LlamaConfig(
    vocab_size=256,
    hidden_size=192,
    intermediate_size=384,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=64,
    tie_embeddings=True,
    max_positions=512,
)
"""Two random layers over bytes, whose losses mean nothing: to see that a suite runs."""


class Bytes:
    """UTF-8 bytes as tokens, for the tiny model."""

    eos_id = None

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def chat(self, messages: Any) -> Any:
        raise ValueError("bytes have no chat format")


def load_model(gguf: str | None, tiny: bool, layers: int | None, dtype: str) -> models.Model:
    """Returns SmolLM2-135M with its kernels packed in Q4_1, or a tiny random model so packed.

    Args:
      gguf: its GGUF file; None finds the packaged weights.
      tiny: take the tiny model.
      layers: cut after so many layers; None takes all.
      dtype: "float32" or "bfloat16"; of dense leaves, and the logical dtype of packed ones.
    """
    if not tiny:
        model = models.load(gguf or "smollm2", dtype=dtype)
        return model.first_layers(layers) if layers else model
    params = models.random_params(TINY, jax.random.key(0), jnp.dtype(dtype))
    return models.Model(TINY, mj.weights.quantize(params, mj.codecs.q4_1(), KERNELS), Bytes(), "tiny")


def load_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the tokens of the packaged King James text: to train on, and its last tenth, held out."""
    train, held_out = data.split_text(data.find("kjv").read_text(), 0.1)
    return tokenizer.encode(train, special_tokens=False), tokenizer.encode(held_out, special_tokens=False)


def head(windows: Windows, start: int, stop: int) -> Windows:
    """Returns the windows ``start`` to ``stop``."""
    return data.take(windows, slice(start, stop))


def batches(windows: Windows, batch: int, seed: int, steps: int) -> Windows:
    """Returns the batches of so many steps, ``[steps, batch, tokens]``."""
    loader = data.Loader(windows, batch, seed)
    parts = [loader.batch_at(i)[:3] for i in range(steps)]
    return Windows(*(np.stack(field) for field in zip(*parts)))


def train(loss: LossFn, tx: Any, theta: Any, frozen: Any, batches: Windows, seed: Any = 0) -> tuple[Any, Metrics]:
    """Returns ``theta`` after a step on every batch, and the metrics of all steps; to be jitted."""
    step = make_step(loss, tx, seed=seed)
    state, metrics = jax.lax.scan(lambda state, batch: step(state, frozen, batch), init_state(theta, tx), batches)
    return state.theta, metrics


def once[T](load: Callable[[], T]) -> Callable[[], T]:
    """Returns ``load`` as a function that loads at its first call, of whichever thread."""
    lock, cached = threading.Lock(), functools.cache(load)

    def loaded() -> T:
        with lock:
            return cached()

    return loaded


def abstract(windows: Windows, *shape: int) -> Windows:
    """Returns what has the dtypes of ``windows`` and, before the axis of tokens, this shape."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype), windows)


def compile_evaluate(
    loss: LossFn, theta: Any, frozen: Any, windows: Windows, batch: int
) -> Callable[[Any, Any, Windows, int], Evaluation]:
    """Returns `make_evaluate` compiled for ``batch`` windows at a time; theta and frozen may be abstract."""
    return make_evaluate(jax.jit(loss).lower(theta, frozen, abstract(windows, batch), jax.random.key(0)).compile())


def with_best_rate(
    train: Callable[[int, float], tuple[Callable[[Windows], float], float]],
    rates: Sequence[float],
    seeds: Sequence[int],
    chosen_on: Windows,
    reported: Windows,
    steps: int,
) -> dict[str, Any]:
    """Trains the first seed with every rate and all seeds with the best, and returns what a row says of that.

    Args:
      train: (seed, rate) -> (function from windows to their loss after training, seconds of the training).
      rates: candidates.
      seeds: at least two.
      chosen_on: windows by whose loss the rate is chosen.
      reported: windows whose loss is reported.
      steps: of a training.
    """
    after, by_rate, times, best, lr = [], {}, [], math.inf, rates[0]
    for seed in seeds:
        kept = None
        for rate in rates if seed == seeds[0] else (lr,):
            loss_of, seconds = train(seed, rate)
            times.append(seconds)
            if seed == seeds[0]:
                by_rate[str(rate)] = loss_of(chosen_on)
                if not by_rate[str(rate)] < best:
                    continue
                best, lr = by_rate[str(rate)], rate
            kept = loss_of
        after.append(math.nan if kept is None else kept(reported))
    return {
        "steps": steps,
        "seeds": list(seeds),
        "lr": lr,
        "rates": by_rate,
        "step_ms": 1e3 * min(times) / steps,
        "after": after,
        "after_mean": statistics.mean(after),
        "after_std": statistics.stdev(after),
    }


def main(
    suite: str,
    cases_of: Callable[[argparse.Namespace], Mapping[str, harness.Case | Callable[[], dict[str, Any]]]],
    arguments: list[str] | None = None,
) -> Path:
    """The command line of a suite of losses, which runs in one process.

    Args:
      suite: name of the results file.
      cases_of: parsed options -> the cases that there are, as `harness.run_here` takes them; nothing is loaded before
        the first of them is compiled or runs.
      arguments: of the command line; None takes the process's own.

    Returns:
      The results file.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{suite}")
    parser.add_argument("--gguf", metavar="PATH", help="SmolLM2-135M-Instruct.Q4_1.gguf; by default the packaged one")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the model after its first N layers, for a try")
    parser.add_argument("--tiny", action="store_true", help="two random layers over bytes, and a few steps")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="run the cases that match")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, for a try")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of all results")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start no case later than this")
    parser.add_argument("--keep", action="store_true", help="keep the recorded rows of cases that are not run now")
    options = parser.parse_args(arguments)
    cases = cases_of(options)
    chosen = {name: run for name, run in cases.items() if any(fnmatch.fnmatch(name, p) for p in options.cases)}
    if not chosen:
        parser.error(f"no case matches {options.cases}; there are {', '.join(cases)}")
    path = harness.run_here(suite, chosen, results=options.results, limit_s=options.limit_s, keep=options.keep)
    print(path)
    return path
