"""The safetensors format against its own library, and against damage."""

import json
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from mixtral_jax.checkpoints.archive import Part, read_at
from mixtral_jax.checkpoints.safetensors import SafetensorsFile, SafetensorsWriter
from mixtral_jax.errors import InputError

ARRAYS = {
    "b": np.arange(24, dtype=np.float32).reshape(4, 6),
    "a": np.arange(7, dtype=np.float16),
    "stack": np.arange(24, dtype=np.float64).reshape(4, 3, 2),
    "short": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
}


def announced(arrays):
    return [(name, array.shape, array.dtype) for name, array in arrays.items()]


def write(path, arrays, done=None):
    writer = SafetensorsWriter(path, announced(arrays), done or {})
    digests = {name: writer.write(name, array) for name, array in arrays.items() if name not in writer.written}
    writer.finish()
    writer.close()
    return digests


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def field(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_wrote(tmp_path):
    tensors = {
        "x": torch.randn(5, 3),
        "y": torch.randn(4, dtype=torch.float64),
        "z": torch.randn(2, 3, 4).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "f.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.entries["z"].shape == (2, 3, 4)
    assert {name: entry.dtype for name, entry in file.entries.items()} == {
        "x": "F32",
        "y": "F64",
        "z": "BF16",
        "empty": "F32",
    }
    for name in "xyz":
        expected = tensors[name].double().numpy()
        np.testing.assert_array_equal(file.read(name).astype(np.float64).reshape(expected.shape), expected)


def test_the_library_reads_what_we_wrote(tmp_path):
    path = tmp_path / "f.safetensors"
    write(path, ARRAYS)
    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(tensor.double().numpy(), ARRAYS[name].astype(np.float64))
    assert safetensors.numpy.load_file(path)["b"].tolist() == ARRAYS["b"].tolist()


def test_a_part_is_a_run_of_rows(tmp_path):
    write(tmp_path / "f", ARRAYS)
    file = SafetensorsFile(tmp_path / "f")
    np.testing.assert_array_equal(file.read("stack", Part(2, 4)), ARRAYS["stack"][2])
    np.testing.assert_array_equal(file.read("b", Part(1, 2)), ARRAYS["b"][2:])


def test_arrays_may_come_in_any_order(tmp_path):
    write(tmp_path / "f", ARRAYS)
    writer = SafetensorsWriter(tmp_path / "g", announced(ARRAYS), {})
    for name in reversed(ARRAYS):
        writer.write(name, ARRAYS[name])
    writer.finish()
    writer.close()
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


def test_an_unfinished_file_cannot_be_read_and_is_gone_on_with(tmp_path):
    write(tmp_path / "whole", ARRAYS)
    path = tmp_path / "begun"
    writer = SafetensorsWriter(path, announced(ARRAYS), {})
    digests = {name: writer.write(name, ARRAYS[name]) for name in ("b", "stack")}
    writer.close()
    with pytest.raises(InputError, match="not JSON"):
        SafetensorsFile(path)
    assert write(path, ARRAYS, digests).keys() == {"a", "short"}
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_was_written_badly_is_written_again(tmp_path):
    path = tmp_path / "begun"
    writer = SafetensorsWriter(path, announced(ARRAYS), {})
    digests = {name: writer.write(name, array) for name, array in ARRAYS.items()}
    writer.close()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last byte of `short`
    path.write_bytes(data)
    assert write(path, ARRAYS, digests).keys() == {"short"}


def test_every_flipped_bit_of_our_files_is_found_or_harmless(tmp_path):
    """Harmless: it changes no array, such as one in the metadata that others read."""
    path = tmp_path / "f"
    write(path, ARRAYS)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    found = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
            read = {name: file.read(name) for name in file.entries}
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
            found += 1
            continue
        assert place < start, place
        assert set(read) == set(ARRAYS) or set(read) - set(ARRAYS), place  # a changed name is unknown to the config
        for name in set(read) & set(ARRAYS):
            expected = ARRAYS[name].reshape(-1, ARRAYS[name].shape[-1]) if ARRAYS[name].ndim > 1 else ARRAYS[name]
            assert read[name].dtype == expected.dtype
            np.testing.assert_array_equal(read[name], expected)
    assert found > 0.9 * len(whole)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "f"
    write(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{path}: .*truncated"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "header is not JSON"),
        (b"\xff\xfe\xff", b"", "header is not JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "header is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "header is not JSON"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "has dtype twice"),
        (b'{"a": 1, "a": 2}', b"", "has a twice"),
        ({"a": 3}, b"", "tensor a: dtype, shape and data_offsets are wanted"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "tensor a: dtype"),
        ({"a": field(offsets=("0", "8"))}, bytes(8), "tensor a: dtype"),
        ({"a": field(offsets=(0.0, 8.0))}, bytes(8), "tensor a: dtype"),
        ({"a": field(offsets=(0, 4, 8))}, bytes(8), "tensor a: dtype"),
        ({"a": field(shape=("2",))}, bytes(8), "tensor a: dtype"),
        ({"a": field(shape=(2.5,))}, bytes(8), "tensor a: dtype"),
        ({"a": field(shape=(True, 2))}, bytes(8), "tensor a: dtype"),
        ({"a": field(dtype=["F32"])}, bytes(8), "tensor a: dtype"),
        ({"a": field(dtype="I64", shape=(1,))}, bytes(8), "tensor a has dtype I64; F64, F32, F16, BF16 can be read"),
        ({"a": field(shape=(3,))}, bytes(8), r"tensor a: 8 bytes are given, \[3\] of F32 takes 12"),
        ({"a": field(shape=(-1, -2))}, bytes(8), "tensor a: 8 bytes are given"),
        ({"a": field(offsets=(-8, 0))}, bytes(8), "tensor a: 8 bytes are given"),
        ({"a": field(), "b": field(offsets=(4, 12))}, bytes(12), "tensor b begins at byte 4 of the data, not at 8"),
        ({"a": field(), "b": field()}, bytes(8), "tensor b begins at byte 0 of the data, not at 8"),
        ({"a": field(), "b": field(offsets=(12, 20))}, bytes(20), "tensor b begins at byte 12 of the data, not at 8"),
        ({"a": field()}, bytes(7), "truncated: 7 bytes of data, the header speaks of 8"),
        ({"a": field()}, bytes(9), "longer than its header says"),
        ({"__metadata__": [], "a": field()}, bytes(8), "__metadata__ is not an object"),
        ({"__metadata__": {"mixtral_jax.sha256": 3}, "a": field()}, bytes(8), "header is not a JSON object"),
        ({"__metadata__": {"mixtral_jax.sha256": '{"b": ""}'}, "a": field()}, bytes(8), "digests are not those"),
    ],
)
def test_refuses(tmp_path, header, data, message):
    path = raw(tmp_path / "f", header, data)
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        SafetensorsFile(path)


def test_a_giant_header_is_not_read(tmp_path):
    path = tmp_path / "f"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="a header of 4,611,686,018,427,387,904 bytes in 10"):
        SafetensorsFile(path)


def test_a_file_that_is_gone_or_cut_off_since(tmp_path):
    with pytest.raises(InputError, match="can't be read: No such file"):
        SafetensorsFile(tmp_path / "none")
    write(tmp_path / "f", ARRAYS)
    file = SafetensorsFile(tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-1])
    with pytest.raises(InputError, match=re.escape("1 too early: it is truncated")):
        file.read("short")


def test_the_memory_of_reading_shows_in_tracemalloc(tmp_path):
    """The bounds on memory in test_convert.py rest on it."""
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    tracemalloc.start()
    data = read_at(tmp_path / "f", 0, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) <= peak < 1.2 * len(data)
