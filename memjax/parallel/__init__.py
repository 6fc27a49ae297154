"""One program on several devices: batches, layers and matrices split over a mesh, each device working on its part."""

from memjax.parallel.mesh import batch_parts, device_bytes, make_mesh
from memjax.parallel.splits import COLUMNS, ROWS, shardings, specs
from memjax.parallel.sums import batch_sharding, on_mesh

__all__ = [
    "COLUMNS",
    "ROWS",
    "batch_parts",
    "batch_sharding",
    "device_bytes",
    "make_mesh",
    "on_mesh",
    "shardings",
    "specs",
]
