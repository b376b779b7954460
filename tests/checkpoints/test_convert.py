"""Conversions: bit for bit, with bounded memory, gone on with after a failure."""

import errno
import itertools
import json
import os
import shutil
import tracemalloc
from typing import get_args

import numpy as np
import pytest
import torch
from oracles import huggingface as oracle
from oracles import tiny
from transformers import AutoModelForCausalLM

from mixtral_jax.checkpoints import convert as module
from mixtral_jax.checkpoints import native
from mixtral_jax.checkpoints.convert import Format, convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.config import MoEConfig
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import look_up

FORMATS = get_args(Format)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Mixtral as transformers saves it."""
    folder = tmp_path_factory.mktemp("saved")
    config = tiny.config("mixtral")
    oracle.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return folder


class Memory(Source):
    """A model in memory, which counts what is read, and fails at the tensor of a number."""

    def __init__(self, config, path, fails_at=None):
        super().__init__(path, "memory", config)
        self.params, self.reads, self.fails_at = tiny.params(config), [], fails_at

    def problems(self):
        return []

    def files(self):
        return []

    def identity(self):
        return {"path": str(self.path)}

    def dtype(self, tensor):
        return np.dtype(np.float32)

    def stored_as(self, tensor):
        return "float32"

    def read(self, tensor):
        if len(self.reads) == self.fails_at:
            raise InputError("memory", None, "failed")
        self.reads.append(tensor.name)
        return look_up(self.params, tensor)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(first, second):
    assert first.config == second.config
    for tensor in first.tensors:
        expected, found = first.read(tensor), second.read(tensor)
        assert expected.dtype == found.dtype
        assert expected.shape == found.shape == tensor.shape
        assert expected.tobytes() == found.tobytes(), tensor.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_format_to_every_other_and_back_is_bit_identical(tmp_path, family, dtype):
    config = tiny.config(family, num_layers=1)
    model = oracle.to_huggingface(config, tiny.params(config), getattr(torch, dtype))
    model.save_pretrained(tmp_path / "saved")
    original = open_source(tmp_path / "saved")
    made = {}
    for to in FORMATS:
        made[to] = tmp_path / to
        convert(original, made[to], to)
    for start, to in itertools.product(FORMATS, FORMATS):
        target = tmp_path / f"{start}-{to}"
        convert(open_source(made[start]), target, to)
        result = open_source(target)
        assert_same(original, result)
        assert result.problems() == result.notes == []
        assert not list(tmp_path.glob("*.partial"))
        if to != "native":
            assert files(target) == files(made[to])


def test_the_dtype_that_is_asked_for(saved, tmp_path):
    source = open_source(saved)
    for to in FORMATS:
        convert(source, tmp_path / to, to, dtype="bfloat16")
        result = open_source(tmp_path / to)
        for tensor in source.tensors:
            expected = torch.from_numpy(source.read(tensor)).to(torch.bfloat16).float().numpy()
            assert result.dtype(tensor) == "bfloat16"
            np.testing.assert_array_equal(result.read(tensor).astype(np.float32), expected)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": None, "rope_theta": 1e6}, {"tie_embeddings": True}])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_loads_what_we_write_bit_for_bit(tmp_path, monkeypatch, family, changes):
    monkeypatch.setattr(module, "SHARD_BYTES", 6000)
    config = tiny.config(family, **changes)
    model = oracle.to_huggingface(config, tiny.params(config))
    model.save_pretrained(tmp_path / "saved")
    convert(open_source(tmp_path / "saved"), tmp_path / "ours", "huggingface")
    assert (tmp_path / "ours/model.safetensors.index.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert loaded.dtype == torch.float32
    tokens = tiny.tokens(config, 2, 16)
    np.testing.assert_array_equal(oracle.logits(loaded, tokens), oracle.logits(model, tokens))


def test_values_that_a_shorter_type_has_no_room_for(tmp_path):
    source = Memory(tiny.config("mistral"), tmp_path)
    source.read = lambda tensor: np.full(tensor.shape, 1e6, np.float32)
    with pytest.raises(InputError, match="--dtype = 'float16': values of embedding are too large for it"):
        convert(source, tmp_path / "short", "native", "float16")
    convert(source, tmp_path / "wide", "native", "bfloat16")


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_up(saved, tmp_path, monkeypatch, to):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = module.NativeWriter if to == "native" else module.SafetensorsWriter
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", full)
        with pytest.raises(InputError, match=r"out\.partial': can't be written: No space left on device; what"):
            convert(open_source(saved), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    convert(open_source(saved), tmp_path / "out", to)
    assert_same(open_source(saved), open_source(tmp_path / "out"))


def test_several_files_and_their_index(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 5000)
    source = open_source(saved)
    convert(source, tmp_path / "out", "huggingface")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(source.read(tensor).nbytes for tensor in source.tensors)
    assert sorted(set(index["weight_map"].values())) == shards
    assert_same(source, open_source(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_written_over(saved, tmp_path, kind):
    target = tmp_path / "out"
    {"folder": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to("nowhere")}[kind]()
    with pytest.raises(InputError, match=r"DST = .*is there already, and is not written over"):
        convert(open_source(saved), target, "native")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("fails_at", [17, 40])
def test_a_failed_one_is_gone_on_with(tmp_path, monkeypatch, to, fails_at):
    monkeypatch.setattr(module, "SHARD_BYTES", 8000)
    monkeypatch.setattr(native, "CHUNK_BYTES", 1)  # each tensor is a chunk
    config = tiny.config("mixtral")
    convert(Memory(config, tmp_path), tmp_path / "whole", to)
    failing, going_on = Memory(config, tmp_path, fails_at), Memory(config, tmp_path)
    with pytest.raises(InputError, match="failed"):
        convert(failing, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        open_source(tmp_path / "out.partial")
    told = []
    convert(going_on, tmp_path / "out", to, progress=lambda done, total: told.append((done, total)))
    assert failing.reads + going_on.reads == [tensor.name for tensor in going_on.tensors]
    assert told[-1][0] == told[-1][1] == max(told)[0]
    assert_same(open_source(tmp_path / "whole"), open_source(tmp_path / "out"))
    if to == "native":
        names = ("manifest.json", "config.toml")
        assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
        assert sorted(p.name for p in (tmp_path / "out/params").iterdir()) == sorted(
            p.name for p in (tmp_path / "whole/params").iterdir()
        )
    else:
        assert files(tmp_path / "out") == files(tmp_path / "whole")


def begun(tmp_path, to, fails_at=10):
    with pytest.raises(InputError, match="failed"):
        convert(Memory(tiny.config("mixtral"), tmp_path, fails_at), tmp_path / "out", to)
    return tmp_path / "out.partial"


def test_a_progress_line_that_was_cut_off(tmp_path):
    partial = begun(tmp_path, "huggingface")
    progress = partial / "progress.jsonl"
    progress.write_bytes(progress.read_bytes()[:-20])
    source = Memory(tiny.config("mixtral"), tmp_path)
    convert(source, tmp_path / "out", "huggingface")
    assert source.reads == [tensor.name for tensor in source.tensors[9:]]
    convert(source, tmp_path / "whole", "huggingface")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_tensor_that_was_damaged_meanwhile_is_written_again(tmp_path):
    partial = begun(tmp_path, "consolidated")
    file = partial / "consolidated.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    source = Memory(tiny.config("mixtral"), tmp_path)
    convert(source, tmp_path / "out", "consolidated")
    assert len(source.reads) == len(source.tensors) - 9


def test_what_a_kill_leaves_of_a_chunk_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_BYTES", 1)
    partial = begun(tmp_path, "native")
    (partial / "params/00009.json").write_text('{"norm.scale": {"chu')
    (partial / "params/00010.orbax-checkpoint-tmp-3").mkdir()
    source = Memory(tiny.config("mixtral"), tmp_path)
    convert(source, tmp_path / "out", "native")
    assert source.reads == [tensor.name for tensor in source.tensors[9:]]
    left = {path.name for path in (tmp_path / "out/params").iterdir()}
    assert left == {f"{number:05}" for number in range(len(source.tensors))}
    assert_same(source, open_source(tmp_path / "out"))


@pytest.mark.parametrize(
    "other",
    [
        lambda here: (Memory(tiny.config("mixtral"), here), "consolidated", None),
        lambda here: (Memory(tiny.config("mixtral"), here), "huggingface", "bfloat16"),
        lambda here: (Memory(tiny.config("mixtral"), here / "elsewhere"), "huggingface", None),
        lambda here: (Memory(tiny.config("mixtral", rope_theta=7.0), here), "huggingface", None),
        lambda here: (Memory(tiny.config("mistral"), here), "huggingface", None),
    ],
)
def test_an_unfinished_one_of_something_else_is_left_alone(tmp_path, other):
    partial = begun(tmp_path, "huggingface")
    before = files(partial)
    source, to, dtype = other(tmp_path)
    with pytest.raises(InputError, match="an unfinished conversion of something else is there; remove it"):
        convert(source, tmp_path / "out", to, dtype)
    assert files(partial) == before


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_partial_folder_that_is_none_of_ours(tmp_path, content):
    (tmp_path / "out.partial").mkdir()
    if content is not None:
        (tmp_path / "out.partial/conversion.json").write_text(content)
    with pytest.raises(InputError, match="an unfinished conversion of something else"):
        convert(Memory(tiny.config("mistral"), tmp_path), tmp_path / "out", "native")


@pytest.mark.parametrize("to", FORMATS)
def test_not_enough_room(tmp_path, monkeypatch, to):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"DST = .*: [\d,]+ bytes are needed there, 1,000 are free"):
        convert(Memory(tiny.config("mistral"), tmp_path), tmp_path / "deep/out", to)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gguf",), "--to = 'gguf': one of native, huggingface, consolidated"), (("native", "int8"), "--dtype = 'int8'")],
)
def test_refuses(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        convert(Memory(tiny.config("mistral"), tmp_path), tmp_path / "out", *arguments)


def test_a_source_that_does_not_fit_its_config_is_refused_at_once(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "src")
    table = json.loads((tmp_path / "src/config.json").read_text())
    (tmp_path / "src/config.json").write_text(json.dumps(table | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"missing: model\.layers\.2"):
        convert(open_source(tmp_path / "src"), tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Mixtral whose 48 expert matrices are its largest tensors, a quarter of a megabyte each."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"dim": 128, "hidden_dim": 512, "num_layers": 2, "moe": MoEConfig(num_experts=8, experts_per_token=2)}
    config = tiny.config("mixtral", **shape)
    oracle.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("start", ["huggingface", "consolidated"])
def test_few_tensors_are_in_memory_at_once(large, tmp_path, monkeypatch, start, to):
    source = open_source(large)
    largest = 128 * 512 * 4
    monkeypatch.setattr(native, "CHUNK_BYTES", largest)
    if start != "huggingface":
        convert(source, tmp_path / start, start)
        source = open_source(tmp_path / start)
    # Besides, it works out what tensors there are, once: tracing the model takes memory too, but not with its size.
    total = sum(source.read(tensor).nbytes for tensor in source.tensors)
    assert total > 40 * largest
    tracemalloc.start()
    convert(source, tmp_path / "out", to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 5 * largest
