"""Perplexity of a text that is longer than the model's context, by windows that overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.inference.scoring import score
from mixtral_jax.inference.weights import Prepared

DEFAULT_WINDOW = 2048
"""Tokens read at a time."""
_ROWS = 4
"""Windows that are scored at a time, so that few large products replace many small ones."""


class Perplexity(NamedTuple):
    """What a text costs."""

    tokens: int
    """Scored: all but the first."""
    nats: float
    """Summed over them."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def value(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


class Window(NamedTuple):
    """Tokens begin:end are read, and those from `scored` on are scored, each given all of the window before it."""

    begin: int
    scored: int
    end: int


def windows(count: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a text that score every token but the first once.

    windows(10, 4, 2) reads 0:4, 2:6, 4:8, 6:10 and scores 1:4, 4:6, 6:8, 8:10.
    """
    scored = 1
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        yield Window(begin, scored, end)
        scored = end
        if end == count:
            return


def perplexity(
    weights: Prepared,
    ids: Sequence[int],
    config: ModelConfig,
    execution: Execution,
    window: int,
    stride: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The perplexity of a text.

    Args:
      ids: its tokens, a BOS in front if the model wants one.
      window: tokens read at a time.
      stride: from one window's start to the next's; tokens are scored with at least window - stride before them.
      progress: is told the tokens scored so far, and of all.

    Raises:
      InputError: fewer than two tokens, an id outside the vocabulary, or a window or stride out of bounds.
    """
    if len(ids) < 2:
        raise InputError("text", len(ids), "two tokens or more are needed")
    if not 2 <= window <= config.max_position:
        raise InputError("window", window, f"from 2 to the model's {config.max_position} positions")
    if not 1 <= stride < window:
        raise InputError("stride", stride, f"from 1 to under the window of {window}")
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise InputError("text", max(ids), f"token ids go from 0 to {config.vocab_size - 1}")
    spans = list(windows(len(ids), window, stride))
    rows = min(_ROWS, len(spans))
    total = 0.0
    for first in range(0, len(spans), rows):
        batch = spans[first : first + rows]
        total += float(np.sum(_score(weights, ids, batch, rows, window, config, execution)))
        progress(batch[-1].end - 1, len(ids) - 1)
    return Perplexity(len(ids) - 1, total)


def _score(
    weights: Prepared,
    ids: Sequence[int],
    batch: Sequence[Window],
    rows: int,
    window: int,
    config: ModelConfig,
    execution: Execution,
) -> np.ndarray:
    """Nats of each window's scored tokens, float64 [rows]; batches have one shape, so that one program serves all."""
    tokens_BT = np.zeros((rows, window), np.int32)
    real_BT = np.zeros((rows, window), bool)
    scored_BT = np.zeros((rows, window), bool)
    for row, span in enumerate(batch):
        size = span.end - span.begin
        tokens_BT[row, :size] = ids[span.begin : span.end]
        real_BT[row, :size] = True
        scored_BT[row, span.scored - span.begin : size] = True
    nats_BT = score(weights, tokens_BT, real_BT, config=config, execution=execution).nats_BT
    return np.where(scored_BT, np.asarray(nats_BT, np.float64), 0).sum(axis=1)
