"""What `open_source` says of a path that is no model."""

import huggingface_hub.constants
import pytest

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
