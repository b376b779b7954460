"""Token files on disk: built once, whole or not at all, and read through memory maps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.errors import InputError
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.train.corpus import Progress
from mixtral_jax.train.packing import Batch, empty_row, num_rows, pack_row

FORMAT = 1
SPLITS = ("training", "validation")
ENCODED_AT_ONCE = 1 << 20  # characters
COUNTED_AT_ONCE = 1 << 24  # tokens
ABANDONED_AFTER = 24 * 3600  # seconds


@dataclass(frozen=True)
class TokenIndex:
    """A stream of tokens: the documents one after the other, each `BOS tokens EOS`.

    Attributes:
      tokens: uint16 or uint32 [N], the stream.
      offsets: int64 [documents + 1], where each document starts, then N.
      name: where it came from, for messages.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    name: str = "tokens"

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str) -> TokenIndex:
        """Maps one of `training` and `validation` of a folder that `build_index` wrote.

        Raises:
          InputError: naming the file that is missing or has another size than was written.
        """
        folder = Path(folder)
        about = _read_description(folder)
        counts = about["splits"][split]
        tokens = _map(folder / f"{split}.tokens", np.dtype(about["dtype"]), counts["num_tokens"])
        offsets = _map(folder / f"{split}.offsets", np.dtype(np.int64), counts["num_documents"] + 1)
        return cls(tokens, offsets, str(folder / f"{split}.tokens"))

    @property
    def num_tokens(self) -> int:
        """Length of the stream, with the tokens that begin and end documents."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def sides(self) -> int:
        """See RowIndex."""
        return 1

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens an epoch has."""
        return num_rows(self.num_tokens, length)

    def window(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[start, start + count)` as int32, fewer at the end, and where in them documents start."""
        tokens = np.asarray(self.tokens[start : start + count], np.int32)
        first, last = np.searchsorted(self.offsets[:-1], [start, start + len(tokens)])
        return tokens, np.asarray(self.offsets[first:last]) - start

    def row(self, number: int, length: int) -> Batch:
        """Row `number` of the epoch: fields [length]."""
        return pack_row(*self.window(number * length, length + 1), length)

    def empty_row(self, length: int) -> Batch:
        """A row of padding alone."""
        return empty_row(length)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InputError with file and offset if a token is not below the model's `vocab_size`."""
        for start in range(0, self.num_tokens, COUNTED_AT_ONCE):
            chunk = self.tokens[start : start + COUNTED_AT_ONCE]
            if chunk.max() >= vocab_size:
                offset = start + int(np.argmax(chunk >= vocab_size))
                token = int(self.tokens[offset])
                document = int(np.searchsorted(self.offsets, offset, side="right")) - 1
                wanted = f"token {offset}, in document {document}, must be below the model's vocab_size {vocab_size}"
                raise InputError(self.name, token, wanted)


def unigram_entropy(index: TokenIndex, vocab_size: int) -> float:
    """Nats a token that the best guess without context costs on the index's own targets.

    Counts exactly the tokens that carry loss: all but each document's first. 0 if there are none.
    """
    return entropy(unigram_counts(index, vocab_size))


def unigram_counts(index: TokenIndex, vocab_size: int) -> np.ndarray:
    """How often each token carries loss, int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, index.num_tokens, COUNTED_AT_ONCE):
        counts += np.bincount(index.tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts - np.bincount(index.tokens[index.offsets[:-1]], minlength=vocab_size)


def entropy(counts: np.ndarray) -> float:
    """Nats of what was counted so often; 0 if nothing was."""
    probability = counts[counts > 0] / max(1, counts.sum())
    return float(-(probability * np.log(probability)).sum()) + 0.0


def build_index(
    folder: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    total_bytes: int = 0,
) -> None:
    """Tokenises `(split, text)` pairs into `folder`, which appears whole or not at all.

    Memory is bounded by the largest document. Another process that builds the same folder at the same time does no
    harm: one of the two is kept. A folder that is there but damaged is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        _write(building, documents, tokenizer, progress, total_bytes)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds an index of this format with all its bytes."""
    try:
        for split in SPLITS:
            TokenIndex.open(folder, split)
    except InputError:
        return False
    return True


def _write(
    folder: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    progress: Progress | None,
    total_bytes: int,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    ends = {split: [0, 0] for split in SPLITS}  # tokens, documents
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _file_names()}
        for split in SPLITS:
            files[f"{split}.offsets"].write(np.int64(0).tobytes())
        done = 0
        for batch in _batches(documents):
            for (split, text), ids in zip(batch, _encode(batch, tokenizer), strict=True):
                files[f"{split}.tokens"].write(ids.astype(dtype).tobytes())
                ends[split][0] += len(ids)
                ends[split][1] += 1
                files[f"{split}.offsets"].write(np.int64(ends[split][0]).tobytes())
                done += len(text.encode())
            if progress is not None:
                progress("tokenising", done, total_bytes)
    about = {
        "format": FORMAT,
        "tokenizer": tokenizer.digest,
        "dtype": dtype.name,
        "splits": {split: {"num_tokens": end[0], "num_documents": end[1]} for split, end in ends.items()},
    }
    (folder / "index.json").write_text(json.dumps(about, indent=2) + "\n")


def _file_names() -> list[str]:
    return [f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "offsets")]


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups of documents that are worth several threads."""
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Each document's ids between the begin and end tokens, where the tokenizer has them."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    end = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
    for ids in tokenizer.encode_batch([text for _, text in batch]):
        yield np.array(begin + ids + end, np.int64)


def _publish(building: Path, folder: Path) -> None:
    """Renames the finished folder into place, unless another process was first."""
    try:
        building.rename(folder)
    except OSError:
        if is_whole(folder):
            return
        shutil.rmtree(folder)
        building.rename(folder)


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed builds left a day ago or longer."""
    for folder in parent.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(folder)


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "index.json").read_text())
        counts = [about["splits"][split][count] for split in SPLITS for count in ("num_tokens", "num_documents")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("token index", str(folder), f"no readable index.json ({error!r}); delete the folder") from None
    if about.get("format") != FORMAT or not all(isinstance(count, int) for count in counts):
        wanted = f"format {FORMAT} is wanted, got {about.get('format')!r}; delete the folder"
        raise InputError("token index", str(folder), wanted)
    return about


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A read-only memory map of `count` numbers, which must be all that the file holds."""
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        wanted = f"{count * dtype.itemsize} bytes are wanted, the file has {size}; delete the folder to build it again"
        raise InputError("token index", str(path), wanted)
    return np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)
