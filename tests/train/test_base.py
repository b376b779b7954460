"""The weights that a run begins from, of any kind, laid out on a mesh."""

from pathlib import Path

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.errors import InputError
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.base import open_base, read_params

GGUF = Path(__file__).parent.parent / "checkpoints" / "gguf" / "mixtral-f32.gguf"


@pytest.fixture(params=["consolidated", "native", "gguf", "run"])
def begun(request, bases, whole, tmp_path):
    """A model of each kind."""
    if request.param == "gguf":
        return GGUF
    if request.param == "run":
        return whole[0]
    convert(open_source(bases["mixtral"]), tmp_path / "model", request.param)
    return tmp_path / "model"


def test_weights_of_any_kind_lie_on_the_mesh_as_they_are_loaded(begun):
    config = open_source(begun).config
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = read_params(open_base(str(begun), config), mesh, TRAINING)
    expected = mj.load(begun, dtype="float32").params
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
    gate = found["layers"]["moe"]["gate"]
    assert {shard.data.size for shard in gate.addressable_shards} == {gate.size // 4}


def test_what_is_not_there_or_another_model_is_refused(whole, bases):
    config = open_source(whole[0]).config
    with pytest.raises(InputError, match=r"init_from = 'nowhere'"):
        open_base("nowhere", config)
    with pytest.raises(
        InputError, match=r"init_from = .*another model: .*model.max_position|init_from = .*another model: model\."
    ):
        open_base(str(bases["mixtral"]), config)
