"""Norms of real models, as (tokens, features), on which the kernels are measured."""

SHAPES = {
    "llama-3.1-8b": (8192, 4096),
    "llama-3.2-1b": (8192, 2048),
    "llama-3.1-70b": (4096, 8192),
}
GROUP = 128
