"""What reverse mode keeps between forward and backward, and how to keep less of it."""

from memjax.remat.compress import compress_residuals
from memjax.remat.policy import ResidualPolicy
from memjax.remat.residuals import Residual

__all__ = ["Residual", "ResidualPolicy", "compress_residuals"]
