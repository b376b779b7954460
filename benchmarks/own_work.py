"""What this project's benchmarks have it do, one call at a time for a parent that says which, which is `commits.py`.

python -m benchmarks.own_work NAME

Each line of standard input is a contender of that benchmark, and is answered by a line when its call is done; an empty
one by the names of all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import IO, Any

from mixtral_jax.cli.platform import reuse_memory

if __name__ == "__main__":
    reuse_memory()  # before anything allocates

import jax
import numpy as np
from flax import linen as nn

from benchmarks import batching, ours, pieces
from mixtral_jax.config import model_config
from mixtral_jax.model.transformer import init_params

Calls = dict[str, Callable[[], Any]]

CONFIG = model_config("tiny-mixtral")
FORMS = {"bfloat16 products": "bfloat16", "float32 products": "float32"}


def _model(batch: int, length: int) -> tuple[Any, np.ndarray]:
    params = nn.unbox(init_params(CONFIG, jax.random.key(0)))
    return params, np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, length), np.int32)


def _train(batch: int) -> Calls:
    work = _model(batch, 512)
    calls = {name: ours.train(CONFIG, *work, dtype) for name, dtype in FORMS.items()}
    return calls | {"bfloat16, dropless": ours.train(CONFIG, *work, "bfloat16", None)}


def _prefill() -> Calls:
    return {name: ours.prefill(CONFIG, *_model(8, 512), dtype) for name, dtype in FORMS.items()}


def _decode(batch: int) -> Calls:
    return {name: ours.decode(CONFIG, *_model(batch, 16), 64, dtype) for name, dtype in FORMS.items()}


def _cross_entropy() -> Calls:
    target_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, pieces.TRAINED, np.int32)
    drawn = pieces.draw(*pieces.TRAINED, CONFIG.dim), pieces.draw(CONFIG.dim, CONFIG.vocab_size) * CONFIG.dim**-0.5
    return pieces.cross_entropy_calls(*drawn, target_BT)


def _experts() -> Calls:
    params = nn.unbox(init_params(pieces.LAYER, jax.random.key(0)))
    trained = pieces.draw(*pieces.TRAINED, CONFIG.dim)
    calls = _named("training", pieces.trained_experts_calls(pieces.LAYER, params, trained, trained))
    for tokens in pieces.AT_A_TIME:
        x_XBTD = pieces.draw(pieces.SERVED // tokens, 1, tokens, CONFIG.dim)
        calls |= _named(f"{tokens} at a time", pieces.served_experts_calls(pieces.LAYER, params, x_XBTD))
    return calls


def _attention() -> Calls:
    calls: Calls = {}
    for length in pieces.LENGTHS:
        calls |= _named(f"T{length}", pieces.attention_calls(CONFIG, length, None))
    for length in pieces.LENGTHS[2:]:
        calls |= _named(f"T{length}, W{pieces.WINDOW}", pieces.attention_calls(CONFIG, length, pieces.WINDOW))
    return calls


def _named(what: str, calls: Calls) -> Calls:
    return {f"{what}: {name}": call for name, call in calls.items()}


BENCHMARKS: dict[str, Callable[[], Calls]] = {
    "train-b4": partial(_train, 4),
    "train-b8": partial(_train, 8),
    "prefill": _prefill,
    "decode-b1": partial(_decode, 1),
    "decode-b8": partial(_decode, 8),
    "cross-entropy": _cross_entropy,
    "experts": _experts,
    "attention": _attention,
    "engine": partial(batching.calls, CONFIG),
}


def main() -> None:
    """Answers until standard input ends."""
    # What else is printed goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer(BENCHMARKS[sys.argv[1]](), sys.stdin, answers)


def answer(calls: Calls, lines: Iterable[str], answers: IO[str]) -> None:
    """Does what each line says, and says so; calls that are peers' are left out."""
    calls = {name: call for name, call in calls.items() if not _is_a_peers(name)}
    for line in lines:
        name = line.strip()
        if name:
            calls[name]()
        print(*([] if name else calls), sep="\t", file=answers)


def _is_a_peers(name: str) -> bool:
    return any(peer in name for peer in ("torch", "transformers"))


if __name__ == "__main__":
    main()
