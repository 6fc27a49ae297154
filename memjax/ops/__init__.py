"""Exact operations that keep less for the backward pass than their plain forms do."""

from memjax.ops.glu import geglu, swiglu
from memjax.ops.linear_cross_entropy import linear_cross_entropy
from memjax.ops.norms import layer_norm, rms_norm
from memjax.ops.rope import rope

__all__ = ["geglu", "layer_norm", "linear_cross_entropy", "rms_norm", "rope", "swiglu"]
