"""From text to training batches: settings, preparation of the token index, and the loader."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import grain
import numpy as np
from jax.sharding import NamedSharding
from pydantic import Field
from pydantic.dataclasses import dataclass

from mixtral_jax.config import STRICT
from mixtral_jax.errors import InputError
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.text.training import train_tokenizer
from mixtral_jax.train.corpus import (
    DOCUMENT_BYTES,
    STDLIB,
    Progress,
    Scan,
    SourceFile,
    document_hash,
    find_files,
    read_documents,
    scan_documents,
)
from mixtral_jax.train.packing import Batch, empty_row, stack_rows
from mixtral_jax.train.token_index import FORMAT, TokenIndex, build_index, is_whole, unigram_entropy

__all__ = [
    "Batch",
    "DataConfig",
    "PreparedData",
    "TokenIndex",
    "device_rows",
    "prepare",
    "training_batches",
    "unigram_entropy",
    "validation_batches",
]

STEPS = 1 << 40  # more than any run takes; grain wants a length
THREADS = 2

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What a run learns from and in what pieces."""

    sources: tuple[str, ...] = (STDLIB,)
    """Files, folders, globs, URLs such as gs://bucket/folder, or python-stdlib: the running Python's own modules."""

    text_field: str = "text"
    """The field of a .jsonl line that holds the document."""

    document_bytes: Annotated[int, Field(ge=4)] = DOCUMENT_BYTES
    """A text file is one document, or several of at most this many bytes, cut at ends of lines."""

    tokenizer: str | None = None
    """A SentencePiece .model file; without one, a tokenizer is trained on the training documents."""

    vocab_size: Positive = 4096
    """How many ids a tokenizer that is trained here gets; ignored with `tokenizer`."""

    sequence_length: Positive = 512
    """Tokens a row."""

    batch_size: Positive = 16
    """Rows a step, over all hosts."""

    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Share of documents never trained on, chosen by their content; 0 for none, else at least one document."""

    cache_dir: str | None = None
    """Where token indexes are kept, on a disk of this machine; by default mixtral-jax in the user's cache folder."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of rows."""

    prefetch: Annotated[int, Field(ge=0)] = 4
    """Batches prepared ahead by threads; 0 for no threads."""


class PreparedData(NamedTuple):
    """What `prepare` gives.

    Attributes:
      tokenizer: the one the tokens were made with.
      training: the training documents' tokens.
      validation: those of the documents kept apart; may hold none.
      digest: hexadecimal; the same exactly where texts, their order, split and tokenizer are.
    """

    tokenizer: Tokenizer
    training: TokenIndex
    validation: TokenIndex
    digest: str


def prepare(config: DataConfig, vocab_size: int | None = None, progress: Progress | None = None) -> PreparedData:
    """Finds the text, gets the tokenizer and the token index, from the cache where they are there already.

    Args:
      config: the settings.
      vocab_size: the model's; every token is checked to be below it.
      progress: called while it works.

    Raises:
      InputError: before anything is trained, naming the key and the file, line, byte or token that is at fault.
    """
    files = find_files(config.sources)
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else _default_cache()
    try:
        scan = _scan(files, config, cache, progress)
        tokenizer = _tokenizer(files, config, scan, cache)
        digest = _digest(scan.digest, scan.validation_below, tokenizer.digest, FORMAT)
        folder = cache / "indexes" / digest
        if not is_whole(folder):
            build_index(folder, _split_documents(files, config, scan), tokenizer, progress, scan.num_bytes)
    except OSError as error:
        wanted = f"{error.strerror or error}; a writable folder is wanted"
        raise InputError("data.cache_dir", str(cache), wanted) from None
    training, validation = TokenIndex.open(folder, "training"), TokenIndex.open(folder, "validation")
    _check(config, training, validation, vocab_size)
    return PreparedData(tokenizer, training, validation, digest)


def _scan(files: list[SourceFile], config: DataConfig, cache: Path, progress: Progress | None) -> Scan:
    """Reads all text once, or remembers what an earlier reading of the same files found."""
    settings = (config.text_field, config.document_bytes, config.validation_fraction, FORMAT)
    memory = cache / "scans" / f"{_digest([file.fingerprint() for file in files], settings)}.json"
    if memory.is_file():
        return Scan(*json.loads(memory.read_text()))
    scan = scan_documents(_documents(files, config), config.validation_fraction, progress)
    _check_scan(scan, config)
    memory.parent.mkdir(parents=True, exist_ok=True)
    partial = memory.with_name(f"{memory.name}.{os.getpid()}")
    partial.write_text(json.dumps(scan))
    partial.replace(memory)
    return scan


def _check_scan(scan: Scan, config: DataConfig) -> None:
    if scan.num_documents == 0:
        raise InputError("data.sources", list(config.sources), "no document holds text; at least one is wanted")
    if config.validation_fraction and scan.num_documents == 1:
        wanted = "one document can't be split; give more, a smaller data.document_bytes, or 0 for no validation"
        raise InputError("data.validation_fraction", config.validation_fraction, wanted)


def _documents(files: list[SourceFile], config: DataConfig) -> Iterator[str]:
    return read_documents(files, config.text_field, config.document_bytes)


def _split_documents(files: list[SourceFile], config: DataConfig, scan: Scan) -> Iterator[tuple[str, str]]:
    for document in _documents(files, config):
        yield "validation" if document_hash(document) < scan.validation_below else "training", document


def _tokenizer(files: list[SourceFile], config: DataConfig, scan: Scan, cache: Path) -> Tokenizer:
    """The tokenizer named, or one trained on the training documents and kept in the cache."""
    try:
        if config.tokenizer is not None:
            return load_tokenizer(config.tokenizer)
        path = cache / "tokenizers" / f"{_digest(scan.digest, scan.validation_below, config.vocab_size, FORMAT)}.model"
        if path.is_file():
            return load_tokenizer(path)
        training = (text for split, text in _split_documents(files, config, scan) if split == "training")
        return train_tokenizer(training, config.vocab_size, path)
    except InputError as error:
        raise InputError(f"data.{error.key.removeprefix('data.')}", error.value, error.allowed) from None


def _check(config: DataConfig, training: TokenIndex, validation: TokenIndex, vocab_size: int | None) -> None:
    _check_rows(training, config)
    if vocab_size is not None:
        training.check_vocabulary(vocab_size)
        validation.check_vocabulary(vocab_size)


def _check_rows(index: TokenIndex, config: DataConfig) -> None:
    rows = index.rows(config.sequence_length)
    if rows < config.batch_size:
        wanted = f"the training text fills {rows} rows of {config.sequence_length} tokens; give more, or at most {rows}"
        raise InputError("data.batch_size", config.batch_size, wanted)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtral-jax"


def device_rows(layout: NamedSharding, shape: tuple[int, int]) -> list[int]:
    """The rows of a batch [B, T] of which this process's devices hold some part, in order.

    Where a sequence is split over processes, each of them reads the whole row.
    """
    parts = [index for index in layout.addressable_devices_indices_map(shape).values() if index is not None]
    spans = {index[0].indices(shape[0])[:2] for index in parts}
    return sorted({row for span in spans for row in range(*span)})


def training_batches(
    index: TokenIndex, config: DataConfig, first_step: int = 0, rows: Sequence[int] | None = None
) -> Generator[Batch]:
    """Batches of steps `first_step`, `first_step + 1`, ... without end; `close()` ends the threads.

    Row r of step s is row `s * batch_size + r` of a stream that has each row of the index once an epoch, in an order
    that (seed, epoch) decides: a function of (seed, s, r) alone, however many hosts there are and wherever it starts.

    Args:
      index: the training tokens.
      config: batch_size, sequence_length, seed and prefetch are used.
      first_step: the first step to give.
      rows: which rows of each global batch to give, as from `device_rows`; all by default.

    Raises:
      InputError: at once, if the index fills less than one batch.
    """
    _check_rows(index, config)
    source = _Steps(index, config, range(config.batch_size) if rows is None else rows)
    threads = THREADS if config.prefetch else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
    return _iterate(grain.MapDataset.source(source).to_iter_dataset(options), first_step)


def _iterate(dataset: grain.IterDataset, first_step: int) -> Generator[Batch]:
    iterator = iter(dataset)
    try:
        iterator.set_state({"next_index": first_step})
        yield from iterator
    finally:
        iterator.close()


class _Steps:
    """The batch of any step, as a source for grain."""

    def __init__(self, index: TokenIndex, config: DataConfig, rows: Sequence[int]):
        self._index, self._config, self._rows = index, config, rows
        # Grain adds the epoch to the seed: hashing it keeps neighbouring seeds from sharing epochs.
        seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(index.rows(config.sequence_length)).shuffle(seed).repeat()
        _ = self._order[0]  # grain sets its statistics up on first use, which must not happen in two threads

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Batch:
        first = step * self._config.batch_size
        length = self._config.sequence_length
        return stack_rows([self._index.row(self._order[first + row], length) for row in self._rows])


def validation_batches(index: TokenIndex, config: DataConfig, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """All rows of the index in order, each exactly once; the last batch is filled with rows of padding.

    Args:
      index: the validation tokens.
      config: batch_size and sequence_length are used.
      rows: which rows of each batch to give, as from `device_rows`; all by default.
    """
    rows = range(config.batch_size) if rows is None else rows
    length = config.sequence_length
    count = index.rows(length)
    for first in range(0, count, config.batch_size):
        numbers = [first + row for row in rows]
        yield stack_rows([index.row(n, length) if n < count else empty_row(length) for n in numbers])
