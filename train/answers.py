"""The data of fine-tuning: examples and pairs laid out in rows, with the interface of a token index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from mixtral_jax.errors import InputError
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.train.corpus import Progress, document_hash, find_files
from mixtral_jax.train.data import DataConfig, PreparedData
from mixtral_jax.train.dpo import PairBatch
from mixtral_jax.train.examples import Example, Line, Pair, fill_row, parse, preferred, read_lines, supervised
from mixtral_jax.train.packing import Batch, empty_row

_Item = TypeVar("_Item", Example, Pair)


class AnswerIndex:
    """Examples in rows; packed, each goes into the first row that has room, longest first.

    Args:
      examples: each of at most `length + 1` ids.
      length: T, tokens of a row.
      packing: whether examples share rows.
    """

    sides = 1

    def __init__(self, examples: Sequence[Example], length: int, packing: bool):
        self._examples, self._length = examples, length
        self._rows = (
            pack([len(each.ids) - 1 for each in examples], length)
            if packing
            else [[place] for place in range(len(examples))]
        )
        self.num_tokens = sum(len(each.ids) for each in examples)
        self.num_documents = len(examples)

    def rows(self, length: int) -> int:
        """How many rows an epoch has."""
        assert length == self._length
        return len(self._rows)

    def row(self, number: int, length: int) -> Batch:
        """Row `number` of the epoch: fields [length]."""
        return fill_row([self._examples[place] for place in self._rows[number]], length)

    def empty_row(self, length: int) -> Batch:
        """A row of padding alone."""
        return empty_row(length)


class PairIndex:
    """Pairs in two rows each: 2i the chosen, 2i + 1 the rejected answer of pair i.

    Attributes:
      reference: float32 [rows], the reference's log-probability of each row's answer; 0 until it is set.
    """

    sides = 2

    def __init__(self, pairs: Sequence[Pair]):
        self._pairs = pairs
        self.reference = np.zeros(2 * len(pairs), np.float32)
        self.num_tokens = sum(len(each.ids) for pair in pairs for each in pair)
        self.num_documents = len(pairs)

    def rows(self, length: int) -> int:
        """How many rows an epoch has."""
        return 2 * len(self._pairs)

    def row(self, number: int, length: int) -> PairBatch:
        """Row `number` of the epoch: fields [length]."""
        pair, side = divmod(number, 2)
        filled = fill_row([self._pairs[pair][side]], length)
        return PairBatch(*filled, np.full(length, self.reference[number], np.float32))

    def empty_row(self, length: int) -> PairBatch:
        """A row of padding alone."""
        return PairBatch(*empty_row(length), np.zeros(length, np.float32))


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items go into which bin, first fit by falling length, each bin's in their order.

    A bin is looked for among the last thousand only, so that time grows with the items.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        first = max(0, len(bins) - 1000)
        found = next((n for n in range(first, len(bins)) if left[n] >= lengths[place]), None)
        if found is None:
            found = len(bins)
            bins.append([])
            left.append(room)
        bins[found].append(place)
        left[found] -= lengths[place]
    return [sorted(each) for each in bins]


def prepare_supervised(
    config: DataConfig, tokenizer: Tokenizer, settings: Any, vocab_size: int, progress: Progress | None = None
) -> PreparedData:
    """The examples of a run with the objective `sft`; see SftConfig.

    Raises:
      InputError: naming the file and the line.
    """
    read = partial(supervised, tokenizer=tokenizer, format=settings.format, answers=settings.answers)
    training, validation, digest = _prepare(config, read, settings.too_long, vocab_size, tokenizer, progress)
    index = partial(AnswerIndex, length=config.sequence_length, packing=settings.packing)
    return _prepared(config, tokenizer, index(training), index(validation), digest)


def prepare_pairs(
    config: DataConfig, tokenizer: Tokenizer, settings: Any, vocab_size: int, progress: Progress | None = None
) -> PreparedData:
    """The pairs of a run with the objective `dpo`; see DpoConfig."""
    read = partial(preferred, tokenizer=tokenizer, format=settings.format)
    training, validation, digest = _prepare(config, read, settings.too_long, vocab_size, tokenizer, progress)
    return _prepared(config, tokenizer, PairIndex(training), PairIndex(validation), digest)


def _prepared(config: DataConfig, tokenizer: Tokenizer, training: Any, validation: Any, digest: str) -> PreparedData:
    rows = training.rows(config.sequence_length)
    if rows < config.batch_size:
        wanted = f"the examples fill {rows} rows of {config.sequence_length} tokens; give more, or at most {rows}"
        raise InputError("data.batch_size", config.batch_size, wanted)
    return PreparedData(tokenizer, training, validation, digest)


def _prepare(
    config: DataConfig,
    read: Callable[[dict[str, Any]], _Item],
    too_long: Literal["refuse", "cut", "skip"],
    vocab_size: int,
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> tuple[list[_Item], list[_Item], str]:
    """Training items, those kept apart by their content, and a digest of all."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError("data.tokenizer", tokenizer.vocab_size, f"ids, and the model has {vocab_size}")
    found: list[tuple[int, _Item]] = []
    digest, size = hashlib.sha256(tokenizer.digest.encode()), 0
    for line in read_lines(find_files(config.sources)):
        size += len(line.text)
        item = _fitted(parse(line, read), config.sequence_length, too_long, line)
        if item is not None:
            found.append((document_hash(line.text), item))
            for array in _arrays(item):
                digest.update(array.tobytes())
        if progress is not None:
            progress("reading", size, 0)
    if not found:
        raise InputError("data.sources", list(config.sources), "no example is left; at least one is wanted")
    apart = _apart([key for key, _ in found], config.validation_fraction)
    training = [item for key, item in found if key not in apart]
    validation = [item for key, item in found if key in apart]
    digest.update(repr((sorted(apart), config.sequence_length)).encode())
    return training, validation, digest.hexdigest()[:32]


def _apart(keys: list[int], fraction: float) -> set[int]:
    """The keys of the examples that are never trained on: the lowest, at least one of several if any are wanted."""
    distinct = sorted(set(keys))
    if not fraction or len(distinct) < 2:
        return set()
    return set(distinct[: min(len(distinct) - 1, max(1, round(fraction * len(distinct))))])


def _arrays(item: Example | Pair) -> list[np.ndarray]:
    examples = [item] if isinstance(item, Example) else list(item)
    return [array for each in examples for array in each]


def _fitted(item: _Item, length: int, too_long: str, line: Line) -> _Item | None:
    """The item, cut or left out (None) where it is longer than a row."""
    examples = [item] if isinstance(item, Example) else list(item)
    longest = max(len(each.ids) for each in examples) - 1
    if longest <= length:
        return item
    if too_long == "refuse":
        allowed = "a longer data.sequence_length is wanted, or objective.too_long = 'cut' or 'skip'"
        raise line.file.error(f"{line.where} has {longest} tokens to read, a row {length}: {allowed}")
    if too_long == "skip":
        return None
    short = [Example(each.ids[: length + 1], each.answers[: length + 1]) for each in examples]
    if not all(each.answers.any() for each in short):
        return None
    return short[0] if isinstance(item, Example) else Pair(*short)
