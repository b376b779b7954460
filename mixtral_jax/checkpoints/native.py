"""Our own format for weights alone: Orbax, in chunks of some tensors each, with the digest of every tensor.

config.toml        its section `model` is the ModelConfig
manifest.json      every tensor: its chunk, dtype and SHA-256; written last
tokenizer.model    or tokenizer.json, and what belongs to it
params/00000/      an Orbax checkpoint of some tensors by name, as single tensors (`layers.3.moe.gate.7`) in our layout

Of a model whose matrices are in fewer bits the manifest says so (`quantized`). Such a matrix has its scales beside it,
as NAME.scales; one in fp8 is bytes, one in int4 bytes of two numbers each. Its digest is of both.

Orbax itself loads a flipped bit without a word, and can't write a tree that is never whole in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias, get_args

import jax
import numpy as np
import orbax.checkpoint as ocp
import tomli_w

from mixtral_jax.checkpoints.archive import FLOATS, told_of_damage
from mixtral_jax.checkpoints.config_files import read_json
from mixtral_jax.checkpoints.source import Announced, Source, misfits, runs
from mixtral_jax.config import ModelConfig, build, read_toml, to_table
from mixtral_jax.errors import InputError
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.quantization import DTYPES, Bits, bits_of, is_quantized, pack, scale_shape, unpack
from mixtral_jax.text.tokenizer import Tokenizer

CONFIG = "config.toml"
MANIFEST = "manifest.json"
PARAMS = "params"
VERSION = 1
CHUNK_BYTES = 32 << 20
SCALES = ".scales"
FLOAT_NAMES = {dtype.name: dtype for dtype in FLOATS.values()}
_Part: TypeAlias = tuple[str, tuple[int, ...], np.dtype]
"""The name, shape and type of an array in a chunk."""

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
        self._bits: Bits | None = manifest.get("quantized")
        if self._bits not in (None, *get_args(Bits)):
            raise InputError(f"{folder / MANIFEST}: quantized", self._bits, f"{', '.join(get_args(Bits))}, or nothing")
        if self._bits is not None:
            self.form += f" in {self._bits}"
        self._manifest: dict[str, dict[str, Any]] = manifest["tensors"]
        for name, fields in self._manifest.items():
            if not _is_record(fields, self._bits):
                wanted = "chunk, dtype, shape and sha256 are wanted"
                raise InputError(f"{folder / MANIFEST}: tensors.{name}", fields, wanted)
        self._chunk: tuple[str, dict[str, np.ndarray]] = ("", {})

    def problems(self) -> list[str]:
        """See Source."""
        found = {name: fields["shape"] for name, fields in self._manifest.items()}
        lines = misfits({tensor.name: tensor.shape for tensor in self.tensors}, found)
        return lines or [
            f"{tensor.name} is {self.stored_as(tensor)}, which it never is"
            for tensor in self.tensors
            if self._is_quantized(tensor) and not is_quantized(tensor)
        ]

    def files(self) -> Iterable[Path]:
        """See Source."""
        return [self.path / MANIFEST]

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return np.dtype(np.float32) if self._is_quantized(tensor) else FLOAT_NAMES[self.stored_as(tensor)]

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self._manifest[tensor.name]["dtype"]

    @property
    def bits(self) -> Bits | None:
        """See Source."""
        return self._bits

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        if self._is_quantized(tensor):
            return np.asarray(self._quantized(tensor).dequantized())
        (array,) = self._checked(tensor, [(tensor.name, tensor.shape, self.dtype(tensor))])
        return array

    def read_quantized(self, tensor: Tensor, bits: Bits) -> Quantized:
        """See Source."""
        return self._quantized(tensor) if self._is_quantized(tensor) else super().read_quantized(tensor, bits)

    def _is_quantized(self, tensor: Tensor) -> bool:
        return self.stored_as(tensor) == self._bits

    def _quantized(self, tensor: Tensor) -> Quantized:
        assert self._bits is not None
        scales: _Part = f"{tensor.name}{SCALES}", scale_shape(tensor, self._bits), np.dtype(np.float32)
        if self._bits != "int4":
            kind = np.dtype(np.int8 if self._bits == "int8" else np.uint8)
            values, scale = self._checked(tensor, [(tensor.name, tensor.shape, kind), scales])
            return Quantized(values.view(DTYPES[self._bits]), scale)
        pairs = (-(-math.prod(tensor.shape) // 2),)
        packed, scale = self._checked(tensor, [(tensor.name, pairs, np.dtype(np.uint8)), scales])
        return Quantized(unpack(packed, tensor.shape), scale)

    def _checked(self, tensor: Tensor, parts: list[_Part]) -> list[np.ndarray]:
        """The arrays that a tensor is stored as, by name, shape and type, if they have its digest."""
        fields = self._manifest[tensor.name]
        chunk = self.path / PARAMS / fields["chunk"]
        if self._chunk[0] != fields["chunk"]:
            self._chunk = ("", {})
            self._chunk = (fields["chunk"], _restore(chunk))
        found = [self._chunk[1].get(name) for name, _, _ in parts]
        arrays = [
            array
            for array, (_, shape, dtype) in zip(found, parts, strict=True)
            if array is not None and (array.shape, array.dtype) == (shape, dtype)
        ]
        if len(arrays) < len(parts) or digest(*arrays) != fields["sha256"]:
            raise InputError(str(chunk), None, f"tensor {tensor.name} is not what was written: its digest differs")
        return arrays


def _is_record(fields: Any, bits: Bits | None) -> bool:
    """Whether the manifest says of a tensor what it has to; a chunk is a folder in `params` itself."""
    kinds = {"chunk": str, "dtype": str, "shape": list, "sha256": str}
    return (
        isinstance(fields, dict)
        and all(isinstance(fields.get(key), kind) for key, kind in kinds.items())
        and fields["chunk"].isdecimal()
        and (fields["dtype"] in FLOAT_NAMES or fields["dtype"] == bits)
    )


def _restore(chunk: Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(chunk):
        names = checkpointer.metadata(chunk.absolute()).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return checkpointer.restore(chunk.absolute(), args=ocp.args.PyTreeRestore(restore_args=arguments))


def digest(*arrays: np.ndarray) -> str:
    """The SHA-256 of arrays' bytes one after another, in hexadecimal."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


class NativeWriter:
    """Writes a checkpoint in our format, chunk after chunk; one that was begun is gone on with."""

    def __init__(self, folder: Path, config: ModelConfig, announced: Announced):
        self._folder = folder
        self._config = config
        chunks = enumerate(runs(announced, CHUNK_BYTES))
        self._chunks = {tensor.name: f"{number:05}" for number, chunk in chunks for tensor, _ in chunk}
        self._sizes = Counter(self._chunks.values())
        self._bits = next(filter(None, (bits_of(kind) for _, kind in announced)), None)
        self._manifest: dict[str, Any] = {}
        self._waiting: dict[str, np.ndarray | Quantized] = {}
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

    def write(self, tensor: Tensor, array: np.ndarray | Quantized) -> None:
        """Takes the next tensor, in the announced order."""
        self._waiting[tensor.name] = array
        chunk = self._chunks[tensor.name]
        if len(self._waiting) == self._sizes[chunk]:
            self._save(chunk)

    def _save(self, chunk: str) -> None:
        path = (self._folder / PARAMS / chunk).absolute()
        stored: dict[str, np.ndarray] = {}
        for name, array in self._waiting.items():
            stored |= _as_stored(name, array)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, stored, force=True)
        record = {
            name: {
                "chunk": chunk,
                "dtype": bits_of(array.values.dtype) if isinstance(array, Quantized) else array.dtype.name,
                "shape": list(array.shape),
                "sha256": digest(*_as_stored(name, array).values()),
            }
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
        manifest: dict[str, Any] = {"version": VERSION, "tensors": self._manifest}
        if self._bits is not None:
            manifest["quantized"] = self._bits
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for record in (self._folder / PARAMS).glob("*.json"):
            record.unlink()


def _as_stored(name: str, array: np.ndarray | Quantized) -> dict[str, np.ndarray]:
    """The arrays that a tensor is stored as."""
    if not isinstance(array, Quantized):
        return {name: array}
    values, bits = array.values, bits_of(array.values.dtype)
    if bits != "int8":
        values = pack(values) if bits == "int4" else values.view(np.uint8)
    return {name: values, f"{name}{SCALES}": array.scale}
