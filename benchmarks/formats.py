"""What weight formats cost SmolLM2-135M on held-out text: bits per weight, and the increase of its loss.

The weights of the layers, decoded from the checkpoint's Q4_1, are the base; every format stores these. Losses are of
the decoded weights in float32 with products of full precision, so that nothing but the format differs; formats that
quantize activations too are run as they are.

    python -m benchmarks.formats                          # all of it, in one process
    python -m benchmarks.formats --cases 'int2*' --keep
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from benchmarks import quality
from benchmarks.quality import KERNELS
from memjax import codecs, models
from memjax.core.paths import leaf_paths, match
from memjax.ops import linear_cross_entropy
from memjax.recipes import data
from memjax.recipes.data import Windows
from memjax.recipes.evaluate import make_evaluate
from memjax.recipes.train import check_finite, init_state, make_optimizer, make_step

GROUP, RANK, SEED = 64, 16, 0
DEMO_WINDOWS, DEMO_TOKENS, TOKENS, BATCH = 32, 128, 512, 8
RMS_WINDOWS = 16
CPU_WINDOWS = 16  # of held-out text where no GPU is at hand; the rows say how many tokens were measured
DISTILLATION = {"steps": 400, "batch": 8, "tokens": 256, "lr": 1e-3, "warmup": 20}


def quantized(codec: Any) -> Callable[[Any], Any]:
    """Returns a function that stores the kernels of all layers in the format ``codec``."""
    return lambda params: mj.weights.quantize(params, codec, KERNELS)


def embedding_in_int8(params: Any) -> Any:
    """Returns ``params`` with the embedding, which is the head too, in 8 bits; groups lie along a row."""
    packed = codecs.int8(group=GROUP).encode(params["embed_tokens"]["embedding"], -1)
    return params | {"embed_tokens": {"embedding": mj.weights.PackedWeight(packed, mj.weights.Axes())}}


def bitmap(params: Any) -> Any:
    """Returns ``params`` with the larger half of every layer's kernels as bfloat16 values under a bitmap."""
    layers = mj.weights.astype(params["layers"], jnp.bfloat16)
    stored = mj.weights.sparsify({"layers": layers}, "bitmap", KERNELS, sparsity=0.5)
    return params | mj.weights.astype(stored, jnp.float32)


def flexq(activation_bits: int | None) -> Callable[[Any], Any]:
    """Returns a function that stores 6 bits and multiplies integers; None: 8-bit inputs for down_proj, 6-bit others."""

    def make(params: Any) -> Any:
        wide = {6: (), 8: KERNELS, None: None}[activation_bits]
        plan = mj.weights.flexq(params, KERNELS, wide=wide, group=GROUP, codec=codecs.int6(group=GROUP))
        return mj.weights.integer_activations(quantized(codecs.int6(group=GROUP))(params), plan)

    return make


FORMATS: dict[str, Callable[[Any], Any]] = {
    "int8 g64": quantized(codecs.int8(group=GROUP)),
    "int6 g64": quantized(codecs.int6(group=GROUP)),
    "int6 g192": quantized(codecs.int6(group=192)),
    "int6 g32, affine": quantized(codecs.int6(group=32, symmetric=False)),
    "int6 g32, affine, search": quantized(codecs.int6(group=32, symmetric=False, scale_dtype="float16", search=True)),
    "nf4 b64, double": quantized(codecs.nf4(block=GROUP, double=True)),
    "nf4 b64": quantized(codecs.nf4(block=GROUP, double=False)),
    "int4 g64": quantized(codecs.int4(group=GROUP)),
    "int4 g64, search": quantized(codecs.int4(group=GROUP, search=True)),
    "int4 g64, affine": quantized(codecs.int4(group=GROUP, symmetric=False)),
    "int3 g64": quantized(codecs.int3(group=GROUP)),
    "int3 g64, search": quantized(codecs.int3(group=GROUP, search=True)),
    "int2 g64": quantized(codecs.int2(group=GROUP)),
    "int2 g64, search": quantized(codecs.int2(group=GROUP, search=True)),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "fp8 e4m3, channel": quantized(codecs.fp8()),
    "2:4 int4 g32": lambda params: mj.weights.sparsify(params, "2:4", KERNELS, codec=codecs.int4(group=32)),
    "bitmap 50 % bf16": bitmap,
    "int4, FineQuant": lambda params: mj.weights.quantize(params, mj.weights.finequant(params, 4, where=KERNELS)),
    "bipolar 4 bits g64": lambda params: mj.weights.bipolar(params, 4, None, KERNELS, group=GROUP),
}
WITH_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "FlexQ W6A8 g64": flexq(8),
    "FlexQ W6A6/8 g64": flexq(None),
    "FlexQ W6A6 g64": flexq(6),
    "bipolar W4A8 g64": lambda params: mj.weights.bipolar(params, 4, 8, KERNELS, group=GROUP),
}
INT2 = "int2 g64, search"
LREC = f"{INT2} + LREC r{RANK}"


class Loss(NamedTuple):
    """Mean negative log likelihoods in nats."""

    demo: float
    held_out: float


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The base and what it is measured on.

    Attributes:
      packed: the model as the checkpoint has it.
      model: the base, all weights decoded to float32.
      train: tokens of the text to train on.
      demo: windows of `DEMO_TOKENS`, four to a row and apart by their segments ``[8, 512]``.
      held_out: all held-out text in windows of 512 tokens (on a CPU, its first `CPU_WINDOWS`).
      batch: rows that are evaluated at a time.
      distillation: settings of `distilled`.
    """

    packed: models.Model
    model: models.Model
    train: list[int]
    demo: Windows
    held_out: Windows
    batch: int
    distillation: dict[str, Any]

    @functools.cached_property
    def evaluate(self) -> Callable[[Any, Windows], float]:
        """Returns the loss of params, of dense arrays or views, on windows."""

        def nll(params: Any, batch: Windows) -> tuple[jax.Array, jax.Array]:
            hidden = self.model.hidden(params, batch.inputs, segment_ids=batch.segment_ids, attention="xla")
            weight, axis = self.model.head(params)
            options = {"weights": batch.weights, "w_axis": axis, "reduction": "sum", "chunk": 512}
            return linear_cross_entropy(hidden, weight, batch.targets, **options), batch.weights.sum()

        run = make_evaluate(lambda theta, frozen, batch, key: mj.lift(nll)(frozen, batch))

        def evaluate(params: Any, windows: Windows) -> float:
            with jax.default_matmul_precision("highest"):
                return run((), params, windows, self.batch).nll

        return evaluate

    def losses(self, params: Any) -> Loss:
        return Loss(self.evaluate(params, self.demo), self.evaluate(params, self.held_out))

    @functools.cached_property
    def base(self) -> Loss:
        return self.losses(self.model.params)

    def measure(
        self, stored: Any, *, as_stored: bool = False, where: str | tuple[str, ...] = KERNELS
    ) -> dict[str, Any]:
        """Returns the row of a tree in which views stand for the kernels.

        Args:
          stored: the tree.
          as_stored: multiply with the views and not with the weights that they stand for.
          where: the paths of the views.
        """
        views = [leaf for path, leaf in leaf_paths(stored) if match(where, path)]
        decoded = materialize(stored)
        loss = self.losses(stored if as_stored else decoded)
        stored_bytes = sum(mj.weights.nbytes(view) for view in views)
        return {
            "layers": self.model.config.num_layers,
            "bits_per_weight": 8 * stored_bytes / sum(view.size for view in views),
            "bytes": stored_bytes,
            "relative_error": float(relative_error(self.model.params, decoded, where)),
            "nll": loss.held_out,
            "increase": loss.held_out - self.base.held_out,
            "demo_nll": loss.demo,
            "demo_increase": loss.demo - self.base.demo,
        }

    def measure_base(self) -> dict[str, Any]:
        """Returns the row of the checkpoint, with what was evaluated and the loss at the start of the text."""
        start = np.asarray(self.train[: 16 * (TOKENS + 1)], np.int32).reshape(16, TOKENS + 1)
        ones = np.ones((16, TOKENS), np.float32)
        start_windows = Windows(start[:, :-1], start[:, 1:], ones, ones.astype(np.int32))
        return self.measure(self.packed.params) | {
            "model": self.packed.name,
            "demo_tokens": int(self.demo.weights.sum()),
            "tokens": int(self.held_out.weights.sum()),
            "start_nll": self.evaluate(self.model.params, quality.head(start_windows, 0, 2 * self.batch)),
        }

    @functools.cached_property
    def int2(self) -> Any:
        return FORMATS[INT2](self.model.params)

    @functools.cached_property
    def rms(self) -> dict[str, jax.Array]:
        """Returns the root mean squares of the kernels' inputs on training text."""
        windows = quality.head(data.text_windows(self.train, TOKENS), 0, RMS_WINDOWS * self.batch // BATCH)
        return mj.adapters.act_rms(self.model.hidden, self.model.params, windows.inputs, where=KERNELS)

    def measure_lrec(self, theta: Any) -> dict[str, Any]:
        """Returns the row of int2 with a correction in bfloat16."""
        adapter = mj.adapters.lora(rank=RANK, targets=KERNELS, dtype=jnp.bfloat16)
        theta = jax.tree.map(lambda x: x.astype(jnp.bfloat16), theta)
        row = self.measure(adapter.attach(self.int2, theta))
        lost = self.losses(materialize(self.int2)).held_out - self.base.held_out
        return row | {"int2_increase": lost, "recovered": 1 - row["increase"] / lost}

    def lrec(self, weighted: bool) -> tuple[Any, Any]:
        """Returns the correction in closed form, ``weighted`` by the inputs' sizes or not: (adapter, theta)."""
        rms = self.rms if weighted else None
        return mj.adapters.lrec_init(self.model.params, self.int2, RANK, rms, KERNELS)

    def distilled(self) -> dict[str, Any]:
        """Returns the row of the weighted correction after distillation on training text."""
        adapter, theta = self.lrec(weighted=True)
        settings = self.distillation

        def loss(theta: Any, frozen: Any, batch: Windows, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            student, teacher = frozen
            logits = mj.lift(self.model.logits)(adapter.attach(student, theta), batch.inputs, attention="xla")
            targets = self.model.logits(teacher, batch.inputs, attention="xla")
            count = jnp.float32(batch.inputs.size)
            return mj.adapters.distill_loss(logits, targets) * count, count

        steps = settings["steps"]
        tx = make_optimizer(settings["lr"], steps, schedule="cosine", warmup=min(settings["warmup"], steps - 1))
        step = make_step(loss, tx)
        loader = data.Loader(data.text_windows(self.train, settings["tokens"]), settings["batch"], SEED)
        state, kl = init_state(theta, tx), []
        for i in range(steps):
            state, metrics = step(state, (self.int2, self.model.params), loader.batch_at(i))
            kl.append(metrics.loss)
            if i % 50 == 0 or i == steps - 1:
                check_finite(metrics, i)
                print(f"  step {i}: divergence {float(metrics.loss):.4f}", flush=True)
        row = self.measure_lrec(state.theta)
        return row | {"distillation": settings, "seed": SEED, "kl_first": float(kl[0]), "kl_last": float(kl[-1])}


materialize = jax.jit(mj.core.materialize)


@functools.partial(jax.jit, static_argnums=2)
def relative_error(params: Any, decoded: Any, where: str | tuple[str, ...]) -> jax.Array:
    """Returns the norm of the difference of all weights at some paths over the norm of these weights."""
    pairs = [(a, b) for (path, a), (_, b) in zip(leaf_paths(params), leaf_paths(decoded)) if match(where, path)]
    return jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in pairs) / sum(jnp.sum(a**2) for a, _ in pairs))


def load(options: argparse.Namespace) -> Bench:
    """Loads the model and cuts the text."""
    packed = quality.load_model(options.gguf, options.tiny, options.layers, "float32")
    model = dataclasses.replace(packed, params=materialize(packed.params))
    train, held_out = quality.load_text(model.tokenizer)
    demo = quality.head(data.text_windows(held_out, DEMO_TOKENS), 0, DEMO_WINDOWS)
    demo = Windows(*(field.reshape(-1, TOKENS) for field in demo[:3]))
    segments = np.arange(TOKENS, dtype=np.int32) // DEMO_TOKENS + 1
    demo = demo._replace(segment_ids=np.tile(segments, (len(demo.inputs), 1)))
    rest = data.text_windows(held_out, TOKENS)
    if jax.default_backend() == "cpu":
        rest = quality.head(rest, 0, CPU_WINDOWS)
    rest = rest._replace(segment_ids=np.ones_like(rest.inputs))
    distillation = dict(DISTILLATION)
    if options.tiny or options.layers:
        demo, rest = quality.head(demo, 0, 1), quality.head(rest, 0, 2)
        distillation |= {"batch": 2, "tokens": 128, "steps": 3}
    if options.steps:
        distillation["steps"] = options.steps
    batch = 2 if options.tiny or options.layers else BATCH
    return Bench(packed, model, train, demo, rest, batch, distillation)


def cases_of(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the cases, which share a `Bench` that the first of them loads."""
    bench = functools.cache(lambda: load(options))
    rows: dict[str, Callable[[Bench], dict[str, Any]]] = {"Q4_1, the base": Bench.measure_base}
    for name, store in FORMATS.items():
        rows[name] = lambda bench, store=store: bench.measure(store(bench.model.params))
    rows |= {
        f"{LREC}, closed form": lambda bench: bench.measure_lrec(bench.lrec(weighted=False)[1]),
        f"{LREC}, weighted": lambda bench: bench.measure_lrec(bench.lrec(weighted=True)[1]),
        f"{LREC}, distilled": Bench.distilled,
    }
    rows["embedding and head in int8 g64"] = lambda bench: bench.measure(
        embedding_in_int8(bench.model.params), where="embed_tokens/embedding"
    )
    for name, store in OTHERS.items():
        rows[name] = lambda bench, store=store: bench.measure(store(bench.model.params))
    for name, store in WITH_ACTIVATIONS.items():
        rows[name] = lambda bench, store=store: bench.measure(store(bench.model.params), as_stored=True)
    return {name: lambda row=row: row(bench()) for name, row in rows.items()}


if __name__ == "__main__":
    quality.main("formats", cases_of)
