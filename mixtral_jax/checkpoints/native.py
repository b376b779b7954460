"""Our own format for weights alone: Orbax, in chunks of some tensors each, with the digest of every tensor.

config.toml        its section `model` is the ModelConfig
manifest.json      every tensor: its chunk, dtype and SHA-256; written last
tokenizer.model    or tokenizer.json, and what belongs to it
params/00000/      an Orbax checkpoint of some tensors by name, as single tensors (`layers.3.moe.gate.7`) in our layout

Orbax itself loads a flipped bit without a word, and can't write a tree that is never whole in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tomli_w

from mixtral_jax.checkpoints.archive import FLOATS, told_of_damage
from mixtral_jax.checkpoints.config_files import read_json
from mixtral_jax.checkpoints.source import Announced, Source, misfits, runs
from mixtral_jax.config import ModelConfig, build, read_toml, to_table
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.text.tokenizer import Tokenizer

CONFIG = "config.toml"
MANIFEST = "manifest.json"
PARAMS = "params"
VERSION = 1
CHUNK_BYTES = 32 << 20

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of each step of its work


def is_native(folder: Path) -> bool:
    """Whether the folder is a checkpoint that `convert` wrote."""
    return (folder / MANIFEST).is_file() and (folder / PARAMS).is_dir()


class NativeSource(Source):
    """A checkpoint in our format; every tensor's digest is checked when it is read.

    Raises:
      InputError: a damaged config or manifest.
    """

    def __init__(self, folder: Path):
        table = read_toml(folder / CONFIG)
        super().__init__(folder, "mixtral-jax checkpoint", build(ModelConfig, table.get("model", {}), "model"))
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION or not isinstance(manifest.get("tensors"), dict):
            raise InputError(f"{folder / MANIFEST}: version", manifest.get("version"), f"{VERSION}, with tensors")
        self._manifest: dict[str, dict[str, Any]] = manifest["tensors"]
        for name, fields in self._manifest.items():
            if not _is_record(fields):
                wanted = "chunk, dtype, shape and sha256 are wanted"
                raise InputError(f"{folder / MANIFEST}: tensors.{name}", fields, wanted)
        self._chunk: tuple[str, dict[str, np.ndarray]] = ("", {})

    def problems(self) -> list[str]:
        """See Source."""
        found = {name: fields["shape"] for name, fields in self._manifest.items()}
        return misfits({tensor.name: tensor.shape for tensor in self.tensors}, found)

    def files(self) -> Iterable[Path]:
        """See Source."""
        return [self.path / MANIFEST]

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return np.dtype(self._manifest[tensor.name]["dtype"])

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self._manifest[tensor.name]["dtype"]

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        fields = self._manifest[tensor.name]
        chunk = self.path / PARAMS / fields["chunk"]
        if self._chunk[0] != fields["chunk"]:
            self._chunk = ("", {})
            self._chunk = (fields["chunk"], _restore(chunk))
        array = self._chunk[1].get(tensor.name)
        if (
            array is None
            or (array.shape, array.dtype) != (tensor.shape, self.dtype(tensor))
            or digest(array) != fields["sha256"]
        ):
            raise InputError(str(chunk), None, f"tensor {tensor.name} is not what was written: its digest differs")
        return array


def _is_record(fields: Any) -> bool:
    """Whether the manifest says of a tensor what it has to; a chunk is a folder in `params` itself."""
    kinds = {"chunk": str, "dtype": str, "shape": list, "sha256": str}
    return (
        isinstance(fields, dict)
        and all(isinstance(fields.get(key), kind) for key, kind in kinds.items())
        and fields["chunk"].isdecimal()
        and fields["dtype"] in {dtype.name for dtype in FLOATS.values()}
    )


def _restore(chunk: Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(chunk):
        names = checkpointer.metadata(chunk.absolute()).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return checkpointer.restore(chunk.absolute(), args=ocp.args.PyTreeRestore(restore_args=arguments))


def digest(array: np.ndarray) -> str:
    """The SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


class NativeWriter:
    """Writes a checkpoint in our format, chunk after chunk; one that was begun is gone on with."""

    def __init__(self, folder: Path, config: ModelConfig, announced: Announced):
        self._folder = folder
        self._config = config
        chunks = enumerate(runs(announced, CHUNK_BYTES))
        self._chunks = {tensor.name: f"{number:05}" for number, chunk in chunks for tensor, _ in chunk}
        self._sizes = Counter(self._chunks.values())
        self._manifest: dict[str, Any] = {}
        self._waiting: dict[str, np.ndarray] = {}
        for record in sorted((folder / PARAMS).glob("*.json")):
            # A record that was cut off is as good as none: its chunk is written again.
            with contextlib.suppress(ValueError):
                self._manifest |= json.loads(record.read_text())
        whole = {fields["chunk"] for fields in self._manifest.values()}
        for chunk in (folder / PARAMS).iterdir():
            if chunk.is_dir() and chunk.name not in whole:
                shutil.rmtree(chunk)  # what Orbax was writing when it was ended, under whatever name

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor is written."""
        return tensor.name in self._manifest

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Takes the next tensor, in the announced order."""
        self._waiting[tensor.name] = array
        chunk = self._chunks[tensor.name]
        if len(self._waiting) == self._sizes[chunk]:
            self._save(chunk)

    def _save(self, chunk: str) -> None:
        path = (self._folder / PARAMS / chunk).absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, self._waiting, force=True)
        record = {
            name: {"chunk": chunk, "dtype": array.dtype.name, "shape": list(array.shape), "sha256": digest(array)}
            for name, array in self._waiting.items()
        }
        path.with_suffix(".json").write_text(json.dumps(record))
        self._manifest |= record
        self._waiting = {}

    def close(self) -> None:
        """See Writer; nothing is open."""

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Writes what belongs to the tensors, and the manifest."""
        if tokenizer is not None:
            tokenizer.save_into(self._folder, "native")
        (self._folder / CONFIG).write_text(tomli_w.dumps({"model": to_table(self._config)}))
        (self._folder / MANIFEST).write_text(json.dumps({"version": VERSION, "tensors": self._manifest}, indent=1))
        for record in (self._folder / PARAMS).glob("*.json"):
            record.unlink()
