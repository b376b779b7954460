"""What `open_source` says of a path that is no model."""

from fnmatch import fnmatch

import huggingface_hub
import huggingface_hub.constants
import pytest
from oracles import huggingface as oracle
from oracles import tiny

from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.errors import InputError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no such file or folder; a Hugging Face folder"):
        open_source(tmp_path / "none")


def test_a_plain_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="this file is none of the kinds"):
        open_source(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "none of the kinds is in this folder"),
        (["config.json"], "none of the kinds is in this folder"),
        (["params.json"], "none of the kinds is in this folder"),
        (["b.gguf", "a.gguf"], r"give the GGUF file itself, such as a\.gguf"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin files, which may run code"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model.bin files, which may run code"),
    ],
)
def test_a_folder_that_is_none(tmp_path, files, message):
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-no-such", "a--b/c", "a/b..c", "a/b.git"])
def test_a_hub_id_that_cannot_be_had(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"no such folder, and it can't be had from the hub: ."):
        open_source(name)


def test_a_hub_id_is_what_was_downloaded(tmp_path, monkeypatch):
    config = tiny.config("mistral")
    oracle.to_huggingface(config, tiny.params(config)).save_pretrained(tmp_path)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("mistralai/Mistral-7B-v0.1").config == config
    assert asked["name"] == "mistralai/Mistral-7B-v0.1"
    wanted = {"config.json", "model-00001-of-00002.safetensors", "tokenizer.model.v3", "model.safetensors.index.json"}
    for file in wanted | {"pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors"}:
        taken = any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])
        left = any(fnmatch(file, pattern) for pattern in asked["ignore_patterns"])
        assert (taken and not left) == (file in wanted), file
