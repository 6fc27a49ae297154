"""What reverse mode keeps between forward and backward, and how to keep less of it."""

from memjax.remat.compress import Row, compress_residuals
from memjax.remat.policy import ResidualPolicy
from memjax.remat.report import Report, report
from memjax.remat.residuals import Residual

__all__ = ["Report", "Residual", "ResidualPolicy", "Row", "compress_residuals", "report"]
