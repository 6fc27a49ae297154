"""Optimizer steps at the shapes of Llama-3.2-1B: fused kernels beside optax.adamw.

A step's time is that of many steps in a row on donated arrays, divided by their number. Its floor is the bytes of
parameters and state, read and written once, and of gradients, read once, over the rate at which the same process copies
memory. Peers: optax.adamw; optax.contrib.galore, which takes neither stacked layers nor bfloat16, on the layers of `up`
one by one, between two changes of its subspace; torch's fused AdamW, whose gradients have the dtype of its parameters.

    python -m benchmarks.optim_steps
    python -m benchmarks.optim_steps --cases 'llama-3.2-1b/model'
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import harness
from pallas_kernels.optim.shapes import COUNTS, SHAPES

CASES = ("llama-3.2-1b/up", "llama-3.2-1b/embed", "llama-3.2-1b/model")
STEPS, REPEATS, DENSITY, LEARNING_RATE = 20, 5, 0.25, 1e-4
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def leaves_of(case: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the leaves of a case by name."""
    if not case.endswith("/model"):
        return {case: SHAPES[case]}
    prefix = case.removesuffix("model")
    return {f"{name}{i}": SHAPES[prefix + name] for name, count in COUNTS.items() for i in range(count)}


def step_ms(run: Step, params: Any, grads: Any, state: Any) -> float:
    """Returns the time of ``run(params, grads, state) -> (params, state)``, which takes the memory of both."""
    import jax

    params, state = jax.block_until_ready(run(params, grads, state))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(STEPS):
            params, state = run(params, grads, state)
        jax.block_until_ready(params)
        times.append((time.perf_counter() - start) / STEPS * 1e3)
    return statistics.median(times)


def frugal_state(params: Any) -> Any:
    """Returns moments of a quarter of the rows of every matrix, and which rows they are."""
    import jax
    import jax.numpy as jnp

    def start(p: Any) -> Any:
        outer, rows, columns = (1, *p.shape)[-3:]
        kept = int(rows * DENSITY)
        order = jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(jax.random.key(0), outer))
        moments = jnp.zeros((outer, kept, columns), jnp.float32)
        return moments, jnp.zeros_like(moments), order.astype(jnp.int32)

    return jnp.int32(0), jax.tree.map(start, params)


def frugal_step(params: Any, grads: Any, state: Any, implementation: str) -> tuple[Any, Any]:
    """Returns parameters and state after a step of FRUGAL on the rows of `frugal_state`."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import optim
    from pallas_kernels._bits import seed_words

    count, held = state[0] + 1, state[1]
    scalars = optim.adam_scalars(LEARNING_RATE, 0.9, 0.999, 1e-8, count.astype(jnp.float32), free_rate=LEARNING_RATE)
    leaves, tree = jax.tree.flatten(params)
    made = []
    for i, (p, g, moments) in enumerate(zip(leaves, tree.flatten_up_to(grads), tree.flatten_up_to(held))):
        mu, nu, place = moments
        words = seed_words(jnp.stack([count.astype(jnp.uint32), jnp.uint32(i)]))
        shape = (*place.shape, p.shape[-1])
        new, mu, nu = optim.frugal_adam_step(
            p.reshape(shape), g.reshape(shape), mu, nu, place, scalars, words, implementation=implementation
        )
        made.append((new.reshape(p.shape), (mu, nu, place)))
    return tree.unflatten([new for new, _ in made]), (count, tree.unflatten([moments for _, moments in made]))


def methods() -> dict[str, tuple[str, Callable[[Any], Any], Step]]:
    """Returns what is measured: name -> (dtype of the parameters, initial state of parameters, step)."""
    import functools

    import optax

    from memjax.optim import apply_adam8bit, scale_by_adam8bit

    adamw = optax.adamw(LEARNING_RATE, weight_decay=0.0)

    def plain(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def eight(implementation: str, seed: int | None) -> Step:
        return functools.partial(apply_adam8bit, learning_rate=LEARNING_RATE, seed=seed, implementation=implementation)

    init = scale_by_adam8bit().init
    return {
        "optax.adamw, float32": ("float32", adamw.init, plain),
        "optax.adamw, bfloat16": ("bfloat16", adamw.init, plain),
        "adam8bit, kernel, float32": ("float32", init, eight("mosaic_gpu", None)),
        "adam8bit, kernel, bfloat16 stochastic": ("bfloat16", init, eight("mosaic_gpu", 0)),
        "adam8bit, XLA, bfloat16 stochastic": ("bfloat16", init, eight("xla", 0)),
        "FRUGAL 0.25, kernel, float32": (
            "float32",
            frugal_state,
            functools.partial(frugal_step, implementation="mosaic_gpu"),
        ),
        "FRUGAL 0.25, kernel, bfloat16 stochastic": (
            "bfloat16",
            frugal_state,
            functools.partial(frugal_step, implementation="mosaic_gpu"),
        ),
        "FRUGAL 0.25, XLA, bfloat16 stochastic": (
            "bfloat16",
            frugal_state,
            functools.partial(frugal_step, implementation="xla"),
        ),
    }


def galore_rows(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, Callable[[Any], Any], Step]]:
    """Returns optax's GaLore as `methods` would, for the matrices of `shapes`; its projections are never made anew."""
    import optax

    rank = int(min(next(iter(shapes.values()))[-2:]) * DENSITY)
    tx = optax.contrib.galore(LEARNING_RATE, rank=rank, update_proj_gap=STEPS * (REPEATS + 2))

    def init(params: Any) -> Any:
        first, *rest = tx.init(params)
        return (first._replace(count=first.count + 1), *rest)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(optax.tree.cast(grads, "float32"), state, params)
        return optax.apply_updates(params, updates), state

    return {f"optax.contrib.galore {DENSITY:g}, float32": ("float32", init, step)}


def torch_row(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """Measures torch's fused AdamW."""
    import torch

    kind = getattr(torch, dtype)
    params = [torch.randn(shape, device="cuda", dtype=kind) for shape in shapes.values()]
    for p in params:
        p.grad = torch.full_like(p, 1e-2)
    tx = torch.optim.AdamW(params, LEARNING_RATE, weight_decay=0.0, fused=True)
    tx.step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    size = sum(p.nbytes for p in params)
    state = sum(leaf.nbytes for held in tx.state.values() for leaf in held.values())
    timing = harness.time_calls(
        lambda: [tx.step() for _ in range(STEPS)], lambda _: torch.cuda.synchronize(), warmup=1, repeats=REPEATS
    )
    return {
        "what": f"torch AdamW, fused, {dtype}",
        "bytes": 3 * size + 2 * state,
        "state_over_params": state / size,
        "temp_over_params": (torch.cuda.max_memory_allocated() - before) / size,
        "ms": timing.median_ms / STEPS,
    }


def run_case(name: str) -> dict[str, Any]:
    """Measures the leaves of one case and returns the times."""
    import jax
    import jax.numpy as jnp

    from memjax.core import compiled_bytes, nbytes

    copy = harness.ceilings(2048, 1024)["copy_tb_per_s"]
    shapes = leaves_of(name)
    apart = {f"{leaf}/{i}": shape[1:] for leaf, shape in shapes.items() if len(shape) == 3 for i in range(shape[0])}
    ways = [(shapes, methods()), *([(apart, galore_rows(apart))] if name.endswith("/up") else [])]
    rows = []
    for leaves, found in ways:
        grads = {
            leaf: 1e-2 * jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
            for i, (leaf, shape) in enumerate(leaves.items())
        }
        for what, (dtype, init, step) in found.items():
            params = {leaf: jax.random.normal(jax.random.key(9), shape, dtype) for leaf, shape in leaves.items()}
            state = jax.jit(init)(params)
            abstract = jax.eval_shape(lambda *x: x, params, grads, state)
            compiled = jax.jit(step, donate_argnums=(0, 2)).lower(*abstract).compile()
            row: dict[str, Any] = {
                "what": what,
                "bytes": 2 * nbytes(params) + nbytes(grads) + 2 * nbytes(state),
                "state_over_params": nbytes(state) / nbytes(params),
                "temp_over_params": compiled_bytes(compiled).temp / nbytes(params),
            }
            row["ms"] = step_ms(compiled, params, grads, state)
            rows.append(row)
            del params, state
    if importlib.util.find_spec("torch") and jax.default_backend() == "gpu":
        rows += [torch_row(shapes, dtype) for dtype in ("float32", "bfloat16")]
    for row in rows:
        row["floor_ms"] = row["bytes"] / copy / 1e9
        row["over_floor"] = row["ms"] / row["floor_ms"]
    return {"leaves": {leaf: list(shape) for leaf, shape in shapes.items()}, "copy_tb_per_s": copy, "steps": rows}


if __name__ == "__main__":
    harness.main("optim_steps", "benchmarks.optim_steps", list(CASES), run_case, default="*")
