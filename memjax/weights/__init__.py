"""Weight views: what stands where a dense weight stood, and `lift`, which lets any function take them."""

from memjax.core.bytes import nbytes
from memjax.core.views import Axes, WeightView, is_view, materialize
from memjax.weights.adapted import Adapted, Anchored, Delta, LowRank
from memjax.weights.dense import Dense
from memjax.weights.io import load, save
from memjax.weights.lift import lift
from memjax.weights.packed import PackedWeight
from memjax.weights.quantize import LeafReport, Report, astype, axes_of, infer_axes, quantize, report, sharding
from memjax.weights.rescaled import Rescaled

__all__ = [
    "Adapted",
    "Anchored",
    "Axes",
    "Delta",
    "Dense",
    "LeafReport",
    "LowRank",
    "PackedWeight",
    "Report",
    "Rescaled",
    "WeightView",
    "astype",
    "axes_of",
    "infer_axes",
    "is_view",
    "lift",
    "load",
    "materialize",
    "nbytes",
    "quantize",
    "report",
    "save",
    "sharding",
]
