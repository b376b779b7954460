"""Several texts in one stream of rows, each with its share of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mixtral_jax.config import require
from mixtral_jax.train.packing import Batch, empty_row
from mixtral_jax.train.token_index import TokenIndex, entropy, unigram_counts

LONGEST = 10_000
"""Rows of a period at most: shares with up to four digits."""


class Mixture:
    """Token indexes as one: its rows are those of the first, then those of the second, and so on.

    Attributes:
      parts: the indexes, one a source.
      weights: what each part's share of a stream is in proportion to.
    """

    sides = 1

    def __init__(self, parts: Sequence[TokenIndex], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_documents = sum(part.num_documents for part in parts)

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens all parts have."""
        return sum(part.rows(length) for part in self.parts)

    def first_rows(self, length: int) -> list[int]:
        """The number of each part's first row."""
        return np.cumsum([0, *(part.rows(length) for part in self.parts[:-1])]).tolist()

    def row(self, number: int, length: int) -> Batch:
        """Row `number` of all: fields [length]."""
        for part in self.parts:
            if number < part.rows(length):
                return part.row(number, length)
            number -= part.rows(length)
        raise IndexError(number)

    def empty_row(self, length: int) -> Batch:
        """A row of padding alone."""
        return empty_row(length)

    def check_vocabulary(self, vocab_size: int) -> None:
        """See TokenIndex."""
        for part in self.parts:
            part.check_vocabulary(vocab_size)


def quotas(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a period, the shortest run of rows that the weights divide.

    Raises:
      InputError: a weight is not above zero, or the period is long.
    """
    require(all(math.isfinite(each) and each > 0 for each in weights), "weights", list(weights), "numbers above zero")
    exact = [Fraction(str(each)) for each in weights]  # 0.1 is a tenth, not the nearest float
    shares = [each / sum(exact) for each in exact]
    period = math.lcm(*(share.denominator for share in shares))
    allowed = f"shares in whole rows of at most {LONGEST:,}, such as 3 and 1, or 0.75 and 0.25"
    require(period <= LONGEST, "weights", list(weights), allowed)
    return [int(share * period) for share in shares]


def turns(quota_K: Sequence[int]) -> np.ndarray:
    """The source of each row of a period, int64 [sum(quota_K)]: after any rows each has its share, to within one.

    Of the sources that are owed enough, the one that would be the first to be owed too much (R. Tijdeman, The chairman
    assignment problem, 1980). Quotas 2 1 give 0 1 0.
    """
    period, slack = sum(quota_K), 2 * len(quota_K) - 2
    given_K, found = [0] * len(quota_K), []
    for row in range(1, period + 1):
        # In units of 1 / (period * slack) rows; the least that a source is owed to be chosen is 1 / slack rows.
        owed_K = [slack * (quota * row - period * given) for quota, given in zip(quota_K, given_K, strict=True)]
        able = [source for source, owed in enumerate(owed_K) if owed >= period]
        chosen = min(able, key=lambda source: (period * (slack - 1) - owed_K[source]) / quota_K[source], default=0)
        given_K[chosen] += 1
        found.append(chosen)
    return np.array(found)


class MixedOrder:
    """The row of a mixture at any place of an endless stream, in which each part's rows come once an epoch of its own.

    Args:
      mixture: whose rows.
      length: tokens of a row.
      orders: of each part's rows, at any place of a stream of that part alone.
    """

    def __init__(self, mixture: Mixture, length: int, orders: Sequence[Any]):
        self._orders, self._first_rows = orders, mixture.first_rows(length)
        quota_K = quotas(mixture.weights)
        self._quota_K, self._source_P = quota_K, turns(quota_K)
        is_source_KP = self._source_P == np.arange(len(quota_K))[:, None]
        self._earlier_P = (np.cumsum(is_source_KP, axis=1) - 1)[self._source_P, np.arange(len(self._source_P))]

    def __getitem__(self, place: int) -> int:
        periods, turn = divmod(place, len(self._source_P))
        source = int(self._source_P[turn])
        nth = periods * self._quota_K[source] + int(self._earlier_P[turn])
        return self._first_rows[source] + int(self._orders[source][nth])


def text_entropy(index: object, vocab_size: int) -> float | None:
    """The unigram entropy of text; None for what is none. See token_index.unigram_entropy."""
    parts = index.parts if isinstance(index, Mixture) else [index]
    counts = [unigram_counts(part, vocab_size) for part in parts if isinstance(part, TokenIndex)]
    return entropy(np.sum(counts, axis=0)) if counts else None
