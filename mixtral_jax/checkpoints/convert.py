"""Writes a model in another format, a tensor at a time. What was begun and not ended is gone on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from mixtral_jax.checkpoints import consolidated, huggingface, tensor_names
from mixtral_jax.checkpoints.archive import FLOATS
from mixtral_jax.checkpoints.native import NativeWriter
from mixtral_jax.checkpoints.safetensors import SafetensorsWriter
from mixtral_jax.checkpoints.source import Announced, Source, bits_for, nbytes, runs
from mixtral_jax.config import ModelConfig, to_table
from mixtral_jax.errors import InputError
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.quantization import DTYPES as DTYPE_OF_BITS
from mixtral_jax.quantization import Bits, bits_of, is_quantized
from mixtral_jax.text.tokenizer import Tokenizer

Format = Literal["native", "huggingface", "consolidated"]
DTYPES = {FLOATS[code].name: FLOATS[code] for code in ("F32", "BF16", "F16")}
SHARD_BYTES = 5 * 10**9
"""Of a Hugging Face file, as transformers has it."""
_PLAN = "conversion.json"
_PROGRESS = "progress.jsonl"


class Writer(Protocol):
    """A folder in a format, while it is being written."""

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor is written."""

    def write(self, tensor: Tensor, array: Any) -> None:
        """Takes the next tensor, in our layout: an array or, where it was announced in fewer bits, Quantized."""

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Ends the folder: config, tokenizer and what else belongs to the tensors."""

    def close(self) -> None:
        """Lets go of its files, finished or not."""


def convert(
    source: Source,
    target: Path,
    to: Format,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    quantize: Bits | None = None,
) -> None:
    """Writes a model as a folder.

    Until it is whole the folder is called `TARGET.partial`; the same call then goes on with it.

    Args:
      to: the format to write.
      dtype: a key of DTYPES; None: what is stored, and float32 for what is quantised.
      progress: is told the bytes written so far, and of all.
      quantize: the bits of the layers' matrices and of the unembedding, as `load` rounds them; only in our own format.

    Raises:
      InputError: the target is there, there is no room, the source is damaged, or what was begun is something else.
    """
    for key, value, allowed in (
        ("--to", to, get_args(Format)),
        ("--dtype", dtype, (None, *DTYPES)),
        ("--quantize", quantize, (None, *get_args(Bits))),
    ):
        if value not in allowed:
            raise InputError(key, value, f"one of {', '.join(map(str, filter(None, allowed)))}")
    if quantize is not None and to != "native":
        raise InputError("--quantize", quantize, f"our rounding is no part of the {to} format; --to native keeps it")
    bits = None if quantize is None else bits_for(source, quantize)
    if target.exists() or target.is_symlink():
        raise InputError("DST", str(target), "is there already, and is not written over")
    source.check()
    announced = [(tensor, _kind(source, tensor, dtype, bits)) for tensor in source.tensors]
    partial = _begin(source, target, to, announced)
    total, done = sum(nbytes(*each) for each in announced), 0
    with _told_of_the_disk(partial), closing(_writer(partial, to, source.config, announced)) as writer:
        for tensor, kind in announced:
            if not writer.has(tensor):
                writer.write(tensor, _read(source, tensor, kind))
            done += nbytes(tensor, kind)
            progress(done, total)
        writer.finish(source.tokenizer())
    for name in (_PLAN, _PROGRESS):
        (partial / name).unlink(missing_ok=True)
    os.rename(partial, target)


def _kind(source: Source, tensor: Tensor, dtype: str | None, bits: Bits | None) -> np.dtype:
    """What a tensor is written in."""
    if bits is not None and is_quantized(tensor):
        return DTYPE_OF_BITS[bits]
    return DTYPES[dtype] if dtype else source.dtype(tensor)


@contextmanager
def _told_of_the_disk(folder: Path) -> Iterator[None]:
    """Turns what the system says of a disk that is full or can't be written into a message."""
    try:
        yield
    except OSError as error:
        again = "what was written stays, and the same command goes on with it"
        raise InputError("DST", str(folder), f"can't be written: {error.strerror or error}; {again}") from None


def _begin(source: Source, target: Path, to: Format, announced: Announced) -> Path:
    """The folder that is written in, checked to be of this conversion."""
    partial = target.with_name(target.name + ".partial")
    kinds = sorted({kind.name for _, kind in announced})
    plan = {
        "source": source.identity(),
        "to": to,
        "dtypes": kinds,
        "tensors": len(announced),
        "model": to_table(source.config),
    }
    if partial.exists():
        try:
            begun = json.loads((partial / _PLAN).read_text())
        except (OSError, ValueError):
            begun = None
        if begun != plan:
            raise InputError("DST", str(partial), "an unfinished conversion of something else is there; remove it")
    else:
        need = sum(nbytes(*each) for each in announced)
        parent = next(folder for folder in target.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(parent).free
        if free < need:
            raise InputError("DST", str(target), f"{need:,} bytes are needed there, {free:,} are free")
        (partial / "params").mkdir(parents=True) if to == "native" else partial.mkdir(parents=True)
        (partial / _PLAN).write_text(json.dumps(plan))
    return partial


def _writer(folder: Path, to: Format, config: ModelConfig, announced: Announced) -> Writer:
    if to == "native":
        return NativeWriter(folder, config, announced)
    return _SafetensorsFolder(folder, to, config, announced)


def _read(source: Source, tensor: Tensor, kind: np.dtype) -> np.ndarray | Quantized:
    """A tensor in a type. Raises InputError where values of it are too large for that."""
    if (bits := bits_of(kind)) is not None:
        return source.read_quantized(tensor, bits)
    array = source.read(tensor)
    with np.errstate(over="ignore"):
        cast = array.astype(kind, copy=False)
    if kind.itemsize < array.dtype.itemsize and np.isinf(cast).any() and not np.isinf(array).any():
        raise InputError("--dtype", kind.name, f"values of {tensor.name} are too large for it; bfloat16 has room")
    return cast


class _SafetensorsFolder:
    """A Hugging Face folder, or one of Mistral's own."""

    def __init__(
        self,
        folder: Path,
        to: Literal["huggingface", "consolidated"],
        config: ModelConfig,
        announced: Announced,
    ):
        self._folder, self._to, self._config, self._announced = folder, to, config, announced
        self._layout = tensor_names.LAYOUTS[to][0](config)
        files = self._plan_files()
        done = self._read_progress()
        self._writers = {
            name: SafetensorsWriter(
                folder / name,
                [(self._layout[t].name, tensor_names.file_shape(t, self._layout[t]), kind) for t, kind in members],
                done,
            )
            for name, members in files.items()
        }
        self._file_of = {tensor: name for name, members in files.items() for tensor, _ in members}
        self._progress = open(folder / _PROGRESS, "a")  # noqa: SIM115
        self._progress.write("\n")  # ends a line that was cut off

    def has(self, tensor: Tensor) -> bool:
        """See Writer."""
        return self._layout[tensor].name in self._writers[self._file_of[tensor]].written

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """See Writer."""
        stored = self._layout[tensor]
        writer = self._writers[self._file_of[tensor]]
        digest = writer.write(stored.name, tensor_names.to_file(array, tensor, stored))
        self._progress.write(json.dumps([stored.name, digest]) + "\n")
        self._progress.flush()

    def close(self) -> None:
        """See Writer."""
        self._progress.close()
        for writer in self._writers.values():
            writer.close()

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """See Writer."""
        for writer in self._writers.values():
            writer.finish()
        if tokenizer is not None:
            tokenizer.save_into(self._folder, self._to)
        if self._to == "consolidated":
            _write_json(self._folder / consolidated.CONFIG, consolidated.params_json(self._config))
            return
        widest = max((kind for _, kind in self._announced), key=lambda kind: kind.itemsize)
        _write_json(self._folder / huggingface.CONFIG, huggingface.config_json(self._config, widest.name, tokenizer))
        if len(self._writers) > 1:
            names = {self._layout[tensor].name: file for tensor, file in self._file_of.items()}
            total = sum(nbytes(*each) for each in self._announced)
            _write_json(self._folder / huggingface.INDEX, {"metadata": {"total_size": total}, "weight_map": names})

    def _plan_files(self) -> dict[str, Announced]:
        if self._to == "consolidated":
            return {consolidated.SINGLE: self._announced}
        files = list(runs(self._announced, SHARD_BYTES))
        if len(files) == 1:
            return {huggingface.SINGLE: files[0]}
        return {f"model-{n:05}-of-{len(files):05}.safetensors": members for n, members in enumerate(files, 1)}

    def _read_progress(self) -> dict[str, str]:
        """The digests of what was written before; a line that was cut off is passed over."""
        path = self._folder / _PROGRESS
        lines = path.read_text().splitlines() if path.is_file() else []
        return dict(json.loads(line) for line in lines if line.endswith("]"))


def _write_json(path: Path, table: dict) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
