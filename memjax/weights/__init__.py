"""Weight views: what stands where a dense weight stood, and `lift`, which lets any function take them."""

from memjax.core.bytes import nbytes
from memjax.core.views import Axes, WeightView, is_view, materialize
from memjax.weights.adapted import Adapted, Anchored, Delta, LowRank
from memjax.weights.bipolar import BitPlanes, bipolar
from memjax.weights.bitmap import Bitmap
from memjax.weights.dense import Dense
from memjax.weights.factored import Factored, factorize
from memjax.weights.finequant import GroupPlan, finequant
from memjax.weights.integer import ActivationQuant, IntegerWeight, flexq, integer_activations
from memjax.weights.io import load, save
from memjax.weights.lift import lift
from memjax.weights.nm_sparse import NMSparse
from memjax.weights.packed import PackedWeight
from memjax.weights.quantize import LeafReport, Report, astype, axes_of, infer_axes, quantize, report, sharding
from memjax.weights.rescaled import Rescaled
from memjax.weights.sparsify import sparsify
from memjax.weights.tiled_csl import TiledCSL

__all__ = [
    "ActivationQuant",
    "Adapted",
    "Anchored",
    "Axes",
    "BitPlanes",
    "Bitmap",
    "Delta",
    "Dense",
    "Factored",
    "GroupPlan",
    "IntegerWeight",
    "LeafReport",
    "LowRank",
    "NMSparse",
    "PackedWeight",
    "Report",
    "Rescaled",
    "TiledCSL",
    "WeightView",
    "astype",
    "axes_of",
    "bipolar",
    "factorize",
    "finequant",
    "flexq",
    "infer_axes",
    "integer_activations",
    "is_view",
    "lift",
    "load",
    "materialize",
    "nbytes",
    "quantize",
    "report",
    "save",
    "sharding",
    "sparsify",
]
