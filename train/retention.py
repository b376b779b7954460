"""Which of a run's checkpoints stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Retention(NamedTuple):
    """Which saved steps are kept."""

    last: int = 2
    every: int | None = None
    """Multiples of this one are kept for good."""
    best: int = 0
    """So many of the steps with the least validation loss, of those that were validated when they were saved."""


def kept(losses: Mapping[int, float | None], retention: Retention) -> set[int]:
    """Of saved steps, with their validation loss where it is known, those that stay."""
    steps = sorted(losses)
    best = sorted((loss, step) for step, loss in losses.items() if loss is not None)[: retention.best]
    multiples = {step for step in steps if retention.every is not None and step % retention.every == 0}
    return {*steps[-retention.last :], *multiples, *(step for _, step in best)}
