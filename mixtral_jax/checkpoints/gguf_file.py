"""GGUF, the format of llama.cpp: metadata and tensors in one file, the tensors often quantised.

A magic number, a version and two counts; the metadata, each value with its type; a record for each tensor; the data.
The header is parsed here: the gguf package's own reader keeps several objects for each token of the vocabulary (3 s and
240 MB for 49k tokens) and doesn't end where a count is damaged. The types and their numbers are the package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.checkpoints.archive import FLOATS, WHOLE, Entry, Part, read_at, rows_of, size_of
from mixtral_jax.errors import InputError

_NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", None, None, "u8", "i8", "f8")
"""By the format's numbers for a value's type: numpy's names of those that are numbers."""
_STRING, _ARRAY = 8, 9
_LONGEST_HEADER = 100 << 20
_SHORTEST_PAIR = 13  # an empty key's length, a type, a byte
_SHORTEST_RECORD = 32  # a tensor of one dimension without a name
_VALUES_AT_ONCE = 1 << 17
"""Dequantised at a time: the temporaries stay in the cache and in memory in use before, as fresh pages are slow."""


class _Type(NamedTuple):
    """How values of one ggml type lie in a file: `values` of them in `size` bytes."""

    name: str
    values: int
    size: int


class _Record(NamedTuple):
    """What the header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    type: _Type
    offset: int


class GGUFFile:
    """One file; its header is checked at once, the data when they are read.

    Attributes:
      fields: the metadata by key: numbers, strings, and lists of them.
      entries: see Archive; the dtype is the ggml type's name.

    Raises:
      InputError: the gguf package is not installed, or the file is damaged or no GGUF; it names the file and, where it
        is about one, the key or the tensor.
    """

    def __init__(self, path: Path):
        with _Header(path) as header:
            tensors, pairs = header.start()
            self.fields: dict[str, Any] = header.metadata(pairs)
            records = [header.record() for _ in range(tensors)]
            start = _aligned(header.place, alignment := header.alignment(self.fields))
        self._path = path
        self._types = {record.name: record.type for record in records}
        self._offsets = {record.name: start + record.offset for record in records}
        self.entries = {record.name: Entry(record.shape, record.type.name, path) for record in records}
        if len(self.entries) < len(records):
            ((name, _),) = Counter(record.name for record in records).most_common(1)
            raise _refused(path, f"has the tensor {name} twice")
        _check_extent(path, records, start, alignment)

    def read(self, name: str, part: Part = WHOLE) -> np.ndarray:
        """See Archive.read; F64, F32, F16 and BF16 as they are, any other type as float32."""
        entry = self.entries[name]
        first, last, columns = rows_of(entry.shape, part)
        values = self._values(name, first * columns, last * columns)
        return values.reshape(-1, columns) if len(entry.shape) > 1 else values

    def _values(self, name: str, begin: int, end: int) -> np.ndarray:
        """Values of a tensor, counted through all of its rows, from begin to before end."""
        kind, offset = self._types[name], self._offsets[name]
        if kind.name in FLOATS:
            data = read_at(self._path, offset + begin * kind.size, (end - begin) * kind.size)
            return np.frombuffer(data, FLOATS[kind.name])
        first, last = begin // kind.values, -(-end // kind.values)  # a vector's part may begin or end within a block
        values = np.empty((last - first, kind.values), np.float32)
        step = max(1, _VALUES_AT_ONCE // kind.values)
        for place in range(0, last - first, step):
            run = values[place : place + step]
            data = read_at(self._path, offset + (first + place) * kind.size, len(run) * kind.size)
            run[...] = _dequantised(data, kind).reshape(run.shape)
        return values.reshape(-1)[begin - first * kind.values : end - first * kind.values]


class _Header:
    """Reads a file's header value after value, and never more than there is."""

    def __init__(self, path: Path):
        self._path = path
        self._size = size_of(path)
        self._limit = min(self._size, _LONGEST_HEADER)
        self._types = _types(path)
        self.place = 0
        try:
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise _refused(path, f"can't be read: {error.strerror}") from None

    def __enter__(self) -> _Header:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def start(self) -> tuple[int, int]:
        """How many tensors and how many pairs of metadata follow."""
        magic = self._file.read(4)
        if magic != b"GGUF":
            raise _refused(self._path, f"not a GGUF file: it begins with {magic!r}")
        self.place = 4
        version = self._integer("u4")
        if version & 0xFFFF == 0:
            raise _refused(self._path, "a GGUF for big-endian machines; little-endian ones can be read")
        if version not in (2, 3):
            raise _refused(self._path, f"GGUF version {version}; 2 and 3 can be read")
        tensors, pairs = self._integer("u8"), self._integer("u8")
        self._expect(tensors * _SHORTEST_RECORD + pairs * _SHORTEST_PAIR, f"{tensors:,} tensors and {pairs:,} keys")
        return tensors, pairs

    def metadata(self, count: int) -> dict[str, Any]:
        """The next count keys with their values."""
        fields: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("a key")
            if key in fields:
                raise _refused(self._path, f"has the key {key} twice")
            fields[key] = self._value(self._integer("u4"), key)
        return fields

    def record(self) -> _Record:
        """What is said of the next tensor."""
        name = self._string("a tensor's name")
        dimensions = self._integer("u4")
        if not 1 <= dimensions <= 4:
            raise _refused(self._path, f"tensor {name} has {dimensions} dimensions; 1 to 4 are possible")
        shape = tuple(self._numbers("u8", dimensions, name)[::-1])  # ggml counts from the innermost
        code, offset = self._integer("u4"), self._integer("u8")
        if code not in self._types:
            known = ", ".join(sorted(each.name for each in self._types.values()))
            raise _refused(self._path, f"tensor {name} has type {_type_name(code)}; {known} can be read")
        kind = self._types[code]
        if min(shape) == 0 or shape[-1] % kind.values:
            wanted = f"rows of {kind.name} are multiples of {kind.values}"
            raise _refused(self._path, f"tensor {name} has shape {list(shape)}; {wanted}, and no dimension is 0")
        return _Record(name, shape, kind, offset)

    def alignment(self, fields: Mapping[str, Any]) -> int:
        """What each tensor's offset is a multiple of."""
        value = fields.get("general.alignment", 32)
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise _refused(self._path, f"general.alignment is {_short(value)}; a power of two is wanted")
        return value

    def _value(self, code: int, key: str) -> Any:
        if code == _ARRAY:
            return self._list(self._integer("u4"), self._integer("u8"), key)
        return self._list(code, 1, key)[0]

    def _list(self, code: int, count: int, key: str) -> list[Any]:
        if code == _STRING:
            self._expect(8 * count, f"{count:,} strings of {key}")
            return [self._string(key) for _ in range(count)]
        dtype = _NUMBERS[code] if code < len(_NUMBERS) else None
        if dtype is None:
            raise _refused(self._path, f"{key} has values of type {code}; numbers, strings and lists of them are known")
        return self._numbers(dtype, count, key)

    def _numbers(self, dtype: str, count: int, what: str) -> list[Any]:
        kind = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(self._take(count * kind.itemsize, what), kind).tolist()

    def _integer(self, dtype: str) -> int:
        return self._numbers(dtype, 1, "the header")[0]

    def _string(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self._take(8, what))
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise _refused(self._path, f"{what} at byte {self.place - length:,} is not UTF-8") from None

    def _take(self, count: int, what: str) -> bytes:
        self._expect(count, what)
        self.place += count
        data = self._file.read(count)
        if len(data) < count:
            raise _refused(self._path, f"ends within {what}")
        return data

    def _expect(self, count: int, what: str) -> None:
        """Refuses before anything of that length is read or made."""
        if count > self._limit - self.place:
            end = (
                "the file's end" if self._limit == self._size else f"{_LONGEST_HEADER >> 20} MB, which no header takes"
            )
            raise _refused(self._path, f"truncated or damaged at byte {self.place:,}: {what} would go beyond {end}")


def _refused(path: Path, why: str) -> InputError:
    return InputError(str(path), None, why)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _aligned(place: int, alignment: int) -> int:
    """_aligned(65, 32) is 96."""
    return -(-place // alignment) * alignment


def _check_extent(path: Path, records: list[_Record], start: int, alignment: int) -> None:
    """Each tensor begins where the one before it ends, as llama.cpp wants it too, and the last ends within the file."""
    size, place = size_of(path), 0
    for record in records:
        if record.offset != place:
            raise _refused(path, f"tensor {record.name} begins at byte {record.offset:,} of the data, not at {place:,}")
        end = place + math.prod(record.shape) // record.type.values * record.type.size
        if start + end > size:
            raise _refused(path, f"truncated: tensor {record.name} ends at byte {start + end:,} of {size:,}")
        place = _aligned(end, alignment)


def _types(path: Path) -> dict[int, _Type]:
    """The types that can be read, by their numbers."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise _refused(path, "reading it needs gguf: pip install 'mixtral-jax[gguf]'") from None
    return _readable()


@functools.cache
def _readable() -> dict[int, _Type]:
    from gguf.constants import GGML_QUANT_SIZES

    types = {int(code): _Type(code.name, *sizes) for code, sizes in GGML_QUANT_SIZES.items()}
    return {code: kind for code, kind in types.items() if kind.name in FLOATS or _can_dequantise(kind)}


def _can_dequantise(kind: _Type) -> bool:
    try:
        _dequantised(bytes(kind.size), kind)
    except NotImplementedError:
        return False
    return True


def _type_name(code: int) -> str:
    from gguf.constants import GGMLQuantizationType

    known = {int(each): each.name for each in GGMLQuantizationType}
    return known.get(code, str(code))


def _dequantised(data: bytes | bytearray, kind: _Type) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    blocks = np.frombuffer(data, np.uint8)[None]
    with np.errstate(all="ignore"):  # a damaged scale gives infinities, which whoever uses the weights will see
        return quants.dequantize(blocks, GGMLQuantizationType[kind.name])
