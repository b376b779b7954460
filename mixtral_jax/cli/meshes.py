"""The flag `--mesh`, such as expert=4,tensor=2."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from mixtral_jax.errors import InputError

if TYPE_CHECKING:
    import jax

    from mixtral_jax.sharding.mesh import MeshConfig

Mesh: TypeAlias = Annotated[
    str | None,
    typer.Option("--mesh", help="Devices to spread the model over, such as expert=4,tensor=2. Default: one."),
]


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of `expert=8,fsdp=8`; `data` takes what is left, unless it is given.

    Raises:
      InputError: an unknown axis, or a size that is no number.
    """
    from mixtral_jax.errors import nearest
    from mixtral_jax.sharding.axes import MESH_AXES
    from mixtral_jax.sharding.mesh import MeshConfig

    sizes: dict[str, int] = {}
    for each in text.split(","):
        axis, _, size = (part.strip() for part in each.partition("="))
        if axis not in MESH_AXES:
            raise InputError("--mesh", axis, f"{nearest(axis, MESH_AXES)}the axes are {', '.join(MESH_AXES)}")
        if not size.lstrip("-").isdigit():
            raise InputError("--mesh", each, "written as axis=size, such as expert=8,fsdp=8")
        if axis in sizes:
            raise InputError("--mesh", text, f"{axis} stands there twice")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def decoding_mesh(text: str | None) -> jax.sharding.Mesh | None:
    """The mesh of the first devices that the flag has room for; None for one device.

    Raises:
      InputError: see `parse_mesh`; a size that is no number of devices, more of them than there are, or a sequence
        divided over `context`, which decoding does not do.
    """
    if text is None:
        return None
    import jax

    from mixtral_jax.sharding.mesh import make_mesh

    config = parse_mesh(text)
    config = replace(config, data=max(config.data, 1))
    devices = jax.devices()
    if min(config.shape) < 1:
        raise InputError("--mesh", text, "each size is a number of devices above zero")
    if config.context > 1:
        raise InputError("--mesh", text, "decoding divides no sequence: context must be 1")
    if math.prod(config.shape) > len(devices):
        raise InputError("--mesh", text, f"{math.prod(config.shape)} devices, and there are {len(devices)}")
    return make_mesh(config, devices[: math.prod(config.shape)])
