"""Which queries of a sequence attention takes after which others, and to how many keys each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax

MOST_UNROLLED = 16
"""Chunks of a sequence; where there are more, they are a loop."""
SPANS = 4
"""Loops of a sequence without a window."""


class Run(NamedTuple):
    """Chunks of queries one after another, which are of one size and given as many keys each."""

    start: int
    """The first query."""
    chunks: int
    queries: int
    """Of a chunk."""
    keys: int


def are_unrolled(length: int, chunk: int) -> bool:
    """Whether each chunk of so many queries is a run."""
    return length <= chunk * MOST_UNROLLED


def keys_of(queries: int, window: int | None, places: int) -> int:
    """How many keys so many queries in a row are given, of so many places.

    With a window they see one less: with that one a row of scores is whole vectors, where queries and W are.
    """
    return places if window is None else min(places, queries + window)


def plan(
    length: int, num_places: int, first_query: int | None, window: int | None, chunk: int, spans: int = SPANS
) -> list[Run]:
    """The runs of so many queries over so many places of keys; `first_query` as of Keys, None where only running tells.

    A chunk is given as many keys as some chunk of its run may see, or one more. Few chunks are a run each; many are a
    loop of those that are whole, and what is left. Without a window there are several loops, since each is as wide as
    its last chunk.

    Args:
      spans: of those loops, so many at most.
    """
    if first_query is None or (window is not None and window <= length):
        spans = 1
    span = chunk if are_unrolled(length, chunk) else -(-length // (chunk * spans)) * chunk
    runs = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        whole = stop - (stop - start) % chunk
        for first, last, queries in ((start, whole, chunk), (whole, stop, stop - whole)):
            if first < last:
                places = num_places if first_query is None else first_query + last
                runs.append(Run(first, (last - first) // queries, queries, keys_of(queries, window, places)))
    return runs


_Carry = TypeVar("_Carry")


def over(runs: list[Run], step: Callable[[Run, jax.Array | int, _Carry], _Carry], carry: _Carry) -> _Carry:
    """carry = step(run, first query, carry) for one chunk of queries after another."""
    for run in runs:
        if run.chunks > 1:
            chunk = partial(lambda run, number, carry: step(run, run.start + number * run.queries, carry), run)
            carry = jax.lax.fori_loop(0, run.chunks, chunk, carry)
        else:
            # Each after the one before: left free, a compiler holds the scores of all at once.
            carry = step(run, run.start, jax.lax.optimization_barrier(carry))
    return carry
