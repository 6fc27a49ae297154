"""Leaves of real models, as they are stacked over layers, on which the steps are measured."""

SHAPES = {
    "llama-3.2-1b/embed": (128256, 2048),
    "llama-3.2-1b/q": (16, 2048, 2048),
    "llama-3.2-1b/k": (16, 2048, 512),
    "llama-3.2-1b/up": (16, 2048, 8192),
    "llama-3.2-1b/down": (16, 8192, 2048),
}
COUNTS = {"embed": 1, "q": 2, "k": 2, "up": 2, "down": 1}
"""Leaves of each shape that the model has."""
