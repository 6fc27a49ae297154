"""Inner activations of real models, as (tokens, features), on which the kernels are measured."""

SHAPES = {
    "llama-3.1-8b/mlp": (4096, 14336),
    "llama-3.2-1b/mlp": (8192, 8192),
}
GROUP = 128
