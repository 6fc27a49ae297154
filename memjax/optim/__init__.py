"""Optimizers whose state is small: transformations for any optax chain."""

from memjax.optim.accounting import init_bytes, state_bytes
from memjax.optim.bf16 import apply_updates_stochastic, round_stochastic
from memjax.optim.matrices import MatrixSpec, as_matrices, from_matrices, matrix_shape, matrix_spec
from memjax.optim.routing import label

__all__ = [
    "MatrixSpec",
    "apply_updates_stochastic",
    "as_matrices",
    "from_matrices",
    "init_bytes",
    "label",
    "matrix_shape",
    "matrix_spec",
    "round_stochastic",
    "state_bytes",
]
