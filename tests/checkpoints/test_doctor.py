"""What the doctor finds, on models made ill."""

import dataclasses
import re

import numpy as np
import pytest
from oracles import smollm, tiny

import mixtral_jax as mj
from mixtral_jax import configs
from mixtral_jax.checkpoints import doctor
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.checkpoints.tensor_names import interleave
from mixtral_jax.model.tensors import look_up


class InMemory(Source):
    """A model that is no file."""

    def __init__(self, config, params=None):
        super().__init__("memory", "memory", config)
        self.params = params

    def problems(self):
        return []

    def files(self):
        return []

    def dtype(self, tensor):
        return np.dtype(np.float32)

    def stored_as(self, tensor):
        return "F32"

    def read(self, tensor):
        return np.array(look_up(self.params, tensor))


@pytest.mark.parametrize("name", configs.names("models"))
def test_a_release_is_known(name):
    config = mj.model_config(name)
    known = mj.model_config(doctor.release(dataclasses.replace(config, max_position=99)))
    assert dataclasses.replace(known, max_position=1) == dataclasses.replace(config, max_position=1)
    assert not list(doctor._of_config(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0, and all else is mistral-7b-v0.1's"),
        ({"sliding_window": None}, "sliding_window is None, and all else is mistral-7b-v0.1's, whose .* is 4096"),
        ({"vocab_size": 32001}, "vocab_size is 32001"),
        ({"rope_theta": 1e6}, "a window of 4096 with rope_theta 1e.06: no release has both"),
    ],
)
def test_a_config_one_value_from_a_release(changes, message):
    config = dataclasses.replace(mj.model_config("mistral-7b-v0.1"), **changes)

    assert any(re.search(message, each) for each in doctor.findings(InMemory(config)))


def test_no_tokenizer():
    assert "no tokenizer" in doctor.findings(InMemory(tiny.config("mistral")))[-1]


def test_values_that_are_no_numbers():
    config = tiny.config("mixtral")
    source = InMemory(config, tiny.params(config))
    assert doctor.scan(source) == []
    source.params["layers"]["moe"]["up"][1, 2, 0, :3] = np.nan
    source.params["embedding"][0, 0] = np.inf
    try:
        assert doctor.scan(source) == [
            "embedding: 1 of 640 values are NaN or infinite",
            "layers.1.moe.up.2: 3 of 384 values are NaN or infinite",
        ]
    finally:
        tiny.params.cache_clear()


class Interleaved(Source):
    """A model whose query and key rows lie as the other rope wants them."""

    def __init__(self, source):
        super().__init__(source.path, source.form, source.config)
        self.problems, self.dtype, self.stored_as, self.tokenizer = (
            source.problems,
            source.dtype,
            source.stored_as,
            source.tokenizer,
        )
        self._read = source.read

    def files(self): ...
    def problems(self): ...
    def dtype(self, tensor): ...
    def stored_as(self, tensor): ...

    def read(self, tensor):
        array = self._read(tensor)
        if tensor.kind not in ("attention.query", "attention.key"):
            return array
        rows = array.reshape(array.shape[0], -1).T
        return interleave(np.ascontiguousarray(rows), array.shape[-1]).T.reshape(array.shape)


def test_rope_rows_of_real_weights():
    source = open_source(smollm.PATH)
    source.tensors = [tensor for tensor in source.tensors if tensor.layer in (None, 3, 12)]
    assert doctor.scan(source) == []
    ill = Interleaved(source)
    ill.tensors = source.tensors
    (finding,) = doctor.scan(ill)
    assert "rows of queries and keys don't lie as this format has them" in finding


def test_stored_dtypes():
    counts = doctor.stored_dtypes(open_source(smollm.PATH))
    assert counts == {"Q8_0": 28_311_552, "Q4_1": 106_168_320, "F32": 35_136}
