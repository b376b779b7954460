"""Files in the safetensors format, read and written an array at a time.

An eight-byte length, a JSON header of that length with each array's dtype, shape and bytes, then the bytes. The library
of that name maps whole files, takes a name that stands twice, and writes only what is in memory at once.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoints.archive import FLOATS, WHOLE, Entry, Part, read_at, rows_of, size_of
from mixtral_jax.errors import InputError

_CODES = {dtype: code for code, dtype in FLOATS.items()}
_LONGEST_HEADER = 100 << 20  # the library's own limit
_DIGESTS = "mixtral_jax.sha256"
"""Metadata of ours: each array's digest, by name. Others pass it over."""


class SafetensorsFile:
    """One file; its header is checked at once, its arrays when they are read.

    Raises:
      InputError: naming the file and, where it is about one, the array.
    """

    def __init__(self, path: Path):
        self._path = path
        size = size_of(path)
        length = int.from_bytes(read_at(path, 0, 8), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise self._refused(f"not a safetensors file, or truncated: a header of {length:,} bytes in {size:,}")
        header = self._parse(bytes(read_at(path, 8, length)))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._refused("__metadata__ is not an object")
        self.metadata: dict[str, Any] = metadata
        self._start = 8 + length
        self.entries: dict[str, Entry] = {}
        self._offsets: dict[str, int] = {}
        for name, fields in header.items():
            self._add(name, fields)
        self._check_extent(header, size - self._start)
        self._digests = self._parse(str(metadata.get(_DIGESTS, "{}")).encode())
        if self._digests and self._digests.keys() != self.entries.keys():
            raise self._refused("its digests are not those of its tensors; it is damaged")

    def read(self, name: str, part: Part = WHOLE) -> np.ndarray:
        """See Archive.read; an array with a digest is checked when it is read whole."""
        entry = self.entries[name]
        dtype = FLOATS[entry.dtype]
        first, last, columns = rows_of(entry.shape, part)
        width = columns * dtype.itemsize
        data = read_at(self._path, self._start + self._offsets[name] + first * width, (last - first) * width)
        digest = self._digests.get(name)
        if part.count == 1 and digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise self._refused(f"tensor {name} is not what was written: its digest differs")
        array = np.frombuffer(data, dtype)
        return array.reshape(last - first, columns) if len(entry.shape) > 1 else array

    def _add(self, name: str, fields: Any) -> None:
        try:
            code, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        except (TypeError, KeyError, ValueError):
            shape, code, begin, end = (), None, None, None
        if not (isinstance(code, str) and all(type(number) is int for number in (*shape, begin, end))):
            raise self._refused(f"tensor {name}: dtype, shape and data_offsets are wanted")
        if code not in FLOATS:
            raise self._refused(f"tensor {name} has dtype {code}; {', '.join(FLOATS)} can be read")
        wanted = math.prod(shape) * FLOATS[code].itemsize
        if min(shape, default=0) < 0 or end - begin != wanted or begin < 0:
            raise self._refused(f"tensor {name}: {end - begin} bytes are given, {list(shape)} of {code} takes {wanted}")
        self.entries[name] = Entry(shape, code, self._path)
        self._offsets[name] = begin

    def _check_extent(self, header: dict[str, Any], size: int) -> None:
        place = 0
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = fields["data_offsets"]
            if begin != place:
                raise self._refused(f"tensor {name} begins at byte {begin} of the data, not at {place}")
            place = end
        if place != size:
            what = "truncated" if place > size else "longer than its header says"
            raise self._refused(f"{what}: {size:,} bytes of data, the header speaks of {place:,}")

    def _parse(self, text: bytes) -> dict[str, Any]:
        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            table = dict(pairs)
            if len(table) < len(pairs):
                twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
                raise self._refused(f"the header has {twice} twice")
            return table

        try:
            header = json.loads(text, object_pairs_hook=once)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._refused(f"its header is not JSON ({error}); not a safetensors file, or damaged") from None
        if not isinstance(header, dict):
            raise self._refused("its header is not a JSON object")
        return header

    def _refused(self, why: str) -> InputError:
        return InputError(str(self._path), None, why)


class SafetensorsWriter:
    """Writes one file an array at a time, in any order; its header, without which none can read it, comes last.

    An unfinished file can be gone on with: the digests of what was written say what is whole.
    """

    def __init__(self, path: Path, announced: Iterable[tuple[str, tuple[int, ...], np.dtype]], done: Mapping[str, str]):
        """Starts a file, or goes on with one.

        Args:
          announced: every array's name, shape and dtype, one of FLOATS.
          done: digests of the arrays that were written before.
        """
        self._fields: dict[str, dict[str, Any]] = {}
        place = 0
        for name, shape, dtype in announced:
            size = math.prod(shape) * dtype.itemsize
            self._fields[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
        self._digests = dict.fromkeys(self._fields, "0" * 64)
        self._start = len(self._header())
        self._size = self._start + place
        self._path = path
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        self.written = {name for name in self._fields if self._is_whole(name, done.get(name))}
        self._digests |= {name: done[name] for name in self.written}

    def write(self, name: str, array: np.ndarray) -> str:
        """Writes an array; its digest, in hexadecimal."""
        fields = self._fields[name]
        assert list(array.shape) == fields["shape"], name
        data = np.ascontiguousarray(array, FLOATS[fields["dtype"]]).reshape(-1).view(np.uint8).data
        self._digests[name] = hashlib.sha256(data).hexdigest()
        self._file.seek(self._start + fields["data_offsets"][0])
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.written.add(name)
        return self._digests[name]

    def finish(self) -> None:
        """Writes the header, and all to the disk; every array has to be there."""
        assert len(self.written) == len(self._fields)
        self._file.truncate(self._size)
        self._file.seek(0)
        self._file.write(self._header())
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file, finished or not."""
        self._file.close()

    def _is_whole(self, name: str, digest: str | None) -> bool:
        begin, end = (self._start + offset for offset in self._fields[name]["data_offsets"])
        if digest is None or size_of(self._path) < end:
            return False
        return hashlib.sha256(read_at(self._path, begin, end - begin)).hexdigest() == digest

    def _header(self) -> bytes:
        # "pt" is what transformers wants to see; it says no more than how arrays are laid out.
        metadata = {"format": "pt", _DIGESTS: json.dumps(self._digests, separators=(",", ":"))}
        text = json.dumps({"__metadata__": metadata, **self._fields}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
