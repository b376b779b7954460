"""Batches of rows: which rows a step has, wherever it starts and however many hosts there are."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import NamedSharding

from mixtral_jax.train.data import DataConfig, RowIndex, check_rows
from mixtral_jax.train.mixture import MixedOrder, Mixture
from mixtral_jax.train.packing import Batch, stack_rows

STEPS = 1 << 40  # more than any run takes; grain wants a length
THREADS = 2


def device_rows(layout: NamedSharding, shape: tuple[int, int]) -> list[int]:
    """The rows of a batch [B, T] of which this process's devices hold some part, in order.

    Where a sequence is split over processes, each of them reads the whole row.
    """
    parts = [index for index in layout.addressable_devices_indices_map(shape).values() if index is not None]
    spans = {index[0].indices(shape[0])[:2] for index in parts}
    return sorted({row for span in spans for row in range(*span)})


def training_batches(
    index: RowIndex, config: DataConfig, first_step: int = 0, rows: Sequence[int] | None = None
) -> Generator[Batch]:
    """Batches of steps `first_step`, `first_step + 1`, ... without end; `close()` ends the threads.

    Row r of step s is row `s * batch_size + r` of a stream that has each row of the index once an epoch, in an order
    that (seed, epoch) decides: a function of (seed, s, r) alone, however many hosts there are and wherever it starts.
    Of a mixture each part has epochs of its own, and after any number of rows its share of them, to within one row.

    Args:
      index: the training tokens.
      config: batch_size, sequence_length, seed and prefetch are used.
      first_step: the first step to give.
      rows: which rows of each global batch to give, as from `device_rows`; all by default.

    Raises:
      InputError: at once, if the index fills less than one batch.
    """
    check_rows(index, config)
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


def _order(index: RowIndex, length: int, seed: int) -> Any:
    """The row, or the first of those that stay together, at each place of the stream."""
    if not isinstance(index, Mixture):
        return _shuffled(index.rows(length) // index.sides, seed)
    parts = enumerate(index.parts)
    return MixedOrder(index, length, [_shuffled(part.rows(length), [seed, place]) for place, part in parts])


def _shuffled(count: int, seed: int | list[int]) -> grain.MapDataset:
    """The numbers below `count` again and again, each time in another order."""
    # Grain adds the epoch to the seed: hashing it keeps neighbouring seeds from sharing epochs.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(count).shuffle(hashed).repeat()
    _ = order[0]  # grain sets its statistics up on first use, which must not happen in two threads
    return order


class _Steps:
    """The batch of any step, as a source for grain."""

    def __init__(self, index: RowIndex, config: DataConfig, rows: Sequence[int]):
        self._index, self._config, self._rows = index, config, rows
        self._order = _order(index, config.sequence_length, config.seed)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Batch:
        index, length = self._index, self._config.sequence_length
        places = self._config.batch_size // index.sides
        found = []
        for row in self._rows:
            side, place = divmod(row, places)
            found.append(index.row(self._order[step * places + place] * index.sides + side, length))
        return stack_rows(found)


def validation_batches(index: RowIndex, config: DataConfig, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """All rows of the index in order, each exactly once; the last batch is filled with rows of padding.

    Args:
      index: the validation tokens.
      config: batch_size and sequence_length are used.
      rows: which rows of each batch to give, as from `device_rows`; all by default.
    """
    rows = range(config.batch_size) if rows is None else rows
    length = config.sequence_length
    count = index.rows(length)
    sides, places = index.sides, config.batch_size // index.sides
    empty = index.empty_row(length)
    for first in range(0, count // sides, places):
        numbers = [(first + row % places) * sides + row // places for row in rows]
        yield stack_rows([index.row(n, length) if n < count else empty for n in numbers])
