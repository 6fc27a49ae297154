"""The loss of an output layer, forward and backward in bfloat16, beside losses of all logits.

``optax`` makes all logits, converts them to float32 and calls optax's loss, as training loops do; ``naive`` has a form
of that which XLA makes less of. Frozen heads have a gradient by the inputs only; trained ones by both. All ways of a
shape are measured in one process, so that their ratios are of one run of one card. The floor is that of the products a
way needs at least (two with a frozen head, three with a trained one) at the rate of the same process's matmul; a way
that makes logits again in backward pays a fourth. Temporaries are XLA's own count.

    python -m benchmarks.linear_cross_entropy
    python -m benchmarks.linear_cross_entropy --case tiny/t64
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.shapes import LLAMAS

WARMUP, REPEATS, SEED = 2, 7, 0


class Head(NamedTuple):
    """An output layer and the tokens it sees; ``w_axis`` is the axis of size D in the weight as stored."""

    tokens: int
    width: int
    entries: int
    w_axis: int


def _head(model: str, tokens: int) -> Head:
    config = LLAMAS[model]
    return Head(tokens, config.d_model, config.vocab, int(config.tied))


CASES = {
    "llama-3.1-8b/t4096": _head("llama-3.1-8b", 4096),
    "llama-3.2-1b/t4096": _head("llama-3.2-1b", 4096),
    "tiny/t64": _head("tiny", 64),
}


def naive(logits: Any, labels: Any) -> Any:
    """Returns the cross-entropy of every token's logits, float32, without a gather, whose gradient scatters."""
    import jax
    import jax.numpy as jnp

    is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]
    return jax.nn.logsumexp(logits, axis=1) - jnp.where(is_label, logits, 0.0).sum(axis=1)


def ways(head: Head) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Returns name -> (loss of ``x, w, labels``, whether the head is trained), those with few temporaries first."""
    import jax
    import jax.numpy as jnp
    import optax

    from memjax.ops import linear_cross_entropy

    def by(implementation: Any, chunk: int | None = None) -> Callable[..., Any]:
        def loss(x: Any, w: Any, labels: Any) -> Any:
            return linear_cross_entropy(x, w, labels, w_axis=head.w_axis, chunk=chunk, implementation=implementation)

        return loss

    def of_all_logits(loss: Callable[..., Any]) -> Callable[..., Any]:
        def mean(x: Any, w: Any, labels: Any) -> Any:
            logits = jax.lax.dot_general(x, w, (((1,), (head.w_axis,)), ((), ()))).astype(jnp.float32)
            return jnp.mean(loss(logits, labels))

        return mean

    by_optax = optax.softmax_cross_entropy_with_integer_labels

    return {
        "memjax, frozen": (by(None), False),
        "memjax by XLA, frozen": (by("xla"), False),
        "memjax, trained": (by(None), True),
        "memjax by XLA, trained": (by("xla"), True),
        "memjax, trained, all kept": (by(None, head.tokens), True),
        "memjax by XLA, trained, all kept": (by("xla", head.tokens), True),
        "naive, frozen": (of_all_logits(naive), False),
        "naive, trained": (of_all_logits(naive), True),
        "optax, frozen": (of_all_logits(by_optax), False),
        "optax, trained": (of_all_logits(by_optax), True),
    }


def run_case(name: str) -> dict[str, Any]:
    """Measures every way of one shape and returns their times and bytes."""
    import jax
    import jax.numpy as jnp

    head = CASES[name]
    on_gpu = jax.default_backend() == "gpu"
    rates = harness.ceilings(8192, 64) if on_gpu else harness.ceilings(512, 64)
    keys = jax.random.split(jax.random.key(SEED), 3)
    x = harness.random_leaf(keys[0], (head.tokens, head.width), jnp.bfloat16, 0.0, 1.0)
    shape = (head.width, head.entries) if head.w_axis == 0 else (head.entries, head.width)
    w = harness.random_leaf(keys[1], shape, jnp.bfloat16, 0.0, head.width**-0.5)
    labels = jax.random.randint(keys[2], (head.tokens,), 0, head.entries)
    product_ms = 2 * head.tokens * head.width * head.entries / rates["matmul_tflops"] / 1e9
    rows: dict[str, dict[str, Any]] = {}
    for way, (loss, trained) in ways(head).items():
        step = jax.value_and_grad(loss, argnums=(0, 1) if trained else 0)
        compiled = jax.jit(step).lower(x, w, labels).compile()
        timing = harness.time_calls(
            lambda compiled=compiled: compiled(x, w, labels), jax.block_until_ready, warmup=WARMUP, repeats=REPEATS
        )
        stats = jax.devices()[0].memory_stats()
        floor_ms = (3 if trained else 2) * product_ms
        rows[way] = {
            "ms": timing.median_ms,
            "min_ms": timing.min_ms,
            "max_ms": timing.max_ms,
            "floor_ms": floor_ms,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "peak_bytes": stats["peak_bytes_in_use"] if stats else None,
            "loss": float(compiled(x, w, labels)[0]),
        }
    for way, row in rows.items():
        for other in ("naive", "optax"):
            base = rows[f"{other}, {'trained' if 'trained' in way else 'frozen'}"]
            row[f"time_over_{other}"] = row["ms"] / base["ms"]
            row[f"temp_over_{other}"] = row["temp_bytes"] / base["temp_bytes"]
    return {
        **head._asdict(),
        "matmul_tflops": rates["matmul_tflops"],
        "product_ms": product_ms,
        "dw_float32_bytes": 4 * head.width * head.entries,
        "naive_logits": "bfloat16",
        "ways": rows,
    }


if __name__ == "__main__":
    harness.main("linear_cross_entropy", "benchmarks.linear_cross_entropy", list(CASES), run_case, default="llama*")
