"""Fine-tuning the 8B shape on a base in NF4 with double quantization, beside plain JAX on a bfloat16 base.

The steps are those of the suite `finetune`.

    python -m benchmarks.qlora
"""

from __future__ import annotations

from benchmarks import finetune, harness

STACKS = ("plain_jax", "memjax_nf4", "memjax_nf4_int8")
CASES = [f"llama-3.1-8b-b2-s2048/{stack}" for stack in STACKS]

if __name__ == "__main__":
    harness.main("qlora", "benchmarks.qlora", CASES, finetune.run_case, default="*")
