"""SwiGLU that makes the codes of its two inputs as it reads them, and both passes from codes."""

from pallas_kernels.glu.api import swiglu_backward, swiglu_of_codes, swiglu_packed, unsupported

__all__ = ["swiglu_backward", "swiglu_of_codes", "swiglu_packed", "unsupported"]
