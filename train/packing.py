"""Cuts the stream of training tokens into rows, with the documents of a row told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy's on the host, jax's inside a step


class Batch(NamedTuple):
    """What a training step reads: B rows of T tokens (one row has the same fields without B).

    Attributes:
      tokens: int32 [B, T], the inputs; 0 where there is padding.
      targets: int32 [B, T], the token that follows each input in the stream; 0 where there is padding.
      segment: int32 [B, T], 0 for padding, then 1, 2, ... for the documents of the row in order.
      position: int32 [B, T], counts from 0 in each document of the row.
      loss_weight: float32 [B, T], 1 where the target is learnt; 0 where it is padding or begins another document.
    """

    tokens: Array
    targets: Array
    segment: Array
    position: Array
    loss_weight: Array


def num_rows(num_tokens: int, length: int) -> int:
    """How many rows a stream fills: every token but the first is a target once, every one but the last an input."""
    return max(0, -(-(num_tokens - 1) // length))


def pack_row(window: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """One row of the stream, without the batch's dimension.

    With length 6, a stream `1 5 6 2 1 7 2 ...` in which documents start at 0 and 4 gives its first row so:

        window    1 5 6 2 1 7 2      starts 0 4
        tokens    1 5 6 2 1 7
        targets   5 6 2 1 7 2
        segment   1 1 1 1 2 2
        position  0 1 2 3 0 1
        weight    1 1 1 0 1 1        the end of a document doesn't predict the next one's start

    Args:
      window: [1..length + 1] or empty; the stream's tokens `[r * length, r * length + length + 1)`, fewer at its end.
        The last is a target only.
      starts: [n], where in the window documents start, in order. What lies before the first is the rest of a document
        that began in an earlier row.
      length: T, the tokens of a row; a shorter window is padded.
    """
    inputs = max(0, len(window) - 1)
    is_start = np.zeros(max(1, len(window)), bool)
    is_start[starts] = True
    is_start[0] = True
    index = np.arange(len(is_start))
    position = index - np.maximum.accumulate(np.where(is_start, index, 0))
    tokens, targets, segment = (np.zeros(length, np.int32) for _ in range(3))
    row = Batch(tokens, targets, segment, np.zeros(length, np.int32), np.zeros(length, np.float32))
    row.tokens[:inputs] = window[:inputs]
    row.targets[:inputs] = window[1:]
    row.segment[:inputs] = np.cumsum(is_start)[:inputs]
    row.position[:inputs] = position[:inputs]
    row.loss_weight[:inputs] = ~is_start[1:][:inputs]
    return row


def empty_row(length: int) -> Batch:
    """A row of padding alone."""
    return pack_row(np.zeros(0, np.int32), np.zeros(0, np.int64), length)


def stack_rows(rows: Sequence[Any]) -> Any:
    """Rows [T] to a batch [B, T], of the same class."""
    return type(rows[0])(*map(np.stack, zip(*rows, strict=True)))
