"""Our own format: nothing that is damaged loads without a word."""

import json
import shutil

import numpy as np
import pytest
from oracles import huggingface as oracle
from oracles import tiny

from mixtral_jax.checkpoints import native
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.native import NativeSource
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.errors import InputError

# Where one of Orbax's parallel reads fails, those that end later find its event loop closed, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = tiny.config("mistral", num_layers=1)
    oracle.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return open_source(folder)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """A checkpoint of three chunks or more."""
    folder = tmp_path_factory.mktemp("written") / "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "CHUNK_BYTES", 5000)
        convert(source, folder, "native")
    assert len(list((folder / "params").iterdir())) >= 3
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "native")
    return tmp_path / "native"


def read_all(folder):
    source = NativeSource(folder)
    source.check()
    return {tensor.name: source.read(tensor) for tensor in source.tensors}


def edit(folder, change):
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_reads_what_was_written_in_any_order(written, source):
    found = NativeSource(written)
    assert found.config == source.config
    assert found.problems() == []
    for tensor in reversed(source.tensors):
        assert found.stored_as(tensor) == "float32"
        np.testing.assert_array_equal(found.read(tensor), source.read(tensor))


def test_a_flipped_bit_in_any_data_file_is_found_or_no_part_of_the_data(folder, source):
    expected = {tensor.name: source.read(tensor) for tensor in source.tensors}
    found = flips = 0
    for path in sorted(path for path in (folder / "params").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 4 if len(whole) > 400 else 1).astype(int).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            flips += 1
            try:
                for name, array in read_all(folder).items():
                    np.testing.assert_array_equal(array, expected[name], f"{path} {place}")
            except InputError as error:
                found += str(folder / "params") in str(error)
        path.write_bytes(whole)
    assert found > flips / 4
    assert read_all(folder).keys() == expected.keys()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "file"])
def test_a_damaged_chunk(folder, damage):
    chunk = folder / "params/00001"
    if damage in ("missing", "file"):
        shutil.rmtree(chunk)
    if damage == "file":
        chunk.write_text("")
    if damage == "empty":
        shutil.rmtree(chunk)
        chunk.mkdir()
    if damage == "truncated":
        for path in chunk.rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=f"{chunk}: (can't be read: .|tensor )"):
        read_all(folder)


def test_chunks_that_were_swapped(folder):
    first, second = folder / "params/00000", folder / "params/00001"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    with pytest.raises(InputError, match="is not what was written"):
        read_all(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(version=9), "version = 9: 1, with tensors"),
        (lambda table: table.pop("tensors"), "version"),
        (lambda table: table.update(tensors=[]), "version"),
        (lambda table: table["tensors"].update({"norm.scale": 3}), "tensors.norm.scale = 3: chunk, dtype"),
        (lambda table: table["tensors"]["norm.scale"].pop("sha256"), "chunk, dtype, shape and sha256 are wanted"),
        (lambda table: table["tensors"]["norm.scale"].update(dtype="int8"), "tensors.norm.scale"),
        (lambda table: table["tensors"]["norm.scale"].update(chunk="../00000"), "tensors.norm.scale"),
        (lambda table: table["tensors"]["norm.scale"].update(chunk="/etc"), "tensors.norm.scale"),
        (lambda table: table["tensors"]["norm.scale"].update(chunk="00099"), "00099: "),
        (lambda table: table["tensors"]["norm.scale"].update(dtype="float64"), "norm.scale is not what was written"),
        (lambda table: table["tensors"]["norm.scale"].update(sha256="0" * 64), "norm.scale is not what was written"),
    ],
)
def test_a_damaged_manifest(folder, change, message):
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        read_all(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x00"])
def test_a_manifest_that_is_no_json_object(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        NativeSource(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "dim"), ("model = 3", "model"), ("[model", "not valid TOML"), ("[model]\ndim = 'x'", "model.dim")],
)
def test_a_damaged_config(folder, text, message):
    (folder / "config.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        NativeSource(folder)


def test_all_that_does_not_fit_is_listed_at_once(folder):
    def change(table):
        table["tensors"]["extra"] = table["tensors"].pop("norm.scale")
        table["tensors"]["embedding"]["shape"] = [41, 16]

    edit(folder, change)
    assert NativeSource(folder).problems() == [
        "missing: norm.scale",
        "unknown: extra [16]",
        "embedding is [41, 16], [40, 16] is wanted",
    ]
