"""Exact operations that keep less for the backward pass than their plain forms do."""

from memjax.ops.glu import geglu, swiglu
from memjax.ops.norms import layer_norm, rms_norm
from memjax.ops.rope import rope

__all__ = ["geglu", "layer_norm", "rms_norm", "rope", "swiglu"]
