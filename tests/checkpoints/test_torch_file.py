"""Files that torch saved: tensors alone, whatever else is in them is refused."""

import os
import pickle

import numpy as np
import pytest
import torch

from mixtral_jax.checkpoints.archive import Part
from mixtral_jax.checkpoints.torch_file import TorchFile
from mixtral_jax.errors import InputError


class Code:
    """What an attacker puts in a pickle."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reads_tensors_and_parts(tmp_path, dtype):
    table = {"w": torch.randn(6, 5, 4).to(dtype), "v": torch.randn(9).to(dtype)}
    torch.save(table, tmp_path / "f.pth")
    file = TorchFile(tmp_path / "f.pth")
    assert file.entries["w"].shape == (6, 5, 4)
    assert file.read("w").itemsize == dtype.itemsize
    np.testing.assert_array_equal(file.read("w").astype(np.float64).reshape(6, 5, 4), table["w"].double().numpy())
    np.testing.assert_array_equal(
        file.read("w", Part(1, 3)).astype(np.float64), table["w"][2:4].double().reshape(-1, 4)
    )
    np.testing.assert_array_equal(file.read("v").astype(np.float64), table["v"].double().numpy())


def test_large_tensors_read_twice_are_the_same(tmp_path):
    """Their pages are let go of after the first reading."""
    table = {"a": torch.randn(300, 1000), "b": torch.randn(300, 1000)}
    torch.save(table, tmp_path / "f.pth")
    file = TorchFile(tmp_path / "f.pth")
    for _ in range(2):
        for name, tensor in table.items():
            np.testing.assert_array_equal(file.read(name), tensor.numpy())


def test_parameters_views_and_strides(tmp_path):
    whole = torch.randn(40, 50)
    table = {"parameter": torch.nn.Parameter(whole), "transposed": whole.T, "slice": whole[3:7, ::2]}
    torch.save(table, tmp_path / "f.pth")
    file = TorchFile(tmp_path / "f.pth")
    for name, tensor in table.items():
        np.testing.assert_array_equal(file.read(name), tensor.detach().numpy())


@pytest.mark.parametrize(
    "wrap", [lambda code: code, lambda code: {"w": torch.zeros(2), "x": code}, lambda code: {"x": [code]}]
)
def test_code_is_refused_and_not_run(tmp_path, wrap):
    torch.save(wrap(Code(tmp_path / "ran")), tmp_path / "f.pth")
    with pytest.raises(InputError, match=r"f\.pth: refused: it holds more than tensors, and might run code"):
        TorchFile(tmp_path / "f.pth")
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "f.pth").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"f\.pth: "):
        TorchFile(tmp_path / "f.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "f.pth"
    torch.save({"w": torch.randn(50, 50)}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=r"f\.pth: "):
        TorchFile(path)


def test_damage_is_an_input_error_or_a_table_of_tensors(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"w": torch.randn(2, 3), "v": torch.randn(4)}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            file = TorchFile(path)
            for name in file.entries:
                file.read(name)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "a table of tensors is wanted; the whole is none"),
        ({"w": torch.zeros(2), "step": 3}, "a table of tensors is wanted; step is none"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, "tensor w has dtype int64; float64, float32, float16, bfloat16 can"),
        ({"w": torch.eye(2).to_sparse()}, "tensor w has layout torch.sparse_coo; plain ones can be read"),
    ],
)
def test_refuses(tmp_path, content, message):
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(InputError, match=rf"f\.pth: {message}"):
        TorchFile(tmp_path / "f.pth")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="can't be read: No such file"):
        TorchFile(tmp_path / "none.pth")
