"""A model in files, whatever their format: its config, its tokenizer, and its tensors one at a time in our layout."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoints.archive import FLOATS, Archive
from mixtral_jax.checkpoints.tensor_names import LAYOUTS, Layout, Stored, file_shape, from_file
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor, tensors
from mixtral_jax.quantization import Bits, bits_of, quantize
from mixtral_jax.quantization import nbytes as quantized_nbytes
from mixtral_jax.text.files import find_tokenizer, load_tokenizer
from mixtral_jax.text.tokenizer import Tokenizer

Announced = list[tuple[Tensor, np.dtype]]
"""Tensors that are going to be written, and the type of each; in fewer bits with their scales."""


class Source(abc.ABC):
    """A model in files.

    Attributes:
      path: where it lies.
      form: its format in words, such as `Hugging Face, 3 safetensors files`.
      config: what the weights are.
      notes: what a user should know of how the files were read, a sentence each.
    """

    def __init__(self, path: Path, form: str, config: ModelConfig, notes: Iterable[str] = ()):
        self.path = path
        self.form = form
        self.config = config
        self.notes = list(notes)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the model, in the order in which reading is cheapest."""
        return list(tensors(self.config))

    @abc.abstractmethod
    def problems(self) -> list[str]:
        """What keeps the tensors from being read, all of it: missing, extra and misshapen ones; no data is read."""

    @abc.abstractmethod
    def dtype(self, tensor: Tensor) -> np.dtype:
        """What `read` gives: the type on disk, or float32 for a quantised one."""

    @abc.abstractmethod
    def stored_as(self, tensor: Tensor) -> str:
        """The type on disk, as the format spells it."""

    @abc.abstractmethod
    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor in our layout. Raises InputError naming the file where it is damaged."""

    @property
    def bits(self) -> Bits | None:
        """What the matrices are stored in by our own way of rounding (quantization.py), which only our format does."""
        return None

    def read_view(self, tensor: Tensor) -> np.ndarray:
        """`read`, in whatever order of memory comes cheapest: files have a matrix's outputs first."""
        return self.read(tensor)

    def read_quantized(self, tensor: Tensor, bits: Bits) -> Quantized:
        """A tensor in so many bits, on the host: as it is stored where `self.bits` are those, else rounded."""
        return quantize(self.read(tensor), tensor, bits)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with it, or None. Raises InputError where it is damaged."""
        return load_tokenizer(self.path) if find_tokenizer(self.path) else None

    @abc.abstractmethod
    def files(self) -> Iterable[Path]:
        """The files or folders that change when the weights do."""

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others, as JSON: for going on with what was begun with them."""
        stats = {str(file): file.stat() for file in self.files()}
        return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}

    def check(self) -> None:
        """Raises InputError with every problem."""
        problems = self.problems()
        if problems:
            raise InputError(str(self.path), None, "the weights don't fit the config:\n  " + "\n  ".join(problems))


class ArchiveSource(Source):
    """A model in files of named arrays: all formats but our own."""

    def __init__(
        self,
        path: Path,
        form: str,
        config: ModelConfig,
        archive: Archive,
        layouts: str,
        tokenizer: Callable[[], Tokenizer | None] | None = None,
        ignored: Callable[[str], bool] = lambda name: False,
        notes: Iterable[str] = (),
    ):
        """A model of these files.

        Args:
          layouts: a key of LAYOUTS.
          tokenizer: reads it; None: from the files beside the weights.
          ignored: says of a name in the files whether it is known to be no weight.
        """
        super().__init__(path, form, config, notes)
        self.archive = archive
        self.layout = _fitting(config, archive, layouts)
        self._ignored = ignored
        self._tokenizer = tokenizer

    def problems(self) -> list[str]:
        """See Source."""
        found = {name: _flat(entry.shape) for name, entry in self.archive.entries.items() if not self._ignored(name)}
        return misfits({stored.name: _whole_shape(tensor, stored) for tensor, stored in self.layout.items()}, found)

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return FLOATS.get(self.stored_as(tensor), FLOATS["F32"])

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self.archive.entries[self.layout[tensor].name].dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        return self._read(tensor, in_order=True)

    def read_view(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        return self._read(tensor, in_order=False)

    def _read(self, tensor: Tensor, in_order: bool) -> np.ndarray:
        stored = self.layout[tensor]
        return from_file(self.archive.read(stored.name, stored.part), tensor, stored, in_order)

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return super().tokenizer() if self._tokenizer is None else self._tokenizer()

    def files(self) -> Iterable[Path]:
        """See Source."""
        return sorted({entry.file for entry in self.archive.entries.values()})


def _fitting(config: ModelConfig, archive: Archive, layouts: str) -> Layout:
    """The layout of which the files have most."""
    choices = [layout(config) for layout in LAYOUTS[layouts]]
    return max(choices, key=lambda layout: len({stored.name for stored in layout.values()} & archive.entries.keys()))


def misfits(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """What is missing, unknown or misshapen, a line each; of many of a kind the first."""
    missing = [f"missing: {name}" for name in wanted if name not in found]
    unknown = [f"unknown: {name} {list(shape)}" for name, shape in found.items() if name not in wanted]
    shapes = [
        f"{name} is {list(found[name])}, {list(shape)} is wanted"
        for name, shape in wanted.items()
        if name in found and list(found[name]) != list(shape)
    ]
    return _grouped(missing) + _grouped(unknown) + _grouped(shapes)


def bits_for(source: Source, wanted: Bits | None) -> Bits | None:
    """The bits to hold a source's matrices in: those that are wanted, else those that they are stored in.

    Raises:
      InputError: they are stored in others, and what was rounded once is not rounded again.
    """
    if None not in (wanted, source.bits) and wanted != source.bits:
        why = f"{source.path} has its matrices in {source.bits} already; take the model that it was made of"
        raise InputError("quantize", wanted, why)
    return wanted or source.bits


def nbytes(tensor: Tensor, dtype: np.dtype) -> int:
    """The bytes of a tensor in a type."""
    bits = bits_of(dtype)
    return math.prod(tensor.shape) * dtype.itemsize if bits is None else quantized_nbytes(tensor, bits)


def runs(announced: Announced, most: int) -> Iterator[Announced]:
    """Runs of tensors that stay under so many bytes together, or a single one that doesn't."""
    run: Announced = []
    total = 0
    for each in announced:
        if run and total + nbytes(*each) > most:
            yield run
            run, total = [], 0
        run.append(each)
        total += nbytes(*each)
    if run:
        yield run


def _whole_shape(tensor: Tensor, stored: Stored) -> list[int]:
    """The shape of the array that a tensor is or is part of, its leading dimensions taken as one."""
    rows, *columns = file_shape(tensor, stored)
    return [rows * stored.part.count, *columns]


def _flat(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[:-1]), shape[-1]] if len(shape) > 1 else list(shape)


def _grouped(lines: list[str], most: int = 12) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more like these"]
