"""Meshes from configs, and what is refused."""

from dataclasses import dataclass

import jax
import pytest
from jax.sharding import AxisType

from mixtral_jax.config import build
from mixtral_jax.errors import InputError
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.mesh import MeshConfig, completed, current_mesh, make_mesh


def test_axes():
    assert MESH_AXES == ("data", "fsdp", "expert", "context", "tensor")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, expert=2), (2, 2, 2, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=4), (1, 2, 1, 1, 4)),
        (MeshConfig(data=1, expert=-1, context=8), (1, 1, 1, 8, 1)),
    ],
)
def test_resolve(config, shape):
    assert config.resolve(8).shape == shape
    mesh = make_mesh(config)
    assert mesh.shape == dict(zip(MESH_AXES, shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_neighbours_lie_on_the_last_axes():
    devices = make_mesh(MeshConfig(data=2, tensor=4)).devices.reshape(2, 4)
    assert [device.id for device in devices[0]] == [0, 1, 2, 3]


@dataclass(frozen=True)
class FakeDevice:
    """A device as far as a mesh looks: 2 x 2 chips a slice, or a node of 4."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id // 2 % 2, self.id // 4, 0)


def test_slices_lie_on_data_alone():
    devices = [FakeDevice(id, slice_index=id % 2) for id in range(8)]
    mesh = make_mesh(MeshConfig(data=2, expert=4), devices)
    assert [[each.slice_index for each in row] for row in mesh.devices.reshape(2, 4)] == [[0] * 4, [1] * 4]
    with pytest.raises(InputError, match=r"mesh.data = 1: a multiple of the 2 slices is needed"):
        make_mesh(MeshConfig(data=1, expert=8), devices)


def test_an_axis_may_cross_nodes_of_gpus():
    devices = [FakeDevice(id, slice_index=id // 4, platform="gpu", device_kind="NVIDIA H100") for id in range(8)]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4), devices)
    assert [[each.slice_index for each in row] for row in mesh.devices.reshape(2, 4)] == [[0] * 4, [1] * 4]


def test_a_mesh_of_some_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:2]).shape["data"] == 2


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(data=3), 8, r"mesh = 'data=3': the axes' product must be exactly the 8 devices"),
        (MeshConfig(data=2, fsdp=2), 8, r"mesh = 'data=2, fsdp=2': .* exactly the 8 devices"),
        (MeshConfig(data=2, tensor=8), 8, r"mesh = 'data=2, tensor=8': .* exactly the 8 devices"),
        (MeshConfig(tensor=3), 8, r"mesh = 'data=-1, tensor=3': .* a divisor of the 8 devices"),
        (MeshConfig(tensor=16), 8, r"mesh = 'data=-1, tensor=16': .* a divisor of the 8 devices"),
        (MeshConfig(data=1), 8, r"mesh = 'data=1': .* exactly the 8 devices"),
    ],
)
def test_resolve_refuses(config, devices, message):
    with pytest.raises(InputError, match=message):
        config.resolve(devices)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"fsdp": 0}, r"fsdp = 0: a number of devices above zero, or -1 for the rest"),
        ({"tensor": -2}, r"tensor = -2: a number of devices above zero"),
        ({"data": -1, "fsdp": -1}, r"mesh = .*: only one axis can be -1"),
    ],
)
def test_refuses(table, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**table)
    with pytest.raises(InputError, match=message):
        build(MeshConfig, table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"exprt": 2}, r"exprt = 2: unknown key; did you mean 'expert'\? known: context, data, expert, fsdp, tensor"),
        ({"expert": "2"}, r"expert = '2': .*valid integer"),
    ],
)
def test_loading_refuses(table, message):
    with pytest.raises(InputError, match=message):
        build(MeshConfig, table)


def test_completed_has_every_axis_and_the_same_neighbours():
    mesh = jax.make_mesh((4, 2), ("tensor", "data"))
    whole = completed(mesh)
    assert dict(whole.shape) == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 4}
    assert whole.devices[1, 0, 0, 0, 3] == mesh.devices[3, 1]
    with pytest.raises(InputError, match="mesh = 'model': no axis of this name; the axes are data, fsdp"):
        completed(jax.make_mesh((8,), ("model",)))


def test_current_mesh():
    assert current_mesh() is None
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert current_mesh() is None
    with jax.set_mesh(make_mesh(MeshConfig(expert=4))):
        assert dict(current_mesh().shape) == {"data": 2, "fsdp": 1, "expert": 4, "context": 1, "tensor": 1}
    assert current_mesh() is None
