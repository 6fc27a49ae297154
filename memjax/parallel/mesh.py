"""Meshes by name, and what a device of a mesh holds."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from memjax.core.bytes import nbytes

AXES = ("data", "fsdp", "model")


def make_mesh(sizes: str, devices: list[Any] | None = None) -> Mesh:
    """Returns a mesh of devices from the sizes of its axes.

    Args:
      sizes: such as ``"data=2"``, ``"fsdp=4"`` or ``"data=2,model=2"``, of the axes

        - data: splits the batch, and every device holds all weights;
        - fsdp: splits the batch, and the weights too: a layer is put together while it is used;
        - model: splits the matrices of a layer, and devices sum what they make of the same tokens.
      devices: of which the first are taken; by default all of this machine.

    Returns:
      A mesh with these axes, in the order data, fsdp, model.

    Raises:
      ValueError: no such form, an unknown axis or one given twice, a size below 1, fewer devices than asked for.
    """
    found: dict[str, int] = {}
    for part in sizes.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not size.isdecimal():
            raise ValueError(f"mesh={sizes!r} must be like 'data=2' or 'fsdp=2,model=2'; {part.strip()!r} is not")
        if name not in AXES:
            raise ValueError(f"mesh={sizes!r}: unknown axis {name!r}; known are {', '.join(AXES)}")
        if name in found:
            raise ValueError(f"mesh={sizes!r} gives the axis {name} twice")
        if int(size) < 1:
            raise ValueError(f"mesh={sizes!r}: the size of {name} must be at least 1")
        found[name] = int(size)
    names = tuple(name for name in AXES if name in found)
    count, devices = math.prod(found.values()), jax.devices() if devices is None else devices
    if count > len(devices):
        hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={count} makes as many of a CPU"
        raise ValueError(
            f"mesh={sizes!r} takes {count} devices, but there are {len(devices)}"
            + (hint if devices[0].platform == "cpu" else "")
        )
    grid = np.asarray(devices[:count]).reshape([found[name] for name in names])
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def axis_size(mesh: Mesh, name: str) -> int:
    """Returns the size of an axis; 1 where the mesh has none of that name."""
    return mesh.shape.get(name, 1)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes over which the batch is split."""
    return tuple(name for name in ("data", "fsdp") if name in mesh.shape)


def batch_parts(mesh: Mesh) -> int:
    """Returns into how many parts the batch is split."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def device_bytes(tree: Any) -> int:
    """Returns the bytes of ``tree`` that each device holds: of arrays that are sharded, one shard.

    Args:
      tree: a pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings.
    """

    def part(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return nbytes(jax.tree.map(part, tree))
