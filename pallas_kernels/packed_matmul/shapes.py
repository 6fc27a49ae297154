"""Weights of real models, as (inputs, outputs), on which the kernels are measured."""

SHAPES = {
    "llama-3.1-8b/mlp/up": (4096, 14336),
    "llama-3.1-8b/mlp/down": (14336, 4096),
    "llama-3.1-8b/attention/q": (4096, 4096),
    "llama-3.1-8b/attention/k": (4096, 1024),
    "llama-3.2-1b/mlp/up": (2048, 8192),
    "llama-3.2-1b/mlp/down": (8192, 2048),
}
ROWS = (1, 16, 64, 256, 4096)
