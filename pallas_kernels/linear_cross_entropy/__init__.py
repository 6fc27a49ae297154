"""The matrix products of a cross-entropy over a large vocabulary, whose logits are not written to memory."""

from pallas_kernels.linear_cross_entropy.api import (
    Exponentials,
    Statistics,
    exponentials,
    gradients_of_exponentials,
    logit_gradients,
    lse_and_target,
    unsupported,
)

__all__ = [
    "Exponentials",
    "Statistics",
    "exponentials",
    "gradients_of_exponentials",
    "logit_gradients",
    "lse_and_target",
    "unsupported",
]
