"""Optimizer steps in one pass over memory."""

from pallas_kernels.optim.api import (
    adam8bit_step,
    adam8bit_unsupported,
    add_stochastic,
    frugal_adam_step,
    frugal_unsupported,
)
from pallas_kernels.optim.reference import adam_scalars, round_stochastic

__all__ = [
    "adam8bit_step",
    "adam8bit_unsupported",
    "adam_scalars",
    "add_stochastic",
    "frugal_adam_step",
    "frugal_unsupported",
    "round_stochastic",
]
