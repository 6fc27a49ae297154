"""What policies for activations cost and save: speed and peak memory of training steps of Llama shapes.

Steps are those of the suite `finetune`: rank-16 adapters on all linear layers, or every weight trained in bfloat16 with
moments in bfloat16; AdamW; the same batch of random tokens at every step.

    python -m benchmarks.activations
    python -m benchmarks.activations --cases 'llama-3.1-8b*4bit' --keep
"""

from __future__ import annotations

from typing import Any

from benchmarks import finetune, harness

LORA, FULL, TINY = finetune.Shape("llama-3.1-8b", 2, 2048), finetune.Shape("llama-3.2-1b", 4, 2048), finetune.TINY
_PLAIN = [("plain_jax", remat) for remat in ("none", "dots", "full")]
_MEMJAX = ("none", "8bit", "4bit", "linear-4bit", "full", "full-8bit", "full-4bit", "offload", "offload-4bit")
CASES = {
    f"{shape.name}{'' if rank else ', all weights'}/{stack} {remat}": (shape, stack, remat, rank)
    for shape, rank, runs in (
        (LORA, finetune.RANK, [*_PLAIN, *(("memjax", remat) for remat in _MEMJAX)]),
        (LORA, finetune.RANK, [(stack, "full-4bit") for stack in ("memjax_nf4", "memjax_nf4_int8")]),
        (FULL, None, [*_PLAIN, *(("memjax", remat) for remat in ("none", "8bit", "4bit", "full", "full-8bit"))]),
        (TINY, finetune.RANK, [("plain_jax", "none"), ("memjax", "4bit")]),
        (TINY, None, [("plain_jax", "dots"), ("memjax", "full-8bit")]),
    )
    for stack, remat in runs
}


def run_case(name: str) -> dict[str, Any]:
    """Runs one case and returns what it measured."""
    return finetune.measure(*CASES[name])


if __name__ == "__main__":
    harness.main("activations", "benchmarks.activations", list(CASES), run_case, default="llama*")
