"""What every room shares: paths and patterns, roles, the weight-view protocol, lift rules, bytes, random bits."""

from memjax.core.bytes import CompiledBytes, compiled_bytes, nbytes
from memjax.core.packing import packing
from memjax.core.paths import leaf_paths, map_with_path, match, select
from memjax.core.random_bits import random_bits, uniform
from memjax.core.roles import combine, partition
from memjax.core.rules import operation, register_rule
from memjax.core.views import Axes, WeightView, is_view, make_axes, materialize

__all__ = [
    "Axes",
    "CompiledBytes",
    "WeightView",
    "combine",
    "compiled_bytes",
    "is_view",
    "leaf_paths",
    "make_axes",
    "map_with_path",
    "match",
    "materialize",
    "nbytes",
    "operation",
    "packing",
    "partition",
    "random_bits",
    "register_rule",
    "select",
    "uniform",
]
