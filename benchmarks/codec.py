"""Packed residuals beside XLA: encoding and decoding, RMSNorm and SwiGLU that make codes and read them.

A call's time is the sum of its kernels' times on the device, measured by CUPTI; arguments are rotated, so that none is
in the cache when it is read. Rates count every argument and every result once, whatever a program moves, and are set
against the rate at which the same process copies memory.

    python -m benchmarks.codec
    python -m benchmarks.codec --cases 'norm*'
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks import harness
from benchmarks.packed_matmul import device_us
from pallas_kernels.codec.shapes import GROUP
from pallas_kernels.codec.shapes import SHAPES as CODEC_SHAPES
from pallas_kernels.glu.shapes import SHAPES as GLU_SHAPES
from pallas_kernels.norm.shapes import SHAPES as NORM_SHAPES

CASES = {
    "codec/llama-3.1-8b/block": CODEC_SHAPES["llama-3.1-8b/block"],
    "codec/llama-3.1-8b/mlp": CODEC_SHAPES["llama-3.1-8b/mlp"],
    "norm/llama-3.1-8b": NORM_SHAPES["llama-3.1-8b"],
    "glu/llama-3.1-8b/mlp": GLU_SHAPES["llama-3.1-8b/mlp"],
}
ROTATED_BYTES, EPS = 2 * 10**8, 1e-5
MADE = (("mosaic_gpu", "kernel"), ("xla", "XLA"))


def _calls(case: str, arrays: list[Any], gain: Any) -> list[tuple[str, list[Any], Callable[..., Any]]]:
    """Returns what is measured: (name, arguments of a call each, function with ``implementation``)."""
    import jax

    from pallas_kernels import codec, glu, norm

    calls: list[tuple[str, list[Any], Callable[..., Any]]] = []
    if case.startswith("codec"):
        for bits, seed in ((8, None), (4, None), (4, 1), (2, None)):
            options = {"bits": bits, "group": GROUP}
            encode = functools.partial(codec.encode, seed=seed, **options)
            calls.append((f"encode {bits} bits{', stochastic' if seed else ''}", [(x,) for x in arrays], encode))
            if seed is None:
                made = [jax.jit(encode)(x) for x in arrays]
                calls.append((f"decode {bits} bits", [(m,) for m in made], functools.partial(codec.decode, **options)))
        return calls
    for bits in (8, 4):
        options = {"bits": bits, "group": GROUP}
        pairs = list(zip(arrays, arrays[1:] + arrays[:1]))
        if case.startswith("norm"):
            forward = functools.partial(norm.rms_norm_packed, eps=EPS, **options)
            calls.append((f"RMSNorm forward, {bits} bits", [(x, gain) for x in arrays], forward))
            kept = [jax.jit(forward)(x, gain)[1:] for x in arrays]
            backward = functools.partial(norm.rms_norm_backward, **options)
            arguments = [(dy, *k, gain) for dy, k in zip(arrays, kept)]
            calls.append((f"RMSNorm backward, {bits} bits", arguments, backward))
        else:
            forward = functools.partial(glu.swiglu_packed, **options)
            calls.append((f"SwiGLU forward, {bits} bits", pairs, forward))
            kept = [jax.jit(forward)(*pair)[1:] for pair in pairs]
            backward = functools.partial(glu.swiglu_backward, **options)
            calls.append((f"SwiGLU backward, {bits} bits", [(dh, *k) for dh, k in zip(arrays, kept)], backward))
    return calls


def run_case(name: str) -> dict[str, Any]:
    """Measures one shape and returns the times."""
    import jax
    import jax.numpy as jnp

    shape = CASES[name]
    copy = harness.ceilings(2048, 1024)["copy_tb_per_s"]
    count = max(2, -(-ROTATED_BYTES // (2 * shape[0] * shape[1])))
    arrays = [jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i in range(count)]
    gain = 1 + 0.1 * jax.random.normal(jax.random.key(count), shape[-1:])
    rows = []
    for what, arguments, fn in _calls(name, arrays, gain):
        row: dict[str, Any] = {"what": what}
        out = jax.eval_shape(functools.partial(fn, implementation="xla"), *arguments[0])
        row["bytes"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arguments[0], out)))
        for implementation, label in MADE:
            run = functools.partial(fn, implementation=implementation)
            us = device_us(lambda _, args, run=run: run(*args), arguments, jnp.zeros(()))
            row |= {f"{label}_us": us, f"{label}_of_copy": row["bytes"] / us / 1e6 / copy}
        rows.append(row)
    return {"shape": list(shape), "copy_tb_per_s": copy, "calls": rows}


if __name__ == "__main__":
    harness.main("codec", "benchmarks.codec", list(CASES), run_case, default="*")
