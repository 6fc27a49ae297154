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


def device_us(fn: Callable[..., Any], weights: Sequence[Any], x: Any) -> float:
    """Returns the time on the device of ``fn(x, weight)``, in microseconds; every call has the next weight."""
    import jax
    from jax.experimental.mosaic.gpu import profiler

    call = jax.jit(fn)  # is lowered once for all weights

    def run(x: Any, weights: Sequence[Any]) -> list[Any]:
        return [call(x, weight) for weight in weights]

    cupti = profiler.Cupti(finalize=False)  # detaching takes seconds
    _, runs = cupti.measure(run, aggregate=False, iterations=ITERATIONS)(x, list(weights))
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
    calls: list[dict[str, Any]] = []

    def record(what: str, m: int, weights: Sequence[Any], fn: Callable[..., Any], weight_bytes: float) -> None:
        us = device_us(fn, weights, inputs[m])
        moved = weight_bytes + (2 * m * (k + n) if "decode only" not in what else 2 * k * n)
        floor_us = moved / copy / 1e6
        row = {"what": what, "rows": m, "us": us, "floor_us": floor_us, "over_floor": us / floor_us}
        if m > 1:
            row["tflops"] = 2 * m * k * n / us / 1e6
        calls.append(row)

    settings = WEIGHTS[kind]
    if settings is None:
        weights = [jax.random.normal(jax.random.key(i), (k, n)).astype(jnp.bfloat16) for i in range(3)]
        for m in ROWS:
            record("x W", m, weights, lambda x, w: x @ w, 2 * k * n)
        outputs = jax.random.normal(jax.random.key(1), (ROWS[-1], n)).astype(jnp.bfloat16)
        inputs[ROWS[-1]] = outputs
        record("dy W^T", ROWS[-1], weights, lambda y, w: y @ w.T, 2 * k * n)
        return {"shape": shape, "k": k, "n": n, "format": kind, "copy_tb_per_s": copy, "calls": calls}
    form = Format(**settings)
    bits = form.bits + 16 / form.group
    packed_bytes = k * n * bits / 8
    weights = [random_weight(form, k, n, i) for i in range(max(3, -(-ROTATED_BYTES // int(packed_bytes))))]
    for m in ROWS:
        if m <= 256:
            record(
                "kernel",
                m,
                weights,
                lambda x, w: packed_matmul(x, *w, form=form, implementation="mosaic_gpu"),
                packed_bytes,
            )
        if m in (1, 256, ROWS[-1]) and shape == MEASURED[0]:  # slow to compile, and much the same for the other
            record(
                "XLA decode, product",
                m,
                weights,
                lambda x, w: packed_matmul(x, *w, form=form, implementation="xla"),
                packed_bytes,
            )
        if m >= 256:
            record("decode kernel, product", m, weights, lambda x, w: x @ decode(*w, form=form), packed_bytes)
    record("decode only", ROWS[-1], weights, lambda x, w: decode(*w, form=form), packed_bytes)
    inputs[ROWS[-1]] = jax.random.normal(jax.random.key(1), (ROWS[-1], n)).astype(jnp.bfloat16)
    record("dy W^T, decode kernel", ROWS[-1], weights, lambda y, w: y @ decode(*w, form=form).T, packed_bytes)
    return {"shape": shape, "k": k, "n": n, "format": kind, "bits": bits, "copy_tb_per_s": copy, "calls": calls}


if __name__ == "__main__":
    harness.main("packed_matmul", "benchmarks.packed_matmul", list(CASES), run_case, default="*")
