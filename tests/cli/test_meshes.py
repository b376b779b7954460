"""The flag --mesh: parsed, refused, and the same text from a mesh as from one device."""

import pytest

from mixtral_jax.cli import meshes
from mixtral_jax.errors import InputError
from mixtral_jax.sharding.mesh import MeshConfig


def test_a_mesh_as_text():
    assert meshes.parse_mesh("expert=8, fsdp=2") == MeshConfig(expert=8, fsdp=2)
    assert meshes.decoding_mesh(None) is None
    assert dict(meshes.decoding_mesh("expert=2,tensor=2").shape) == {
        "data": 1,
        "fsdp": 1,
        "expert": 2,
        "context": 1,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--mesh = '': the axes are data, fsdp, expert"),
        ("experts=2", "--mesh = 'experts': did you mean 'expert'"),
        ("expert=two", "--mesh = 'expert=two': written as axis=size"),
        ("expert=2,expert=2", "expert stands there twice"),
        ("data=1,expert=-1", "--mesh = 'data=1,expert=-1': each size is a number of devices above zero"),
        ("context=2", "decoding divides no sequence"),
        ("tensor=16", "--mesh = 'tensor=16': 16 devices, and there are 8"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(InputError, match=message):
        meshes.decoding_mesh(text)


def test_a_mesh_says_what_one_device_says(run, whole):
    folder, *_ = whole
    ask = ("generate", folder, "--prompt", "def f(", "--max-new-tokens", "12", "--dtype", "float32")
    status, alone, _ = run(*ask)
    assert status == 0
    assert run(*ask, "--mesh", "expert=4")[:2] == (0, alone)
    status, _, err = run(*ask, "--mesh", "tensor=2")
    assert status == 2
    assert "the model does not divide over it" in err
