"""Optimizers whose state is small: transformations for any optax chain."""

from memjax.optim.accounting import init_bytes, state_bytes
from memjax.optim.bf16 import apply_updates_stochastic, round_stochastic
from memjax.optim.frugal import FrugalState, apply_frugal, frugal, frugal_static, resize_frugal, scale_by_frugal
from memjax.optim.matrices import MatrixSpec, as_matrices, from_matrices, matrix_shape, matrix_spec
from memjax.optim.routing import label
from memjax.optim.sharding import state_shardings

__all__ = [
    "FrugalState",
    "MatrixSpec",
    "apply_frugal",
    "apply_updates_stochastic",
    "as_matrices",
    "from_matrices",
    "frugal",
    "frugal_static",
    "init_bytes",
    "label",
    "matrix_shape",
    "matrix_spec",
    "resize_frugal",
    "round_stochastic",
    "scale_by_frugal",
    "state_bytes",
    "state_shardings",
]
