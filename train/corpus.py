"""Finds the files that a run learns from and reads their documents one by one."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from typing import IO, Any, NamedTuple

import fsspec  # type: ignore[import-untyped]
import numpy as np

from mixtral_jax.errors import InputError, nearest

STDLIB = "python-stdlib"
DOCUMENT_BYTES = 1 << 18  # a longer text file is several documents
# Tests, what comes with other packages, and what differs between two builds of one Python version.
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
)
Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes of text done and bytes in all (0 if not known)."""


@dataclass(frozen=True)
class SourceFile:
    """One file to learn from, on a disk or in a bucket, and the user's name for the setting that brought it in."""

    filesystem: Any
    path: str
    key: str

    def error(self, problem: str) -> InputError:
        """An InputError that names the file."""
        return InputError(self.key, self.path, problem)

    def open(self) -> IO[bytes]:
        """Opens the file, unpacking `.gz` and its like."""
        return self.filesystem.open(self.path, "rb", compression="infer")

    def fingerprint(self) -> str:
        """Changes when the file does, as far as its name, size and time tell; costs no reading."""
        return f"{self.path} {self.filesystem.ukey(self.path)}"

    @property
    def is_json_lines(self) -> bool:
        """Whether each line is a JSON object with one document."""
        return ".jsonl" in PurePosixPath(self.path).suffixes


def find_files(sources: Sequence[str], key: str = "data.sources") -> list[SourceFile]:
    """The files that the sources name, each once, in the sources' order and by path within one.

    A source is a file, a folder (all files in it but hidden ones), a glob, or `python-stdlib`; on this machine's disk
    or under a URL that fsspec knows, such as gs://bucket/folder.

    Raises:
      InputError: naming the source that is missing, matches nothing or is an empty file.
    """
    files = [file for source in sources for file in _expand(source, key)]
    if not files:
        raise InputError(key, list(sources), "at least one file with text is wanted")
    return list({(type(file.filesystem), file.path): file for file in files}.values())


def _expand(source: str, key: str) -> list[SourceFile]:
    if source == STDLIB:
        return _stdlib(key)
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise InputError(key, source, f"can't be opened ({error}); a file, a folder or a glob is wanted") from None
    if filesystem.isfile(path):
        if filesystem.size(path) == 0:
            raise InputError(key, source, "the file is empty; text is wanted")
        return [SourceFile(filesystem, path, key)]
    paths = _in_folder(filesystem, path) if filesystem.isdir(path) else _matches(filesystem, path, source, key)
    if not paths:
        raise InputError(key, source, "holds no file with text; at least one is wanted")
    return [SourceFile(filesystem, path, key) for path in sorted(paths)]


def _in_folder(filesystem: Any, folder: str) -> list[str]:
    """Files under the folder that have content and are not hidden, nor under a hidden or cache folder."""

    def is_hidden(path: str) -> bool:
        parts = PurePosixPath(path[len(folder) :]).parts
        return any(part.startswith(".") or part == "__pycache__" for part in parts)

    found = filesystem.find(folder, detail=True)
    return [path for path, info in found.items() if info["size"] != 0 and not is_hidden(path)]


def _matches(filesystem: Any, pattern: str, source: str, key: str) -> list[str]:
    if not any(character in source for character in "*?["):
        close = f"; {nearest(source, [STDLIB])}" if "/" not in source else "; "
        raise InputError(key, source, f"no such file or folder{close}a file, a folder, a glob or {STDLIB} is wanted")
    found = filesystem.glob(pattern, detail=True)
    if not found:
        raise InputError(key, source, "the glob matches nothing; at least one file is wanted")
    return [path for path, info in found.items() if info["type"] == "file" and info["size"] != 0]


def _stdlib(key: str) -> list[SourceFile]:
    """The running Python's own modules, which every machine with this version has alike."""
    filesystem, root = fsspec.core.url_to_fs(sysconfig.get_path("stdlib"))
    paths: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_STDLIB]
        modules = (name for name in names if name.endswith(".py") and "_sysconfigdata" not in name)
        paths += [PurePath(folder, name).as_posix() for name in modules]
    return [SourceFile(filesystem, path, key) for path in sorted(paths)]


def read_documents(files: Iterable[SourceFile], text_field: str, document_bytes: int) -> Iterator[str]:
    """The documents of the files, one by one; none is empty.

    A line of a `.jsonl` file is a document. Any other file is one, or several of at most `document_bytes` bytes,
    cut at ends of lines where there are any.

    Raises:
      InputError: naming the file, and the byte that is not UTF-8 or the line that holds no text.
    """
    for file in files:
        try:
            yield from (
                _json_documents(file, text_field) if file.is_json_lines else _text_documents(file, document_bytes)
            )
        except (OSError, EOFError) as error:
            raise file.error(f"{error}; a whole, readable file is wanted") from None


def _text_documents(file: SourceFile, document_bytes: int) -> Iterator[str]:
    rest, offset = b"", 0
    with file.open() as stream:
        while chunk := rest + stream.read(document_bytes - len(rest)):
            is_last = len(chunk) < document_bytes
            cut = len(chunk) if is_last else _cut(chunk)
            yield _decode(chunk[:cut], file, offset)
            rest, offset = chunk[cut:], offset + cut


def _cut(chunk: bytes) -> int:
    """Where a long text is cut: after the last line's end, else after the last whole character (never at 0)."""
    if end_of_line := chunk.rfind(b"\n") + 1:
        return end_of_line
    try:
        chunk.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return error.start
    return len(chunk)


def _decode(data: bytes, file: SourceFile, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise file.error(f"byte {offset + error.start} is not UTF-8 ({error.reason}); UTF-8 text is wanted") from None


def _json_documents(file: SourceFile, text_field: str) -> Iterator[str]:
    with file.open() as stream:
        offset = 0
        for number, line in enumerate(stream, start=1):
            text = _decode(line, file, offset)
            offset += len(line)
            if text.strip() and (document := _json_text(text, text_field, file, number)):
                yield document


def _json_text(line: str, text_field: str, file: SourceFile, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise file.error(f"line {number} is not JSON ({error}); one object a line is wanted") from None
    if not isinstance(record, dict):
        raise file.error(f"line {number} is no JSON object; one object a line is wanted")
    text = record.get(text_field)
    if not isinstance(text, str):
        has = ", ".join(map(repr, record)) or "none"
        raise file.error(f"line {number} has no text in the field {text_field!r} (data.text_field); its fields: {has}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise file.error(f"line {number} holds half of a surrogate pair; whole characters are wanted") from None
    return text


class Scan(NamedTuple):
    """What one reading of all documents tells.

    Attributes:
      digest: hexadecimal; depends on the documents and their order, not on where they lie.
      num_documents: how many there are.
      num_bytes: their length in UTF-8.
      validation_below: documents with `document_hash` below this are kept for validation.
      counts: documents of each source that has a share of its own.
    """

    digest: str
    num_documents: int
    num_bytes: int
    validation_below: int
    counts: tuple[int, ...] = ()


def document_hash(document: str) -> int:
    """63 bits of the document's content, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "little") >> 1


def scan_documents(documents: Iterable[str], validation_fraction: float, progress: Progress | None = None) -> Scan:
    """Reads all documents once and picks the share for validation: those with the smallest hashes, at least one.

    Which they are depends on the contents alone, not on the files' names or order; equal documents stay together.
    """
    digest, hashes, size = hashlib.sha256(), array("q"), 0
    for document in documents:
        hashes.append(document_hash(document))
        digest.update(hashes[-1].to_bytes(8, "little"))
        size += len(document.encode())
        if progress is not None:
            progress("reading", size, 0)
    share = min(len(hashes), max(1, round(len(hashes) * validation_fraction))) if validation_fraction else 0
    below = int(np.partition(np.frombuffer(hashes, np.int64), share - 1)[share - 1]) + 1 if share else 0
    return Scan(digest.hexdigest(), len(hashes), size, below)
