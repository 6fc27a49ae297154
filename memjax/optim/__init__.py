"""Optimizers whose state is small: transformations for any optax chain."""

from memjax.optim.accounting import init_bytes, state_bytes
from memjax.optim.adam8bit import (
    adam4bit,
    adam8bit,
    adamw4bit,
    adamw8bit,
    apply_adam8bit,
    apply_lion8bit,
    apply_sgdm8bit,
    lion8bit,
    scale_by_adam8bit,
    scale_by_lion8bit,
    scale_by_sgdm8bit,
    sgdm8bit,
)
from memjax.optim.adam_mini import adam_mini, adam_mini_state_bytes, scale_by_adam_mini
from memjax.optim.apollo import apollo, apollo_mini, apollo_state_bytes, scale_by_apollo
from memjax.optim.bf16 import apply_updates_stochastic, round_stochastic
from memjax.optim.fira import fira, fira_state_bytes, scale_by_fira
from memjax.optim.flrml import Flrml, Triplets, cayley_step, flrml, flrml_minibatch, polar_retraction
from memjax.optim.frugal import FrugalState, apply_frugal, frugal, frugal_static, resize_frugal, scale_by_frugal
from memjax.optim.fused_step import FusedMetrics, LossParts, fused_step, parts_of_stages
from memjax.optim.galore import apply_galore, galore, galore_state_bytes, scale_by_galore
from memjax.optim.ldadam import ldadam, ldadam_state_bytes, scale_by_ldadam, transport_moments
from memjax.optim.matrices import MatrixSpec, as_matrices, from_matrices, matrix_shape, matrix_spec
from memjax.optim.meta_de import (
    DE,
    DEState,
    MetaDE,
    MetaState,
    best_of,
    differential_evolution,
    evaluate,
    evolve,
    meta_de,
)
from memjax.optim.mezo import Mezo, MezoMetrics, MezoState, mezo
from memjax.optim.micro_adam import micro_adam, micro_adam_state_bytes, scale_by_micro_adam
from memjax.optim.pamc import meta_nodes, pamc_contrast, pamc_loss, sharpened, soft_assignment
from memjax.optim.q_galore import q_galore, q_galore_state_bytes, scale_by_q_galore
from memjax.optim.quantized_state import moment_bytes, quantize_state, state_format
from memjax.optim.routing import label
from memjax.optim.sharding import state_shardings

__all__ = [
    "DE",
    "DEState",
    "Flrml",
    "FrugalState",
    "FusedMetrics",
    "LossParts",
    "MatrixSpec",
    "MetaDE",
    "MetaState",
    "Mezo",
    "MezoMetrics",
    "MezoState",
    "Triplets",
    "adam4bit",
    "adam8bit",
    "adam_mini",
    "adam_mini_state_bytes",
    "adamw4bit",
    "adamw8bit",
    "apollo",
    "apollo_mini",
    "apollo_state_bytes",
    "apply_adam8bit",
    "apply_frugal",
    "apply_galore",
    "apply_lion8bit",
    "apply_sgdm8bit",
    "apply_updates_stochastic",
    "as_matrices",
    "best_of",
    "cayley_step",
    "differential_evolution",
    "evaluate",
    "evolve",
    "fira",
    "fira_state_bytes",
    "flrml",
    "flrml_minibatch",
    "from_matrices",
    "frugal",
    "frugal_static",
    "fused_step",
    "galore",
    "galore_state_bytes",
    "init_bytes",
    "label",
    "ldadam",
    "ldadam_state_bytes",
    "lion8bit",
    "matrix_shape",
    "matrix_spec",
    "meta_de",
    "meta_nodes",
    "mezo",
    "micro_adam",
    "micro_adam_state_bytes",
    "moment_bytes",
    "pamc_contrast",
    "pamc_loss",
    "parts_of_stages",
    "polar_retraction",
    "q_galore",
    "q_galore_state_bytes",
    "quantize_state",
    "resize_frugal",
    "round_stochastic",
    "scale_by_adam8bit",
    "scale_by_adam_mini",
    "scale_by_apollo",
    "scale_by_fira",
    "scale_by_frugal",
    "scale_by_galore",
    "scale_by_ldadam",
    "scale_by_lion8bit",
    "scale_by_micro_adam",
    "scale_by_q_galore",
    "scale_by_sgdm8bit",
    "sgdm8bit",
    "sharpened",
    "soft_assignment",
    "state_bytes",
    "state_format",
    "state_shardings",
    "transport_moments",
]
