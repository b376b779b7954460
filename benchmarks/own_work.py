"""What this project's benchmarks have it do, one call at a time for a parent that says which, which is `commits.py`.

python -m benchmarks.own_work NAME

Each line of standard input is a contender of that benchmark, and is answered by a line when its call is done; an empty
one by the names of all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO

from mixtral_jax.cli.platform import reuse_memory

if __name__ == "__main__":
    reuse_memory()  # before anything allocates

from benchmarks import batching, pieces, whole
from benchmarks.pieces import Calls


def own(piece: Callable[[], Iterator[tuple[str, int, Calls]]]) -> Calls:
    """A piece's calls without its peers'."""
    named = ((name, who, call) for name, _, calls in piece() for who, call in calls.items())
    return {f"{name}, {who}": call for name, who, call in named if who.startswith("ours")}


def _engine() -> Calls:
    found = ((dtype, batching.calls(whole.CONFIG, dtype)) for dtype in batching.DTYPES)
    return {f"{dtype}, {name}": call for dtype, calls in found for name, call in calls.items()}


BENCHMARKS: dict[str, Callable[[], Calls]] = {
    "train-b4": partial(whole.own_training, 4),
    "train-b8": partial(whole.own_training, 8),
    "prefill": partial(whole.own_prefill, 8),
    "decode-b1": partial(whole.own_decoding, 1),
    "decode-b8": partial(whole.own_decoding, 8),
    "cross-entropy": partial(own, pieces.cross_entropy),
    "experts": partial(own, pieces.experts),
    "attention": partial(own, pieces.attention),
    "engine": _engine,
}


def main() -> None:
    """Answers until standard input ends."""
    # What else is printed goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer(BENCHMARKS[sys.argv[1]](), sys.stdin, answers)


def answer(calls: Calls, lines: Iterable[str], answers: IO[str]) -> None:
    """Does what each line says, and says so."""
    for line in lines:
        name = line.strip()
        if name:
            calls[name]()
        print(*([] if name else calls), sep="\t", file=answers)


if __name__ == "__main__":
    main()
