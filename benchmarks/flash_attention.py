"""Attention under masks, forward alone and with its backward pass, beside peers on the same card.

All ways of a case are measured in one process, so that their ratios are of one run of one card; FlexAttention runs in a
process of its own, as two frameworks do not share a card's memory. A time is that of calls in a row, so that no call
waits for the host. Lists of blocks are made before, as a model makes them once for all its layers. FLOPs are of two
products forward and of five backward, for the elements that the mask shows (useful) and for the blocks that are
visited. ``masks/131072`` measures how long it takes to list the blocks of a mask.

    python -m benchmarks.flash_attention
    python -m benchmarks.flash_attention --case tiny/window
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness
from pallas_kernels.flash_attention.shapes import SHAPES, Shape

WARMUP, REPEATS, CALLS, SEED = 2, 7, 10, 0
PEER_S = 80  # for FlexAttention to compile and run

CASES = {
    **SHAPES,
    "tiny/causal": Shape(1, 2, 1, 64, 32, ("causal",)),
    "tiny/window": Shape(1, 2, 2, 96, 32, ("window", 16)),
    "tiny/documents": Shape(1, 2, 2, 96, 32, ("documents", 24)),
    "tiny/blocks": Shape(1, 2, 2, 256, 32, ("blocks", 0.5)),
}
ALL_KEYS = "memjax, all keys"
WITHOUT_TORCH = ("causal-2k", "causal-16k", "causal-8k/d64", "causal-8k/d256", "causal-8k/grouped")
"""Cases without FlexAttention, which takes a minute to compile."""
BUILDS = {"masks/131072": 131072, "tiny/masks": 512}


def document_ids(length: int, mean: float, seed: int = SEED) -> np.ndarray:
    """Returns the document of every token, int32 ``[length]``; documents have ``mean`` tokens on average."""
    starts = np.random.default_rng(seed).random(length) < 1 / mean
    return np.cumsum(starts, dtype=np.int32)


def block_choice(length: int, fraction: float, seed: int = SEED) -> np.ndarray:
    """Returns which 128 x 128 blocks are visited, bool ``[n, n]``, at least one in every row."""
    n = math.ceil(length / 128)
    return (np.random.default_rng(seed).random((n, n)) < fraction) | np.eye(n, dtype=bool)


def make_mask(shape: Shape) -> Any:
    """Returns the mask of a case, of `memjax.attention.masks`."""
    from memjax.attention import masks

    kind, *numbers = shape.mask
    if kind == "causal":
        return masks.causal()
    if kind == "window":
        return masks.window(int(numbers[0]) - 1, 0)
    if kind == "window and sinks":
        return masks.causal() & (masks.window(int(numbers[0]) - 1, 0) | masks.sink(int(numbers[1])))
    if kind == "documents":
        return masks.causal() & masks.segments(document_ids(shape.length, float(numbers[0]))[None])
    return masks.blocks(block_choice(shape.length, float(numbers[0]))[None, None], 128)


def ways(shape: Shape) -> dict[str, Callable[..., Any]]:
    """Returns name -> attention of ``q, k, v, lists``; those of peers only where they can say the mask."""
    import jax

    from memjax.attention import attend, masks

    kernels: Any = "mosaic_gpu" if jax.default_backend() == "gpu" else None
    kind, *numbers = shape.mask

    def own(mask: Any) -> Callable[..., Any]:
        return lambda q, k, v, lists: attend(q, k, v, mask=mask, implementation=kernels)

    found: dict[str, Callable[..., Any]] = {
        "memjax": lambda q, k, v, lists: attend(q, k, v, block_mask=lists, implementation=kernels),
        "memjax, lists made in the call": own(make_mask(shape)),
    }
    if shape == SHAPES["causal-8k"]:
        found["memjax, as a predicate"] = own(masks.predicate(lambda q, k: k <= q))
    if kind != "causal":
        found[ALL_KEYS] = own(None)

    def without_lists(attention: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda q, k, v, lists: attention(q, k, v, is_causal=True, **options)

    if kind in ("causal", "window"):
        window = {} if kind == "causal" else {"local_window_size": (int(numbers[0]) - 1, 0)}
        if jax.default_backend() == "gpu":
            found["cuDNN"] = without_lists(jax.nn.dot_product_attention, implementation="cudnn", **window)
        if importlib.util.find_spec("tokamax"):
            import tokamax

            found["tokamax"] = without_lists(tokamax.dot_product_attention, **window)
    return found


def timed(function: Callable[..., Any], *operands: Any) -> dict[str, float]:
    """Compiles and times a function, calls in a row.

    Returns:
      Milliseconds a call, seconds of compiling, and XLA's temporaries.
    """
    import jax

    start = time.perf_counter()
    compiled = jax.jit(function).lower(*operands).compile()
    compile_s = time.perf_counter() - start

    def call() -> Any:
        for _ in range(CALLS - 1):
            compiled(*operands)
        return compiled(*operands)

    timing = harness.time_calls(call, jax.block_until_ready, warmup=WARMUP, repeats=REPEATS)
    return {
        "ms": timing.median_ms / CALLS,
        "min_ms": timing.min_ms / CALLS,
        "max_ms": timing.max_ms / CALLS,
        "compile_s": compile_s,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def gradients(attention: Callable[..., Any], q: Any, k: Any, v: Any, lists: Any, do: Any) -> Any:
    """Returns the result and the gradients of ``q, k, v`` for ``do``, that of the result."""
    import jax

    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, lists), q, k, v)
    return out, back(do)


def run_attention(shape: Shape, with_torch: bool) -> dict[str, Any]:
    """Measures every way of one case; a way that fails is a row with its error."""
    import jax
    import jax.numpy as jnp

    from memjax.attention import column_sums, make_block_mask

    on_gpu = jax.default_backend() == "gpu"
    rates = harness.ceilings(8192, 64) if on_gpu else harness.ceilings(512, 64)
    mask, length = make_mask(shape), shape.length
    heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    keys = jax.random.split(jax.random.key(SEED), len(heads))
    q, k, v, do = (
        jax.random.normal(key, (shape.batch, length, n, shape.head_dim), jnp.bfloat16) for key, n in zip(keys, heads)
    )
    lists = make_block_mask(mask, length, length, blocks=(128, 128))
    useful, visited = mask.density(length, length), lists.density
    lists = jax.tree.map(jnp.asarray, lists)
    pairs = shape.batch * shape.heads * length**2
    forward_flops = 4 * shape.head_dim * pairs  # all keys shown

    def rated(found: dict[str, float], flops: float, whole: bool = False) -> dict[str, float]:
        for name, fraction in (("useful", useful), ("visited", visited)):
            found[f"{name}_tflops"] = flops * (1 if whole else fraction) / found["ms"] / 1e9
        return found

    rows: dict[str, dict[str, Any]] = {}
    for way, attention in ways(shape).items():
        row: dict[str, Any] = {}
        rows[way] = row
        for name, function, operands, flops in (
            ("forward", attention, (q, k, v, lists), forward_flops),
            ("both", functools.partial(gradients, attention), (q, k, v, lists, do), 3.5 * forward_flops),
        ):
            try:
                row[name] = rated(timed(function, *operands), flops, whole=way == ALL_KEYS)
            except Exception as problem:
                row[name] = {"error": f"{type(problem).__name__}: {problem}"[:300]}
    if with_torch and importlib.util.find_spec("torch") and on_gpu:
        sizes = [str(x) for x in (*shape[:5], *shape.mask)]
        found = harness.run_process(["benchmarks.baselines.flex_attention", *sizes], PEER_S)
        rows["FlexAttention"] = {
            name: {"error": found["error"]} if "error" in found else rated(found[name], flops)
            for name, flops in (("forward", forward_flops), ("both", 3.5 * forward_flops))
        }
    lse = jax.random.normal(keys[0], (shape.batch, length, shape.heads)) + math.log(length)
    sums = functools.partial(column_sums, implementation="mosaic_gpu" if on_gpu else None)
    found = timed(lambda q, k, lse, lists: sums(q, k, lse, block_mask=lists), q, k, lse, lists)
    rows["memjax, column_sums"] = {"forward": rated(found, forward_flops / 2)}
    own = rows["memjax"]
    for name, found in rows.get(ALL_KEYS, {}).items():
        if "ms" in found and "ms" in own[name]:
            own[name]["time_over_visited"] = own[name]["ms"] / (visited * found["ms"])
    for row in rows.values():
        for name, found in row.items():
            if "ms" in found and "ms" in own[name]:
                found["time_over_memjax"] = found["ms"] / own[name]["ms"]
    return {
        **shape._asdict(),
        "useful": useful,
        "visited": visited,
        "matmul_tflops": rates["matmul_tflops"],
        "floor_ms": forward_flops * visited / rates["matmul_tflops"] / 1e9,
        "ways": rows,
    }


def run_build(length: int) -> dict[str, Any]:
    """Measures listing the blocks of masks of ``length`` queries and keys: static ones here, dynamic ones by XLA."""
    import jax.numpy as jnp

    from memjax.attention import make_block_mask, masks

    build = functools.partial(make_block_mask, S=length, T=length, blocks=(128, 128))
    rows: dict[str, dict[str, Any]] = {}
    static = {
        "causal": masks.causal(),
        "window 4096": masks.window(4095, 0),
        "window and sinks": masks.causal() & (masks.window(4095, 0) | masks.sink(4)),
    }
    for name, mask in static.items():
        timing = harness.time_calls(lambda mask=mask: build(mask), lambda x: x, warmup=1, repeats=REPEATS)
        rows[name] = {"where": "host", **timing._asdict()}
    ids = jnp.asarray(document_ids(length, min(1024, length / 8)))[None]
    capacity = max(4, math.ceil(length / 128 / 8))
    for name, make in {
        "documents": lambda ids: build(masks.causal() & masks.segments(ids), capacity=capacity),
        "offset": lambda ids: build(masks.causal(ids[:, -1] * 0) & masks.window(4095, 0), capacity=capacity),
    }.items():
        rows[name] = {"where": "device", "capacity": capacity, **timed(make, ids)}
        rows[name]["median_ms"] = rows[name].pop("ms")
    return {"length": length, "builds": rows}


def run_case(name: str) -> dict[str, Any]:
    """Measures one case and returns its row."""
    return run_build(BUILDS[name]) if name in BUILDS else run_attention(CASES[name], name not in WITHOUT_TORCH)


if __name__ == "__main__":
    harness.main("flash_attention", "benchmarks.flash_attention", [*CASES, *BUILDS], run_case, default="[!t]*")
