"""The newest checkpoint of a training run, read leaf by leaf."""

import shutil

import numpy as np
import pytest

from mixtral_jax.checkpoints.run import CHECKPOINTS, PARAMS, RunSource, read_params
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import look_up


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def test_tensors_are_those_that_orbax_restores(whole):
    source = RunSource(whole[0])
    params, step = read_params(whole[0], source.config)
    assert source.problems() == []
    assert str(source.files()[0]).endswith(f"{CHECKPOINTS}/{step}/{PARAMS}")
    for tensor in source.tensors:
        assert (source.stored_as(tensor), source.read(tensor).shape) == ("float32", tensor.shape)
        np.testing.assert_array_equal(source.read(tensor), look_up(params, tensor))


def test_a_config_that_is_anothers(copy):
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("hidden_dim = 16", "hidden_dim = 24"))
    problems = RunSource(copy).problems()
    assert "layers.moe.up is [2, 4, 16, 16], [2, 4, 16, 24] is wanted" in problems
    with pytest.raises(InputError, match="the weights don't fit the config:"):
        RunSource(copy).check()


def test_no_checkpoint(copy):
    shutil.rmtree(copy / CHECKPOINTS)
    (copy / CHECKPOINTS).mkdir()
    with pytest.raises(InputError, match="no checkpoint; saved steps: none"):
        RunSource(copy).problems()


def test_a_checkpoint_without_its_data(copy):
    source = RunSource(copy)
    (folder,) = source.files()
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
    with pytest.raises(InputError, match=rf"{PARAMS}: can't be read: "):
        source.read(source.tensors[0])
