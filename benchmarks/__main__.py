"""`python -m benchmarks [NAME ...]`: the tiny Mixtral beside Hugging Face transformers, its pieces, and how cost grows.

Numbers are medians of interleaved repeats. All contenders share the process, its threads and its settings of the C
library's memory, but for `compile` and `memory`, where each has a fresh process, and for MaxText (--maxtext), whose
processes have the same settings and wait for their turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mixtral_jax.cli.platform import reuse_memory

reuse_memory()  # for all contenders alike, before any of them allocates

import torch  # noqa: E402

from benchmarks import batching, growth, maxtext, overhead, pieces, processes, products, sparse, whole  # noqa: E402
from benchmarks.timing import Row, show  # noqa: E402
from mixtral_jax.errors import InputError  # noqa: E402

WITH_MAXTEXT: dict[str, Callable[..., list[Row]]] = {
    "train-b4": partial(whole.train, 4),
    "train-b8": partial(whole.train, 8),
}
BENCHMARKS: dict[str, Callable[[int], list[Row]]] = {
    "prefill": partial(whole.prefill, 8),
    "decode-b1": partial(whole.decode, 1),
    "decode-b8": partial(whole.decode, 8),
    **WITH_MAXTEXT,
    "cross-entropy": partial(pieces.timed, pieces.cross_entropy),
    "experts": partial(pieces.timed, pieces.experts),
    "attention": partial(pieces.timed, pieces.attention),
    "products": products.products,
    "window": growth.window,
    "engine": lambda repeats: batching.batching(whole.CONFIG, repeats),
    "overhead": overhead.overhead,
    "sparse": sparse.decode,
    "sparse-switch": sparse.switch,
    "compile": processes.compiling,
    "memory": processes.memory,
}


def main() -> None:
    """Runs the benchmarks named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument(
        "--maxtext", type=Path, metavar="ENVIRONMENT", help="add MaxText, which `make maxtext` installs"
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    benchmarks = dict(BENCHMARKS)
    if arguments.maxtext:
        try:
            python = maxtext.python_of(arguments.maxtext)
        except InputError as error:
            parser.error(str(error))
        benchmarks |= {name: partial(run, python=python) for name, run in WITH_MAXTEXT.items()}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = [row for name in arguments.names or benchmarks for row in benchmarks[name](arguments.repeats)]
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
