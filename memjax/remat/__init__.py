"""What reverse mode keeps between forward and backward: less of it, smaller, elsewhere, or nothing."""

from memjax.remat.reversible import Reversible, reversible, reversible_scan
from memjax.remat.spill import SpillStats, SpillStore, layers_to_offload, spill
from memjax.remat.tiled import tiled

__all__ = [
    "Reversible",
    "SpillStats",
    "SpillStore",
    "layers_to_offload",
    "reversible",
    "reversible_scan",
    "spill",
    "tiled",
]
