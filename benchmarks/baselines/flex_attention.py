"""PyTorch's FlexAttention on a case of `benchmarks.flash_attention`; prints its times as one JSON line.

python -m benchmarks.baselines.flex_attention BATCH HEADS KEY_HEADS LENGTH HEAD_DIM MASK [NUMBERS]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.flash_attention import CALLS, REPEATS, SEED, WARMUP, block_choice, document_ids


def rule(kind: str, numbers: list[float], length: int) -> Callable[..., Any]:
    """Returns the mask as a ``mask_mod`` of FlexAttention."""
    import torch

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q

    if kind == "causal":
        return causal
    width, sinks = (*map(int, numbers), 0, 0)[:2]  # whole numbers become constants of the compiled kernel
    if kind == "window":
        return lambda b, h, q, k: (k <= q) & (q - k < width)
    if kind == "window and sinks":
        return lambda b, h, q, k: (k <= q) & ((q - k < width) | (k < sinks))
    if kind == "documents":
        ids = torch.as_tensor(document_ids(length, numbers[0]), device="cuda")
        return lambda b, h, q, k: (k <= q) & (ids[q] == ids[k])
    chosen = torch.as_tensor(block_choice(length, numbers[0]), device="cuda")
    return lambda b, h, q, k: chosen[q // 128, k // 128]


def times_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Returns milliseconds a call, of calls in a row."""
    import torch

    found = []
    for i in range(WARMUP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        if i >= WARMUP:
            found.append(start.elapsed_time(end) / CALLS)
    return {"ms": statistics.median(found), "min_ms": min(found), "max_ms": max(found)}


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures the case that the command line names and returns the times of both directions."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, heads, key_heads, length, width = map(int, arguments[:5])
    mask = rule(arguments[5], [float(x) for x in arguments[6:]], length)
    generator = torch.Generator("cuda").manual_seed(SEED)

    def operand(n: int) -> Any:
        return torch.randn(
            batch, n, length, width, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True
        )

    q, k, v = operand(heads), operand(key_heads), operand(key_heads)
    do = torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16, generator=generator)
    blocks = create_block_mask(mask, None, None, length, length)  # compiled, that of a window takes minutes
    compiled = torch.compile(flex_attention)

    def attention() -> Any:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=heads != key_heads)

    def forward() -> Any:
        with torch.no_grad():
            return attention()

    return {
        "forward": times_ms(forward),
        "both": times_ms(lambda: torch.autograd.grad(attention(), (q, k, v), do)),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
