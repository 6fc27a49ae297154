"""Named sizes of real models, free of any framework."""

from __future__ import annotations

from typing import NamedTuple


class Llama(NamedTuple):
    """Sizes of a Llama."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    tied: bool
    rope_theta: float = 5e5
    eps: float = 1e-5

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Returns the (in, out) sizes of a layer's linear maps."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.d_model, self.d_ff
        return {
            "q": (d, q),
            "k": (d, kv),
            "v": (d, kv),
            "o": (q, d),
            "gate": (d, f),
            "up": (d, f),
            "down": (f, d),
        }


LLAMAS = {
    "tiny": Llama(2, 64, 4, 2, 16, 128, 256, tied=False),
    "llama-3.2-1b": Llama(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "llama-3.1-8b": Llama(32, 4096, 32, 8, 128, 14336, 128256, tied=False),
}
