"""What reverse mode keeps between forward and backward: less of it, smaller, elsewhere, or nothing."""

from memjax.remat.checkpoint import NAMED, Name, Names, Policy, Remat, checkpoint, names, parse, quantized
from memjax.remat.offload import Offload, offload
from memjax.remat.reversible import Reversible, reversible, reversible_scan
from memjax.remat.spill import SpillStats, SpillStore, layers_to_offload, spill
from memjax.remat.tiled import tiled

__all__ = [
    "NAMED",
    "Name",
    "Names",
    "Offload",
    "Policy",
    "Remat",
    "Reversible",
    "SpillStats",
    "SpillStore",
    "checkpoint",
    "layers_to_offload",
    "names",
    "offload",
    "parse",
    "quantized",
    "reversible",
    "reversible_scan",
    "spill",
    "tiled",
]
