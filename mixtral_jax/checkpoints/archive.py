"""Named arrays in files, read one at a time: what every published format comes down to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from mixtral_jax.errors import InputError


@dataclass(frozen=True)
class Part:
    """One of `count` equal runs of an array's rows, its leading dimensions taken as one."""

    index: int
    count: int


WHOLE = Part(0, 1)

FLOATS: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The types of weights that numpy has, as safetensors and GGUF spell them."""


class Entry(NamedTuple):
    """What a file says of one array."""

    shape: tuple[int, ...]
    dtype: str
    """As the file's format spells it, such as BF16 or Q4_K."""
    file: Path


class Archive(Protocol):
    """The arrays of one or several files."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every array by its name; nothing is read."""

    def read(self, name: str, part: Part = WHOLE) -> np.ndarray:
        """An array or a part of it, [rows, columns] or, of one with a single dimension, [n].

        In the file's type, or in float32 where that is a quantised one; only the part is held in memory.

        Raises:
          InputError: the file ends before the array, or fails a check; it names both.
        """


class Union:
    """Several archives as one.

    Raises:
      InputError: a name that more than one of them holds.
    """

    def __init__(self, archives: list[Archive]):
        self._home: dict[str, Archive] = {}
        self.entries: dict[str, Entry] = {}
        for archive in archives:
            for name, entry in archive.entries.items():
                if name in self.entries:
                    where = f"is in {self.entries[name].file.name} and again in {entry.file.name}"
                    raise InputError(str(entry.file.parent), None, f"tensor {name} {where}; each is expected once")
                self.entries[name] = entry
                self._home[name] = archive

    def read(self, name: str, part: Part = WHOLE) -> np.ndarray:
        """See Archive.read."""
        return self._home[name].read(name, part)


def rows_of(shape: tuple[int, ...], part: Part) -> tuple[int, int, int]:
    """The first row of a part, the one after its last, and the columns; a vector is one column.

    rows_of((8, 6, 5), Part(1, 4)) is (12, 24, 5): 48 rows in four parts, the second.
    """
    columns = shape[-1] if len(shape) > 1 else 1
    rows = (int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0]) // part.count
    return part.index * rows, (part.index + 1) * rows, columns


def read_at(path: Path, offset: int, size: int) -> bytearray:
    """Bytes of a file; read, not mapped, so that what was read once does not stay resident.

    Raises:
      InputError: the file can't be read or ends before.
    """
    data = bytearray(size)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(data), 0
            while done < size and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise InputError(str(path), None, f"can't be read: {error.strerror}") from None
    if done < size:
        raise InputError(str(path), None, f"ends at byte {offset + done}, {size - done} too early: it is truncated")
    return data


def first_line(error: BaseException) -> str:
    """What an error of a library says, cut to one line of a message."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def size_of(path: Path) -> int:
    """A file's size in bytes. Raises InputError where it can't be read."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise InputError(str(path), None, f"can't be read: {error.strerror}") from None


@contextmanager
def told_of_damage(path: Path) -> Iterator[None]:
    """Turns what Orbax, and the library under it, raise for a checkpoint that is gone or damaged into an InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(path), None, f"can't be read: {first_line(error)}") from None
