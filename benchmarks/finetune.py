"""LoRA fine-tuning steps of Llama shapes on random bfloat16 weights: speed and peak memory, beside two baselines.

Every stack does the same work: rank-16 adapters on all linear layers, AdamW on their float32 factors, full
rematerialisation (gradient checkpointing), the same batch of random tokens at every step.

    python -m benchmarks.finetune                                  # all of it, one process per case
    python -m benchmarks.finetune --cases 'llama-3.1-8b-b2*'       # some of it
    python -m benchmarks.finetune --case tiny-b2-s32/memjax        # one case, here
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.shapes import LLAMAS, Llama

RANK, ALPHA, LEARNING_RATE, SEED = 16, 32.0, 1e-4, 0
CHUNK = 512  # tokens whose logits exist at a time
WARMUP, REPEATS = 2, 10


class Shape(NamedTuple):
    """A model and a batch of ``batch`` sequences of ``length`` tokens."""

    model: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.model}-b{self.batch}-s{self.length}"


TINY = Shape("tiny", 2, 32)
SHAPES = (Shape("llama-3.2-1b", 4, 2048), Shape("llama-3.1-8b", 2, 2048), Shape("llama-3.1-8b", 1, 8192))
STACKS = ("plain_jax", "memjax", "peft", "memjax_int4", "memjax_nf4", "memjax_nf4_int8")
CASES = {f"{shape.name}/{stack}": (shape, stack) for stack in STACKS for shape in (*SHAPES, TINY)}
BASES = {
    "memjax": (None, None),
    "memjax_int4": ("int4", None),
    "memjax_nf4": ("nf4", None),
    "memjax_nf4_int8": ("nf4", "int8"),
}
"""Stack -> format of the linear layers, and of embedding and head; None keeps bfloat16."""


def memjax_config(config: Llama) -> Any:
    """Returns memjax's configuration of these sizes."""
    from memjax import models

    return models.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_eps=config.eps,
        tie_embeddings=config.tied,
    )


def build_memjax(
    config: Llama, attention: str, *, layers: str | None, rest: str | None, remat: Any = "full", rank: int | None = RANK
) -> harness.Workload:
    """Returns memjax's training step.

    Args:
      config: sizes.
      attention: "cudnn" or "xla".
      layers, rest: formats as in `BASES`, in groups of 64.
      remat: as `memjax.models.Model.hidden` takes it.
      rank: of the adapters; None trains all weights, which are bfloat16 as are the moments.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import memjax as mj
    from memjax import models
    from memjax.core.paths import map_with_path
    from memjax.ops import linear_cross_entropy
    from memjax.recipes.train import init_state, make_step

    model = models.Model(memjax_config(config))
    formats = {"int4": mj.codecs.int4(group=64), "int8": mj.codecs.int8(group=64), "nf4": mj.codecs.nf4()}
    adapter = mj.adapters.lora(rank=rank or RANK, alpha=ALPHA, targets="**/*_proj/kernel")
    tx = optax.adamw(LEARNING_RATE)

    def init(key: Any) -> tuple[Any, Any]:
        shapes = models.abstract(model.config, jnp.bfloat16)
        keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes)) + 1))

        def make(path: str, leaf: Any) -> Any:
            mean, std = (1.0, 0.02) if path.endswith("scale") else (0.0, 0.02)
            of_layer = path.startswith("layers/") and path.endswith("_proj/kernel")
            of_rest = path.endswith("embedding") or path.startswith("lm_head/")
            codec = formats.get(layers if of_layer else rest if of_rest else None)
            along = -1 if path.endswith("embedding") else -2  # a looked-up row has groups of its own

            def pack(x: Any) -> Any:
                return mj.weights.PackedWeight(codec.encode(x, along), mj.weights.Axes())

            return harness.random_leaf(next(keys), leaf.shape, leaf.dtype, mean, std, pack if codec else None)

        frozen = map_with_path(make, shapes)
        if rank is None:
            return init_state(frozen, tx), {}
        return init_state(adapter.init(next(keys), frozen), tx), frozen

    def loss_of_params(params: Any, tokens: Any) -> tuple[Any, Any]:
        x = model.hidden(params, tokens[:, :-1], remat=remat, attention=attention)
        weight, axis = model.head(params)
        options = {"w_axis": axis, "reduction": "sum", "chunk": CHUNK}
        return linear_cross_entropy(x, weight, tokens[:, 1:], **options), jnp.float32(tokens[:, 1:].size)

    def loss_fn(theta: Any, frozen: Any, tokens: Any, key: Any) -> tuple[Any, Any]:
        if rank is None:
            return loss_of_params(theta, tokens)
        return mj.lift(loss_of_params)(adapter.attach(frozen, theta), tokens)

    train = make_step(loss_fn, tx)

    def step(state: Any, frozen: Any, tokens: Any) -> tuple[Any, Any]:
        state, metrics = train(state, frozen, tokens)
        return state, metrics.loss

    return harness.Workload(init, step)


def build(shape: Shape, stack: str, attention: str, remat: Any = "full", rank: int | None = RANK) -> harness.Workload:
    """Returns the workload of a JAX stack; arguments as for `build_memjax`."""
    config = LLAMAS[shape.model]
    if stack == "plain_jax":
        from benchmarks.baselines import plain_jax

        chunk = min(CHUNK, shape.batch * shape.length)
        return plain_jax.build(
            config,
            rank=rank,
            alpha=ALPHA,
            chunk=chunk,
            learning_rate=LEARNING_RATE,
            attention=attention,
            remat=remat,
        )
    layers, rest = BASES[stack]
    return build_memjax(config, attention, layers=layers, rest=rest, remat=remat, rank=rank)


def flops_per_token(shape: Shape) -> float:
    """Returns the floating-point operations per token: forward, its recomputation, and the gradient by activations.

    Frozen weights have no gradient of their own, so a matrix costs 6 per element. Causal attention costs 2 S per
    query channel forward, as much again, and 2.5 times that backward. Adapters are left out (below 1 %).
    """
    config = LLAMAS[shape.model]
    matrices = config.layers * sum(a * b for a, b in config.matrices().values()) + config.d_model * config.vocab
    return 6 * matrices + 9 * shape.length * config.heads * config.head_dim * config.layers


def run_case(name: str) -> dict[str, Any]:
    """Runs one case and returns what it measured."""
    return measure(*CASES[name])


def measure(
    shape: Shape, stack: str, remat: Any = "full", rank: int | None = RANK, nf4: bool = False
) -> dict[str, Any]:
    """Runs the training step of a stack and returns what it measured; arguments as for `build_memjax`.

    Args:
      nf4: pack the base of "peft" by bitsandbytes.
    """
    tokens = np.random.default_rng(SEED).integers(0, LLAMAS[shape.model].vocab, (shape.batch, shape.length + 1))
    tokens = tokens.astype(np.int32)
    if stack == "peft":
        from benchmarks.baselines import peft_lora

        row = peft_lora.run(
            LLAMAS[shape.model],
            tokens[:, :-1],
            rank=RANK,
            alpha=ALPHA,
            learning_rate=LEARNING_RATE,
            seed=SEED,
            warmup=WARMUP,
            repeats=REPEATS,
            nf4=nf4,
        )
    else:
        import jax

        attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
        workload = build(shape, stack, attention, remat, rank)
        row = harness.measure_training(workload, tokens, seed=SEED, warmup=WARMUP, repeats=REPEATS)
        row |= {"attention": attention}
    return row | {
        "shape": shape.name,
        "stack": stack,
        "remat": remat,
        "seed": SEED,
        "warmup": WARMUP,
        "tokens_per_s": shape.batch * shape.length / row["median_ms"] * 1e3,
        "flops_per_token": flops_per_token(shape),
    }


if __name__ == "__main__":
    harness.main("finetune", "benchmarks.finetune", list(CASES), run_case, default="llama*")
