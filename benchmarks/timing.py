"""Interleaved timing: contenders take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One contender in one benchmark."""

    benchmark: str
    contender: str
    unit: str
    median: float
    least: float
    most: float
    ratio: float
    """Of the medians, ours over this one's: we are ahead above 1 where it is a rate, below 1 where less is better."""


_SETTLED = 0.1
"""Seconds, about, for which another contender's threads may still look for work on the same cores."""


def interleave(contenders: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each contender, taken in turns; each must return when its work is done.

    A call that is timed comes after others of its own, so that it shares the machine with nobody.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if turn < warm_up:
                continue
            while time.perf_counter() - begin < _SETTLED:
                call()
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def rates(benchmark: str, unit: str, work: float, seconds: dict[str, list[float]], ours: str) -> list[Row]:
    """Work a second of each contender, and ours over it."""
    return amounts(benchmark, unit, {name: [work / each for each in times] for name, times in seconds.items()}, ours)


def amounts(benchmark: str, unit: str, found: dict[str, list[float]], ours: str) -> list[Row]:
    """What was found of each contender, in any unit, and ours over it."""
    medians = {name: statistics.median(each) for name, each in found.items()}
    return [
        Row(benchmark, name, unit, medians[name], min(each), max(each), medians[ours] / medians[name])
        for name, each in found.items()
    ]


def show(rows: list[Row], path: Path | None) -> None:
    """Prints the rows as a table, and writes them as JSON."""
    print(f"{'benchmark':<38} {'contender':<34} {'median':>10} {'least':>10} {'most':>10}  {'ours/it':>7}")
    for row in rows:
        name = f"{row.benchmark} ({row.unit})"
        median, least, most = (_number(each) for each in (row.median, row.least, row.most))
        print(f"{name:<38} {row.contender:<34} {median:>10} {least:>10} {most:>10}  {row.ratio:>7.2f}")
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
