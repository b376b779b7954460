"""From text to training batches: settings, preparation of the token index, and the loader."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax.config import STRICT, require
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
from mixtral_jax.train.mixture import Mixture, quotas
from mixtral_jax.train.token_index import FORMAT, TokenIndex, build_index, is_whole

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What a run learns from and in what pieces."""

    sources: tuple[str, ...] = (STDLIB,)
    """Files, folders, globs, URLs such as gs://bucket/folder, or python-stdlib: the running Python's own modules."""

    weights: tuple[float, ...] | None = None
    """Of each source, what its share of rows is in proportion to; unset: all text is one, each row once an epoch."""

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

    @model_validator(mode="after")
    def check(self) -> DataConfig:
        if self.weights is not None:
            allowed = f"a number for each of data.sources, of which there are {len(self.sources)}"
            require(len(self.weights) == len(self.sources), "weights", list(self.weights), allowed)
            quotas(self.weights)
        return self


class RowIndex(Protocol):
    """What batches are made of: rows, each once an epoch."""

    @property
    def sides(self) -> int:
        """Rows that follow each other and come into a batch together, all first ones before all second ones."""

    @property
    def num_tokens(self) -> int:
        """Of all documents."""

    @property
    def num_documents(self) -> int:
        """Texts, examples or pairs."""

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens an epoch has."""

    def row(self, number: int, length: int) -> Any:
        """Row `number` of the epoch: fields [length]."""

    def empty_row(self, length: int) -> Any:
        """A row of padding alone."""


class PreparedData(NamedTuple):
    """What `prepare` gives.

    Attributes:
      tokenizer: the one the tokens were made with.
      training: the training documents' tokens.
      validation: those of the documents kept apart; may hold none.
      digest: hexadecimal; the same exactly where texts, their order, split and tokenizer are.
    """

    tokenizer: Tokenizer
    training: RowIndex
    validation: RowIndex
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
    groups = [find_files(config.sources)]
    if config.weights is not None:
        groups = [find_files([source]) for source in config.sources]
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else _default_cache()
    try:
        scan = _scan(groups, config, cache, progress)
        tokenizer = _tokenizer(groups, config, scan, cache)
        parts = (scan.digest, scan.validation_below, tokenizer.digest, FORMAT)
        if config.weights is None:
            digest = _digest(*parts)
            folders = [cache / "indexes" / digest]
        else:
            digest = _digest(*parts, scan.counts)
            folders = [cache / "indexes" / _digest(*parts, scan.counts, place) for place in range(len(groups))]
        for folder, files in zip(folders, groups, strict=True):
            if not is_whole(folder):
                build_index(folder, _split_documents([files], config, scan), tokenizer, progress, scan.num_bytes)
    except OSError as error:
        wanted = f"{error.strerror or error}; a writable folder is wanted"
        raise InputError("data.cache_dir", str(cache), wanted) from None
    training, validation = (_open(folders, split, config) for split in ("training", "validation"))
    _check(config, training, validation, vocab_size)
    return PreparedData(tokenizer, training, validation, digest)


def _open(folders: list[Path], split: str, config: DataConfig) -> TokenIndex | Mixture:
    parts = [TokenIndex.open(folder, split) for folder in folders]
    return parts[0] if config.weights is None else Mixture(parts, config.weights)


def _scan(groups: list[list[SourceFile]], config: DataConfig, cache: Path, progress: Progress | None) -> Scan:
    """Reads all text once, or remembers what an earlier reading of the same files found."""
    settings: tuple = (config.text_field, config.document_bytes, config.validation_fraction, FORMAT)
    if config.weights is not None:
        settings += tuple(map(len, groups))
    prints = [file.fingerprint() for files in groups for file in files]
    memory = cache / "scans" / f"{_digest(prints, settings)}.json"
    if memory.is_file():
        scan = Scan(*json.loads(memory.read_text()))
        return scan._replace(counts=tuple(scan.counts))
    counts = [0] * len(groups)
    scan = scan_documents(_documents(groups, config, counts), config.validation_fraction, progress)
    _check_scan(scan, config)
    scan = scan._replace(counts=tuple(counts))
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


def _documents(groups: list[list[SourceFile]], config: DataConfig, counts: list[int] | None = None) -> Iterator[str]:
    """All documents, and how many each group has."""
    counts = [0] * len(groups) if counts is None else counts
    for place, files in enumerate(groups):
        for document in read_documents(files, config.text_field, config.document_bytes):
            counts[place] += 1
            yield document


def _split_documents(groups: list[list[SourceFile]], config: DataConfig, scan: Scan) -> Iterator[tuple[str, str]]:
    for document in _documents(groups, config):
        yield "validation" if document_hash(document) < scan.validation_below else "training", document


def _tokenizer(groups: list[list[SourceFile]], config: DataConfig, scan: Scan, cache: Path) -> Tokenizer:
    """The tokenizer named, or one trained on the training documents and kept in the cache."""
    try:
        if config.tokenizer is not None:
            return load_tokenizer(config.tokenizer)
        path = cache / "tokenizers" / f"{_digest(scan.digest, scan.validation_below, config.vocab_size, FORMAT)}.model"
        if path.is_file():
            return load_tokenizer(path)
        training = (text for split, text in _split_documents(groups, config, scan) if split == "training")
        return train_tokenizer(training, config.vocab_size, path)
    except InputError as error:
        raise InputError(f"data.{error.key.removeprefix('data.')}", error.value, error.allowed) from None


def _check(
    config: DataConfig, training: TokenIndex | Mixture, validation: TokenIndex | Mixture, vocab_size: int | None
) -> None:
    for source, part in zip(config.sources, training.parts if isinstance(training, Mixture) else (), strict=False):
        if not part.rows(config.sequence_length):
            raise InputError("data.sources", source, "has no text to train on; a source with a weight needs some")
    check_rows(training, config)
    if vocab_size is not None:
        training.check_vocabulary(vocab_size)
        validation.check_vocabulary(vocab_size)


def check_rows(index: RowIndex, config: DataConfig) -> None:
    """Raises InputError if the index fills less than one batch."""
    rows = index.rows(config.sequence_length)
    if rows < config.batch_size:
        wanted = f"the training text fills {rows} rows of {config.sequence_length} tokens; give more, or at most {rows}"
        raise InputError("data.batch_size", config.batch_size, wanted)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtral-jax"
