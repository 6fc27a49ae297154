"""What reverse mode keeps between forward and backward: less of it, packed, elsewhere, or nothing."""

from memjax.remat.allocate import Allocation, allocate, allocate_bits
from memjax.remat.checkpoint import NAMED, Name, Names, Policy, Remat, checkpoint, names, parse, quantized
from memjax.remat.compress import Row, compress_residuals
from memjax.remat.offload import Offload, offload
from memjax.remat.policy import ResidualPolicy
from memjax.remat.report import Report, report
from memjax.remat.residuals import Residual
from memjax.remat.reversible import Reversible, reversible, reversible_scan
from memjax.remat.spill import SpillStats, SpillStore, layers_to_offload, spill
from memjax.remat.tiled import tiled

__all__ = [
    "NAMED",
    "Allocation",
    "Name",
    "Names",
    "Offload",
    "Policy",
    "Remat",
    "Report",
    "Residual",
    "ResidualPolicy",
    "Reversible",
    "Row",
    "SpillStats",
    "SpillStore",
    "allocate",
    "allocate_bits",
    "checkpoint",
    "compress_residuals",
    "layers_to_offload",
    "names",
    "offload",
    "parse",
    "quantized",
    "report",
    "reversible",
    "reversible_scan",
    "spill",
    "tiled",
]
