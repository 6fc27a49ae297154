"""Operations that keep less for the backward pass than their plain forms do."""

from memjax.ops.dropout import dropout
from memjax.ops.few_bit import derivative_levels, few_bit_activation
from memjax.ops.gelu import gelu, silu
from memjax.ops.glu import geglu, swiglu
from memjax.ops.linear_cross_entropy import linear_cross_entropy
from memjax.ops.norms import layer_norm, rms_norm
from memjax.ops.rope import rope
from memjax.ops.softmax import softmax

__all__ = [
    "derivative_levels",
    "dropout",
    "few_bit_activation",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "silu",
    "softmax",
    "swiglu",
]
