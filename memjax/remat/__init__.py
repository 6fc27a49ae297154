"""What reverse mode keeps between forward and backward: less of it, smaller, elsewhere, or nothing."""

from memjax.remat.compress import Row, compress_residuals
from memjax.remat.policy import ResidualPolicy
from memjax.remat.residuals import Residual
from memjax.remat.reversible import Reversible, reversible, reversible_scan
from memjax.remat.spill import SpillStats, SpillStore, layers_to_offload, spill
from memjax.remat.tiled import tiled

__all__ = [
    "Residual",
    "ResidualPolicy",
    "Reversible",
    "SpillStats",
    "SpillStore",
    "compress_residuals",
    "layers_to_offload",
    "reversible",
    "reversible_scan",
    "spill",
    "tiled",
]
