"""The device mesh: its config section, and the one function that makes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from mixtral_jax.errors import InputError
from mixtral_jax.sharding.axes import MESH_AXES, MeshAxis


@dataclass(frozen=True)
class MeshConfig:
    """The size of each mesh axis. At most one is -1: whatever number of devices the others leave."""

    data: int = -1
    """Copies of the model; slices that only a slow network joins are parts of this axis alone."""
    fsdp: int = 1
    """Parts that a copy's weights are stored in, gathered a layer at a time."""
    expert: int = 1
    """Groups that the experts are divided among; tokens travel to them by all-to-all."""
    context: int = 1
    """Parts of a sequence."""
    tensor: int = 1
    """Parts of a head count or a hidden width."""

    # Read by the validating library when this section is part of a larger config.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            if self.size(axis) == 0 or self.size(axis) < -1:
                raise InputError(axis, self.size(axis), "a number of devices above zero, or -1 for the rest")
        if sum(self.size(axis) == -1 for axis in MESH_AXES) > 1:
            raise InputError("mesh", self, "only one axis can be -1")

    def size(self, axis: MeshAxis) -> int:
        """The number of devices along an axis, or -1."""
        return getattr(self, axis)

    def resolve(self, num_devices: int) -> MeshConfig:
        """The same mesh with -1 filled in.

        Raises:
          InputError: the axes' product is not the number of devices.
        """
        given = math.prod(self.size(axis) for axis in MESH_AXES if self.size(axis) != -1)
        free = [axis for axis in MESH_AXES if self.size(axis) == -1]
        if num_devices % given or (not free and given != num_devices):
            sizes = ", ".join(f"{axis}={self.size(axis)}" for axis in MESH_AXES if self.size(axis) != 1)
            need = "a divisor of" if free else "exactly"
            raise InputError("mesh", sizes or "data=1", f"the axes' product must be {need} the {num_devices} devices")
        return replace(self, **dict.fromkeys(free, num_devices // given))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size(axis) for axis in MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices (default: all), with automatic partitioning on each axis.

    On TPUs an axis is laid along the torus where it fits, and where it does not over parts of several of its
    directions. On GPUs the last axes are those within a node. Slices of TPUs lie one after another on `data`.

    Raises:
      InputError: the axes' product is not the number of devices, or `data` is no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    config = config.resolve(len(devices))
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        # Of GPUs it is the node, and nodes may share any axis: their network is slow, but not that slow.
        index = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        slices.setdefault(index or 0, []).append(device)
    if config.data % len(slices):
        raise InputError("mesh.data", config.data, f"a multiple of the {len(slices)} slices is needed")
    shape = (config.data // len(slices), *config.shape[1:])
    parts = [
        mesh_utils.create_device_mesh(shape, slices[index], allow_split_physical_axes=True) for index in sorted(slices)
    ]
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def completed(mesh: Mesh) -> Mesh:
    """The same devices with every axis of ours, those that the mesh lacks of size 1, partitioned automatically.

    Raises:
      InputError: an axis that is none of ours.
    """
    unknown = [name for name in mesh.axis_names if name not in MESH_AXES]
    if unknown:
        raise InputError("mesh", unknown[0], f"no axis of this name; the axes are {', '.join(MESH_AXES)}")
    order = [mesh.axis_names.index(axis) for axis in MESH_AXES if axis in mesh.axis_names]
    shape = tuple(mesh.shape.get(axis, 1) for axis in MESH_AXES)
    devices = mesh.devices.transpose(order).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def current_mesh() -> AbstractMesh | None:
    """The mesh that jax.set_mesh made current, or None on a single device or without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """Jax's name of what programs are compiled for: the current mesh's, of any size, else the default device's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)
