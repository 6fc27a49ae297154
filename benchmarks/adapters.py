"""What adapters learn in equally many steps: SmolLM2-135M in packed Q4_1 on the King James text, three seeds each.

Every method trains 50 steps of 2 windows of 128 tokens with AdamW, gradients clipped to a norm of 1, the rate constant.
Seed 0 trains with each of a method's three or four candidate rates, and the rate of the lowest loss on held-out windows
32 to 63 is taken for all seeds. Losses that are reported are of held-out windows 0 to 31, which decide nothing. All is
computed in float32 (on a GPU with the products' default precision).

    python -m benchmarks.adapters                     # all of it, in one process
    python -m benchmarks.adapters --cases 'lora*' --keep
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # or the decompositions of several threads wait for each other
# Trying products out takes longer than training; untried, only cuBLAS chooses well.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false")

import jax
import jax.numpy as jnp
import optax

import memjax as mj
from benchmarks import quality
from benchmarks.quality import KERNELS
from memjax import adapters, models
from memjax.ops import linear_cross_entropy
from memjax.recipes import data
from memjax.recipes.data import Windows
from memjax.recipes.evaluate import make_evaluate

RANK, ALPHA = 16, 32.0
SEEDS, STEPS, BATCH, TOKENS, WINDOWS = (0, 1, 2), 50, 2, 128, 32
THREADS = 6


def adamw(lr: Any, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of every method but LoRA+ and LaMDA."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.0))


def lora_plus(lr: Any, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of LoRA+: ``lr`` for A, 16 times that for B."""
    plus = adapters.lora_plus(lambda rate: optax.adamw(rate, weight_decay=0.0), lr, 16.0)
    return optax.chain(optax.clip_by_global_norm(1.0), plus)


def lamda_freeze(lr: Any, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of LaMDA, which freezes B row by row over the first 30 % of the steps."""
    return optax.chain(adamw(lr, steps), adapters.progressive_freeze(steps))


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter and how it is trained.

    Attributes:
      make: (params, sizes of the model) -> adapter.
      rates: candidate learning rates.
      settings: what the table says of it.
      optimizer: (learning rate, steps) -> transform.
    """

    make: Callable[[Any, models.LlamaConfig], Any]
    rates: tuple[float, ...]
    settings: str
    optimizer: Callable[[Any, int], optax.GradientTransformation] = adamw


def _lora(**settings: Any) -> Callable[[Any, models.LlamaConfig], Any]:
    return lambda params, sizes: adapters.lora(RANK, ALPHA, targets=KERNELS, **settings)


def _lamda_plus(params: Any, sizes: models.LlamaConfig) -> Any:
    plan = adapters.lamda_plan(params, RANK, targets=KERNELS)
    return adapters.lamda(plan, targets=list(plan))


_RATES = (7e-4, 2e-3, 6e-3)
METHODS: dict[str, Method] = {
    "LoRA": Method(_lora(), _RATES, "r16, alpha 32"),
    "LaMDA": Method(
        lambda params, sizes: adapters.lamda(RANK, targets=KERNELS), (1e-4, 3e-4, 1e-3, 3e-3), "r16", lamda_freeze
    ),
    "LaMDA++": Method(_lamda_plus, (1e-4, 3e-4, 1e-3, 3e-3), "mean r16, of 8, 16, 32", lamda_freeze),
    "rsLoRA": Method(_lora(scaling="rslora"), (3e-4, 1e-3, 3e-3), "r16, alpha 32"),
    "LoRA+": Method(_lora(), (1e-4, 3e-4, 1e-3), "r16, alpha 32, B 16 times faster", lora_plus),
    "DoRA": Method(lambda params, sizes: adapters.dora(RANK, ALPHA, targets=KERNELS), _RATES, "r16, alpha 32"),
    "PiSSA": Method(
        lambda params, sizes: adapters.pissa(RANK, targets=KERNELS, niter=4),
        (1e-4, 3e-4, 1e-3),
        "r16, alpha 16, 4 iterations",
    ),
    "OLoRA": Method(lambda params, sizes: adapters.olora(RANK, targets=KERNELS), (1e-4, 3e-4, 1e-3), "r16, alpha 16"),
    "VeRA": Method(lambda params, sizes: adapters.vera(256, targets=KERNELS), (3e-3, 1e-2, 3e-2, 1e-1), "r256"),
    "LoRA-FA": Method(lambda params, sizes: adapters.lora_fa(RANK, ALPHA, targets=KERNELS), _RATES, "r16, alpha 32"),
    "MoS": Method(
        lambda params, sizes: adapters.mos(RANK, 4, 1, 4, ALPHA, targets=KERNELS),
        (7e-4, 2e-3, 6e-3, 2e-2),
        "r16 from a budget of r4, 1 private, 4 shards, alpha 32",
    ),
    "SNELL": Method(
        lambda params, sizes: adapters.snell(RANK, keep=0.1, targets=KERNELS, tile=1536, threshold="bfloat16"),
        (1e-3, 3e-3, 1e-2, 3e-2),
        "r16, 10 % kept",
    ),
    "CE-SSL": Method(
        lambda params, sizes: adapters.ce_ssl(RANK, ALPHA, targets=KERNELS), _RATES, "r16, alpha 32, rests 20 %"
    ),
    "IA3": Method(lambda params, sizes: adapters.ia3(), (3e-3, 1e-2, 3e-2, 1e-1), "k, v, down"),
    "bias-only": Method(
        lambda params, sizes: adapters.bias_only(targets=(), kernels=KERNELS),
        (1e-3, 3e-3, 1e-2, 3e-2),
        "a bias at every kernel",
    ),
    "S2A prompt": Method(
        lambda params, sizes: adapters.prompt(8, 8, sizes.hidden_size, layers=sizes.num_layers),
        (1e-2, 3e-2, 1e-1),
        "8 positions in every layer, r8",
    ),
    "S2A side": Method(
        lambda params, sizes: adapters.side(sizes.hidden_size // 8, sizes.hidden_size, sizes.num_layers),
        _RATES,
        "width d / 8",
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The model and its text.

    Attributes:
      model: with packed kernels.
      host_params: its params on the CPU, where adapters start: decompositions are slow on a GPU.
      train: windows to train on.
      chosen_on, reported: held-out windows that choose a rate, and that are reported.
      steps: of the training.
    """

    model: models.Model
    host_params: Any
    train: Windows
    chosen_on: Windows
    reported: Windows
    steps: int

    def batches(self, seed: int) -> Windows:
        """Returns the batches of all steps, ``[steps, 2, 128]``."""
        return quality.batches(self.train, BATCH, seed, self.steps)

    def loss_fn(self, adapter: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Returns the loss ``(theta, frozen, batch, key) -> (sum, count)``; key None is for evaluation."""
        model = self.model

        def nll(params: Any, theta: Any, batch: Windows) -> tuple[jax.Array, jax.Array]:
            if isinstance(adapter, adapters.Side):
                stages = model.stages(batch.inputs)
                h, z = adapter.run(theta, stages.block, stages.layers(params), stages.embed(params))
                hidden = stages.finish(params, h + z)
            else:
                prefix = adapter.prefix(theta) if isinstance(adapter, adapters.Prompt) else None
                hidden = model.hidden(params, batch.inputs, prefix=prefix)
            weight, axis = model.head(params)
            options = {"weights": batch.weights, "w_axis": axis, "reduction": "sum", "chunk": 512}
            return linear_cross_entropy(hidden, weight, batch.targets, **options), batch.weights.sum()

        def loss(theta: Any, frozen: Any, batch: Windows, key: Any) -> tuple[jax.Array, jax.Array]:
            params = adapter.attach(frozen, theta, key) if isinstance(adapter, adapters.Adapter) else frozen
            return mj.lift(nll)(params, theta, batch)

        return loss

    def starter(self, adapter: Any) -> Callable[[int], tuple[Any, Any]]:
        """Returns the function seed -> (frozen, theta) on the device; it runs on the CPU."""
        host = jax.local_devices(backend="cpu")[0]
        modular = not isinstance(adapter, adapters.Adapter)
        init = jax.jit(adapter.init if modular else adapter.prepare if adapter.anchored else adapter.init)

        def start(seed: int) -> tuple[Any, Any]:
            with jax.default_device(host):
                key = jax.random.key(seed)
                made = init(key) if modular else init(key, self.host_params)
            frozen, theta = made if not modular and adapter.anchored else (None, made)
            frozen, theta = jax.device_put((frozen, theta), jax.local_devices()[0])
            return self.model.params if frozen is None else frozen, theta

        return start

    def measure(self, method: Method) -> dict[str, Any]:
        """Trains a method with every rate and seed and returns its row."""
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            adapter = method.make(self.host_params, self.model.config)
        start, loss = self.starter(adapter), self.loss_fn(adapter)

        @jax.jit
        def train(theta: Any, frozen: Any, batches: Windows, lr: Any, seed: Any) -> tuple[Any, jax.Array, Any]:
            theta, metrics = quality.train(loss, method.optimizer(lr, self.steps), theta, frozen, batches, seed)
            finite = jnp.stack([leaf.all() for leaf in jax.tree.leaves(metrics.finite)]).all()
            return theta, metrics.loss, finite

        evaluate = make_evaluate(lambda theta, frozen, batch, key: loss(theta, frozen, batch, None))

        def held_out(theta: Any, frozen: Any, windows: Windows) -> float:
            return evaluate(theta, frozen, windows, len(windows.inputs)).nll

        before, after, finite, rates = [], [], True, {}
        lr = method.rates[0]
        for seed in SEEDS:
            frozen, theta = start(seed)
            batches = self.batches(seed)
            before.append(held_out(theta, frozen, self.reported))
            best = math.inf
            trained = theta
            for rate in method.rates if seed == SEEDS[0] else (lr,):
                result, _, good = train(theta, frozen, batches, rate, seed)
                finite = finite and bool(good)
                if seed == SEEDS[0]:
                    rates[str(rate)] = held_out(result, frozen, self.chosen_on)
                    if not rates[str(rate)] < best:
                        continue
                    best, lr = rates[str(rate)], rate
                trained = result
            after.append(held_out(trained, frozen, self.reported))
        weights = isinstance(adapter, adapters.Adapter)
        bytes_ = adapter.nbytes(self.host_params) if weights else adapter.nbytes()
        return {
            "settings": method.settings,
            "layers": self.model.config.num_layers,
            "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(theta)),
            "trained_bytes": bytes_.trained,
            "constant_bytes": bytes_.constants,
            "steps": self.steps,
            "batch": [BATCH, TOKENS],
            "seeds": list(SEEDS),
            "lr": lr,
            "rates": rates,
            "finite": finite,
            "before": before,
            "after": after,
            "before_mean": statistics.mean(before),
            "after_mean": statistics.mean(after),
            "after_std": statistics.stdev(after),
        }


def load(options: argparse.Namespace) -> Bench:
    """Loads the model and cuts the text."""
    model = quality.load_model(options.gguf, options.tiny, options.layers, "float32")
    train, held_out = (data.text_windows(tokens, TOKENS) for tokens in quality.load_text(model.tokenizer))
    windows = 2 if options.tiny or options.layers else WINDOWS
    steps = options.steps or (2 if options.tiny else STEPS)
    return Bench(
        dataclasses.replace(model, params=jax.device_put(model.params, jax.local_devices()[0])),
        jax.device_put(model.params, jax.local_devices(backend="cpu")[0]),
        train,
        quality.head(held_out, WINDOWS, WINDOWS + windows),
        quality.head(held_out, 0, windows),
        steps,
    )


def cases_of(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the cases; the first that runs starts all that were chosen, a few at a time in threads.

    Tracing, compiling and the adapters' starts on the CPU take longer than the training, and overlap so.
    """
    chosen = [name for name in METHODS if any(fnmatch.fnmatch(name, pattern) for pattern in options.cases)]

    @functools.cache
    def futures() -> dict[str, Future[dict[str, Any]]]:
        bench = load(options)
        pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        return {name: pool.submit(bench.measure, METHODS[name]) for name in chosen}

    return {name: lambda name=name: futures()[name].result() for name in chosen}  # type: ignore[misc]


if __name__ == "__main__":
    quality.main("adapters", cases_of)
