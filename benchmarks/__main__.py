"""`python -m benchmarks [NAME ...]`: the tiny Mixtral beside Hugging Face transformers, its pieces, and how cost grows.

Numbers are medians of interleaved repeats. All contenders share the process, its threads and its settings of the C
library's memory, but for `compile` and `memory`, where each has a fresh process, and for MaxText (--maxtext), whose
processes have the same settings and wait for their turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mixtral_jax.cli.platform import reuse_memory

reuse_memory()  # for all contenders alike, before any of them allocates

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from flax import linen as nn  # noqa: E402

from benchmarks import batching, growth, huggingface, maxtext, ours, overhead, pieces, processes, products, sparse  # noqa: E402
from benchmarks.timing import Row, interleave, rates, show  # noqa: E402
from mixtral_jax.config import model_config  # noqa: E402
from mixtral_jax.errors import InputError  # noqa: E402
from mixtral_jax.model.transformer import init_params  # noqa: E402

LENGTH = 512
NEW_TOKENS = 64
OURS = "ours, bfloat16 products"
THEIRS = {dtype: f"transformers, {dtype}" for dtype in ("float32", "bfloat16")}

CONFIG = model_config("tiny-mixtral")


def _setup(batch: int, length: int) -> tuple[Any, np.ndarray]:
    params = nn.unbox(init_params(CONFIG, jax.random.key(0)))
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, length), np.int32)
    return params, tokens_BT


def _train(batch: int, repeats: int, python: Path | None = None) -> list[Row]:
    params, tokens_BT = _setup(batch, LENGTH)
    contenders: dict[str, Callable[[], object]] = {
        OURS: ours.train(CONFIG, params, tokens_BT, "bfloat16"),
        "ours, bfloat16, dropless": ours.train(CONFIG, params, tokens_BT, "bfloat16", None),
        "ours, float32 products": ours.train(CONFIG, params, tokens_BT, "float32"),
    }
    contenders |= {name: huggingface.train(CONFIG, params, tokens_BT, dtype) for dtype, name in THEIRS.items()}
    with ExitStack() as peers:
        for dtype in maxtext.DTYPES if python else ():
            peer = maxtext.train(python, CONFIG, batch, LENGTH, dtype)
            contenders[f"MaxText, {dtype}"] = peers.enter_context(peer)
        seconds = interleave(contenders, repeats)
    return rates(f"train B{batch}", "tokens/s", tokens_BT.size, seconds, OURS)


def _prefill(batch: int, repeats: int) -> list[Row]:
    params, tokens_BT = _setup(batch, LENGTH)
    contenders: dict[str, Callable[[], object]] = {
        OURS: ours.prefill(CONFIG, params, tokens_BT, "bfloat16"),
        "ours, float32 products": ours.prefill(CONFIG, params, tokens_BT, "float32"),
    }
    contenders |= {name: huggingface.prefill(CONFIG, params, tokens_BT, dtype) for dtype, name in THEIRS.items()}
    return rates(f"prefill B{batch}", "tokens/s", tokens_BT.size, interleave(contenders, repeats), OURS)


def _decode(batch: int, repeats: int) -> list[Row]:
    params, tokens_BT = _setup(batch, 16)
    contenders: dict[str, Callable[[], object]] = {
        OURS: ours.decode(CONFIG, params, tokens_BT, NEW_TOKENS, "bfloat16"),
        "ours, float32 products": ours.decode(CONFIG, params, tokens_BT, NEW_TOKENS, "float32"),
    }
    contenders |= {
        name: huggingface.decode(CONFIG, params, tokens_BT, NEW_TOKENS, dtype) for dtype, name in THEIRS.items()
    }
    return rates(f"decode B{batch}", "tokens/s", batch * NEW_TOKENS, interleave(contenders, repeats), OURS)


WITH_MAXTEXT: dict[str, Callable[..., list[Row]]] = {
    "train-b4": partial(_train, 4),
    "train-b8": partial(_train, 8),
}
BENCHMARKS: dict[str, Callable[[int], list[Row]]] = {
    "prefill": lambda repeats: _prefill(8, repeats),
    "decode-b1": partial(_decode, 1),
    "decode-b8": partial(_decode, 8),
    **WITH_MAXTEXT,
    "cross-entropy": pieces.cross_entropy,
    "experts": pieces.experts,
    "attention": pieces.attention,
    "products": products.products,
    "window": growth.window,
    "engine": lambda repeats: batching.batching(CONFIG, repeats),
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
