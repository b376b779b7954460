"""A model in files, whatever their format: its config, its tokenizer, and its tensors one at a time in our layout."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from mixtral_jax.checkpoints.archive import Archive
from mixtral_jax.checkpoints.tensor_names import LAYOUTS, Layout, Stored, file_shape, from_file
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor, tensors
from mixtral_jax.text.tokenizer import Tokenizer

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = {"F64": np.dtype(np.float64), "F32": FLOAT32, "F16": np.dtype(np.float16), "BF16": BFLOAT16}


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

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with it, or None. Raises InputError where it is damaged."""
        return None

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
        tokenizer: Callable[[], Tokenizer | None],
        ignored: Callable[[str], bool] = lambda name: False,
        notes: Iterable[str] = (),
    ):
        """Args: layouts: a key of LAYOUTS; ignored: says of a name in the files whether it is known to be no weight."""
        super().__init__(path, form, config, notes)
        self.archive = archive
        self.layout = _fitting(config, archive, layouts)
        self._ignored = ignored
        self._tokenizer = tokenizer

    def problems(self) -> list[str]:
        """See Source."""
        entries = self.archive.entries
        wanted = _by_name(self.layout)
        missing = [f"missing: {name}" for name in wanted if name not in entries]
        extra = [
            f"unknown: {name} {list(entry.shape)}"
            for name, entry in entries.items()
            if name not in wanted and not self._ignored(name)
        ]
        shapes = [
            f"{name} is {list(entries[name].shape)}, {shape} is wanted"
            for name, (tensor, stored) in wanted.items()
            if name in entries and _flat(entries[name].shape) != (shape := _whole_shape(tensor, stored))
        ]
        return _grouped(missing) + _grouped(extra) + _grouped(shapes)

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return _FLOATS.get(self.stored_as(tensor), FLOAT32)

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self.archive.entries[self.layout[tensor].name].dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        stored = self.layout[tensor]
        return from_file(self.archive.read(stored.name, stored.part), tensor, stored)

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return self._tokenizer()


def _fitting(config: ModelConfig, archive: Archive, layouts: str) -> Layout:
    """The layout of which the files have most."""
    choices = [layout(config) for layout in LAYOUTS[layouts]]
    return max(choices, key=lambda layout: len({stored.name for stored in layout.values()} & archive.entries.keys()))


def _by_name(layout: Layout) -> dict[str, tuple[Tensor, Stored]]:
    return {stored.name: (tensor, stored) for tensor, stored in layout.items()}


def _whole_shape(tensor: Tensor, stored: Stored) -> list[int]:
    """The shape of the array that a tensor is or is part of, its leading dimensions taken as one."""
    rows, *columns = file_shape(tensor, stored)
    return [rows * stored.part.count, *columns]


def _flat(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[:-1]), shape[-1]] if len(shape) > 1 else list(shape)


def _grouped(lines: list[str], most: int = 12) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more like these"]
