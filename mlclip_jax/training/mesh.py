"""Devices: one mesh axis, "data", that images and classes share.

Each device encodes its share of the images and its share of the classes; parameters are on every
device. The compiler places the collectives from the shardings of the step's arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlclip_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over `devices` (default: all of them)."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is divided over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(batch_size: int, mesh: Mesh, where: str = "batch_size") -> None:
    """Raises unless a batch, or a chunk of the classes, divides evenly over the data axis.

    Raises:
      UserError: naming the nearest sizes that do.
    """
    devices = mesh.shape[DATA_AXIS]
    if batch_size % devices:
        below = batch_size - batch_size % devices
        sizes = " or ".join(str(size) for size in (below, below + devices) if size)
        raise UserError(
            f"config key '{where}': {batch_size} does not divide over {devices} devices: "
            f"use {sizes}"
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """`tree` with every leaf whole on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host batch (this process's share of it) as arrays split over the data axis.

    Args:
      batch: pytree of numpy arrays with the same leading axis.
      mesh: the devices.
    """
    sharding = split_over_data(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def label_shardings(labels: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of label inputs: split if its leading axis is the classes'."""
    classes = labels.mask.shape[0]

    def choose(leaf: Any) -> NamedSharding:
        by_class = leaf.ndim > 0 and leaf.shape[0] == classes
        return split_over_data(mesh) if by_class else replicated(mesh)

    return jax.tree.map(choose, labels)


def shard_labels(labels: Any, mesh: Mesh) -> Any:
    """Label inputs on the devices: leaves with a leading class axis are split, others replicated.

    Args:
      labels: LabelInputs whose number of classes is padded to a multiple of the data axis.
      mesh: the devices.
    """
    return jax.device_put(labels, label_shardings(labels, mesh))


def device_batches(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> Iterator[Any]:
    """Host batches on the devices, the next one under way while the current one is used."""
    ahead = None
    for batch in batches:
        upcoming = shard_batch(dict(batch), mesh)
        if ahead is not None:
            yield ahead
        ahead = upcoming
    if ahead is not None:
        yield ahead
