"""Optimizers whose state is small: transformations for any optax chain."""

from memjax.optim.accounting import init_bytes, state_bytes
from memjax.optim.apollo import apollo, apollo_mini, apollo_state_bytes, scale_by_apollo
from memjax.optim.bf16 import apply_updates_stochastic, round_stochastic
from memjax.optim.fira import fira, fira_state_bytes, scale_by_fira
from memjax.optim.frugal import FrugalState, apply_frugal, frugal, frugal_static, resize_frugal, scale_by_frugal
from memjax.optim.galore import galore, galore_state_bytes, scale_by_galore
from memjax.optim.ldadam import ldadam, ldadam_state_bytes, scale_by_ldadam, transport_moments
from memjax.optim.matrices import MatrixSpec, as_matrices, from_matrices, matrix_shape, matrix_spec
from memjax.optim.q_galore import q_galore, q_galore_state_bytes, scale_by_q_galore
from memjax.optim.routing import label
from memjax.optim.sharding import state_shardings

__all__ = [
    "FrugalState",
    "MatrixSpec",
    "apollo",
    "apollo_mini",
    "apollo_state_bytes",
    "apply_frugal",
    "apply_updates_stochastic",
    "as_matrices",
    "fira",
    "fira_state_bytes",
    "from_matrices",
    "frugal",
    "frugal_static",
    "galore",
    "galore_state_bytes",
    "init_bytes",
    "label",
    "ldadam",
    "ldadam_state_bytes",
    "matrix_shape",
    "matrix_spec",
    "q_galore",
    "q_galore_state_bytes",
    "resize_frugal",
    "round_stochastic",
    "scale_by_apollo",
    "scale_by_fira",
    "scale_by_frugal",
    "scale_by_galore",
    "scale_by_ldadam",
    "scale_by_q_galore",
    "state_bytes",
    "state_shardings",
    "transport_moments",
]
