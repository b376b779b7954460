"""Finds out what a path is, and opens it: the one way in for every verb that takes a model."""

from __future__ import annotations

import re
from pathlib import Path

from mixtral_jax.checkpoints import consolidated, gguf, huggingface, native, run
from mixtral_jax.checkpoints.adapter import LoraConfig, Merged
from mixtral_jax.checkpoints.archive import first_line
from mixtral_jax.checkpoints.buckets import Folder, folder_at, told_of_bucket
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.config import build
from mixtral_jax.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model*", "*.jinja")
KINDS = (
    "a Hugging Face folder, one of Mistral's with params.json, a GGUF file, a checkpoint that `convert` wrote, "
    "the folder of a training run, or a hub id such as mistralai/Mistral-7B-v0.1"
)


def open_source(path: str | Path) -> Source:
    """The model at a path, or with an id on the Hugging Face hub.

    Raises:
      InputError: nothing is there that can be opened, or it is damaged.
    """
    if "://" in str(path):
        return _open_bucket(str(path))
    where = Path(path)
    if where.is_file() and where.suffix == ".gguf":
        return gguf.open_gguf(where)
    if where.is_dir():
        return _open_folder(where)
    if where.exists():
        raise InputError("model", str(path), f"this file is none of the kinds: {KINDS}")
    if _HUB_ID.fullmatch(str(path)):
        return _open_folder(_download(str(path)))
    raise InputError("model", str(path), f"no such file or folder; {KINDS}")


def _open_bucket(path: str) -> Source:
    folder = folder_at(path, "model")
    with told_of_bucket(folder, "model"):
        if run.is_run(folder):
            return _open_run(folder)
    raise InputError("model", path, "no training run is there; a model of another kind is read from a disk")


def _open_folder(folder: Path) -> Source:
    if native.is_native(folder):
        return native.NativeSource(folder)
    if run.is_run(folder):
        return _open_run(folder)
    if huggingface.is_huggingface(folder):
        return huggingface.open_huggingface(folder)
    if consolidated.is_consolidated(folder):
        return consolidated.open_consolidated(folder)
    if any(folder.glob("pytorch_model*.bin")):
        why = "its weights are pytorch_model.bin files, which may run code; save it anew as safetensors"
        raise InputError("model", str(folder), why)
    inside = sorted(folder.glob("*.gguf"))
    if inside:
        raise InputError("model", str(folder), f"give the GGUF file itself, such as {inside[0].name}")
    raise InputError("model", str(folder), f"none of the kinds is in this folder: {KINDS}")


def _open_run(folder: Folder) -> Source:
    """A run's weights; of one that trained factors, merged with those that it began from."""
    newest, table = run.RunSource(folder), run.read_table(folder)
    if "lora" not in table:
        return newest
    lora = build(LoraConfig, table["lora"], "lora")
    try:
        base = open_source(table["init_from"])
    except InputError as error:
        why = f"{error.allowed}; the run has factors alone, and is read with the weights that it began from"
        raise InputError(f"{folder / run.CONFIG}: init_from", table["init_from"], why) from None
    return Merged(folder, base, lora, newest.read_all())


def _download(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        wanted = "no such folder; as a hub id it needs huggingface_hub: pip install 'mixtral-jax[hub]'"
        raise InputError("model", name, wanted) from None
    try:
        # consolidated.safetensors beside the shards would be the same weights again.
        ignore = ["consolidated*"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=ignore))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"no such folder, and it can't be had from the hub: {first_line(error)}"
        raise InputError("model", name, why) from None
