"""Products with packed weights, beside XLA's product with the same weight in bfloat16 and with decoding by XLA.

A call's time is the sum of its kernels' times on the device, measured by CUPTI; weights are rotated, so that none is in
the cache when it is read. The floor is the bytes of codes, scales, inputs and outputs over the rate at which the same
process copies memory.

    python -m benchmarks.packed_matmul                        # all of it, one process per weight
    python -m benchmarks.packed_matmul --cases '*up/int4'
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import harness
from pallas_kernels.packed_matmul.shapes import ROWS, SHAPES

MEASURED = ("llama-3.1-8b/mlp/up", "llama-3.1-8b/mlp/down")
WEIGHTS = {
    "bf16": None,
    "int4": {"bits": 4, "group": 128},
    "int8": {"bits": 8, "group": 128},
    "int6": {"bits": 6, "group": 128},
    "nf4": {"bits": 4, "group": 64, "nf4": True},
}
CASES = {f"{shape}/{name}": (shape, name) for shape in MEASURED for name in WEIGHTS}
ROTATED_BYTES, ITERATIONS, SEED = 3 * 10**8, 5, 0


def compiled(fn: Callable[..., Any], weights: Sequence[Any], x: Any) -> Any:
    """Returns the program that calls ``fn(x, weight)`` with one weight after the other."""
    import jax

    call = jax.jit(fn)  # is lowered once for all weights

    def run(x: Any, weights: Sequence[Any]) -> list[Any]:
        return [call(x, weight) for weight in weights]

    return jax.jit(run).lower(x, weights).compile()


def device_us(program: Any, weights: Sequence[Any], x: Any) -> float:
    """Returns the time on the device of a call in ``program``, in microseconds."""
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.Cupti(finalize=False)  # detaching takes seconds
    _, runs = cupti.measure(program, aggregate=False, iterations=ITERATIONS)(x, weights)
    # XLA may fuse what several calls do into one kernel, so only their sum is a call's time.
    return statistics.median(sum(ms for _, ms in kernels) * 1e3 / len(weights) for kernels in runs)


def random_weight(form: Any, k: int, n: int, seed: int) -> Any:
    """Returns random codes and scales ``(planes, scale, offset)`` of a weight ``[k, n]``."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels._bits import PLANES

    keys = jax.random.split(jax.random.key(seed), len(PLANES[form.bits]) + 1)
    planes = tuple(jax.random.bits(key, (k * width // 8, n), jnp.uint8) for key, width in zip(keys, PLANES[form.bits]))
    scale = (0.01 * jax.random.uniform(keys[-1], (k // form.group, n), minval=0.5, maxval=1.5)).astype(jnp.bfloat16)
    return planes, scale, None


def run_case(name: str) -> dict[str, Any]:
    """Measures one weight at every number of rows and returns the times."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.packed_matmul import Format, decode, packed_matmul

    shape, kind = CASES[name]
    k, n = SHAPES[shape]
    copy = harness.ceilings(4096, 1024)["copy_tb_per_s"]
    inputs = {m: jax.random.normal(jax.random.key(m), (m, k)).astype(jnp.bfloat16) for m in ROWS}
    outputs = jax.random.normal(jax.random.key(1), (ROWS[-1], n)).astype(jnp.bfloat16)

    def measured(todo: Sequence[tuple[str, int, Any, Callable[..., Any]]], weights: Sequence[Any], size: float) -> Any:
        """Returns a row for each (name, rows, input, function) of weights of ``size`` bytes."""
        with ThreadPoolExecutor() as pool:  # a kernel takes seconds to compile
            programs = list(pool.map(lambda x: compiled(x[3], weights, x[2]), todo))
        rows = []
        for (what, m, x, _), program in zip(todo, programs):
            us = device_us(program, weights, x)
            moved = size + (2 * m * (k + n) if what != "decode only" else 2 * k * n)
            floor_us = moved / copy / 1e6
            rows.append({"what": what, "rows": m, "us": us, "floor_us": floor_us, "over_floor": us / floor_us})
            if m > 1:
                rows[-1]["tflops"] = 2 * m * k * n / us / 1e6
        return rows

    settings = WEIGHTS[kind]
    facts = {"shape": shape, "k": k, "n": n, "format": kind, "copy_tb_per_s": copy}
    if settings is None:
        dense = [jax.random.normal(jax.random.key(i), (k, n)).astype(jnp.bfloat16) for i in range(3)]
        todo = [("x W", m, inputs[m], lambda x, w: x @ w) for m in ROWS]
        todo.append(("dy W^T", ROWS[-1], outputs, lambda y, w: y @ w.T))
        return facts | {"calls": measured(todo, dense, 2 * k * n)}
    form = Format(**settings)
    bits = form.bits + 16 / form.group
    packed_bytes = k * n * bits / 8
    packed = [random_weight(form, k, n, i) for i in range(max(3, -(-ROTATED_BYTES // int(packed_bytes))))]
    ways = {
        "kernel": lambda x, w: packed_matmul(x, *w, form=form, implementation="mosaic_gpu"),
        "XLA decode, product": lambda x, w: packed_matmul(x, *w, form=form, implementation="xla"),
        "decode kernel, product": lambda x, w: x @ decode(*w, form=form),
        "decode only": lambda x, w: decode(*w, form=form),
        "dy W^T, decode kernel": lambda y, w: y @ decode(*w, form=form).T,
    }
    rows = {
        "kernel": [m for m in ROWS if m <= 256],
        # slow to compile, and much the same for the other shape
        "XLA decode, product": [m for m in (1, 256, ROWS[-1]) if shape == MEASURED[0]],
        "decode kernel, product": [m for m in ROWS if m >= 256],
        "decode only": [ROWS[-1]],
    }
    todo = [(what, m, inputs[m], ways[what]) for what, some in rows.items() for m in some]
    todo.append(("dy W^T, decode kernel", ROWS[-1], outputs, ways["dy W^T, decode kernel"]))
    return facts | {"bits": bits, "calls": measured(todo, packed, packed_bytes)}


if __name__ == "__main__":
    harness.main("packed_matmul", "benchmarks.packed_matmul", list(CASES), run_case, default="*")
