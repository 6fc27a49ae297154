"""Output heads of real models, as (D, V, axis of D as the weight is stored), on which the kernels are measured."""

SHAPES = {
    "llama-3.1-8b/head": (4096, 128256, 0),
    "llama-3.2-1b/tied": (2048, 128256, 1),
    "smollm2-135m/tied": (576, 49152, 1),
}
TOKENS = (1024, 4096)
