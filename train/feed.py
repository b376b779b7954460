"""A run's batches, and how they come onto the mesh."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mixtral_jax.train.batches import device_rows, training_batches, validation_batches
from mixtral_jax.train.data import DataConfig, PreparedData
from mixtral_jax.train.packing import Batch


class Feed:
    """Reads this process's share of each batch.

    Attributes:
      shape: of a batch over all processes, [B, T].
      rows: those of a batch that this process reads.

    Args:
      data: what there is to read.
      config: batch_size, sequence_length, seed and prefetch are used.
      layout: of a batch, on the mesh.
    """

    def __init__(self, data: PreparedData, config: DataConfig, layout: NamedSharding):
        self._data, self._config, self._layout = data, config, layout
        self.shape = config.batch_size, config.sequence_length
        self.rows = device_rows(layout, self.shape)

    def training(self, first: int) -> Generator[Batch]:
        """The batches of step `first` and all that follow, on the host."""
        return training_batches(self._data.training, self._config, first, self.rows)

    def validation(self) -> Iterator[Batch]:
        """The held-out batches, on the mesh."""
        return map(self.place, validation_batches(self._data.validation, self._config, self.rows))

    def place(self, batch: Batch) -> Batch:
        """The batch on the mesh, of which this process has the rows that its devices hold parts of."""

        def place(rows: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                first, last, _ = index[0].indices(self.shape[0])
                start = bisect_left(self.rows, first)
                return rows[start : start + last - first, index[1]]

            return jax.make_array_from_callback(self.shape, self._layout, part)

        return jax.tree.map(place, batch)
