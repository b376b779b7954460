"""The tiny Mixtral whole beside transformers' and MaxText's: training steps, prefill and decoding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import huggingface, maxtext, ours
from benchmarks.pieces import OURS, Calls
from benchmarks.timing import Row, interleave, rates
from mixtral_jax.config import model_config

CONFIG = model_config("tiny-mixtral")
LENGTH = 512
PROMPT = 16
NEW_TOKENS = 64
_FORMS = {OURS: "bfloat16", "ours, float32 products": "float32"}


def train(batch: int, repeats: int, python: Path | None = None) -> list[Row]:
    """A step of so many rows; beside MaxText, if it is told by which Python."""
    calls = own_training(batch) | _theirs(huggingface.train, batch, LENGTH)
    with ExitStack() as peers:
        for dtype in maxtext.DTYPES if python else ():
            calls[f"MaxText, {dtype}"] = peers.enter_context(maxtext.train(python, CONFIG, batch, LENGTH, dtype))
        seconds = interleave(calls, repeats)
    return rates(f"train B{batch}", "tokens/s", batch * LENGTH, seconds, OURS)


def prefill(batch: int, repeats: int) -> list[Row]:
    """So many prompts taken in, to the last tokens' logits."""
    calls = own_prefill(batch) | _theirs(huggingface.prefill, batch, LENGTH)
    return rates(f"prefill B{batch}", "tokens/s", batch * LENGTH, interleave(calls, repeats), OURS)


def decode(batch: int, repeats: int) -> list[Row]:
    """So many short prompts continued."""
    calls = own_decoding(batch) | _theirs(partial(huggingface.decode, steps=NEW_TOKENS), batch, PROMPT)
    return rates(f"decode B{batch}", "tokens/s", batch * NEW_TOKENS, interleave(calls, repeats), OURS)


def own_training(batch: int) -> Calls:
    """This project's calls of `train`."""
    work = ours.draw(CONFIG, batch, LENGTH)
    calls = {name: ours.train(CONFIG, *work, dtype) for name, dtype in _FORMS.items()}
    return calls | {"ours, bfloat16, dropless": ours.train(CONFIG, *work, "bfloat16", None)}


def own_prefill(batch: int) -> Calls:
    """This project's calls of `prefill`."""
    work = ours.draw(CONFIG, batch, LENGTH)
    return {name: ours.prefill(CONFIG, *work, dtype) for name, dtype in _FORMS.items()}


def own_decoding(batch: int) -> Calls:
    """This project's calls of `decode`."""
    work = ours.draw(CONFIG, batch, PROMPT)
    return {name: ours.decode(CONFIG, *work, NEW_TOKENS, dtype) for name, dtype in _FORMS.items()}


def _theirs(work: Callable[..., Callable[[], object]], batch: int, length: int) -> Calls:
    """transformers' calls for the same weights and tokens."""
    drawn = ours.draw(CONFIG, batch, length)
    return {f"transformers, {dtype}": work(CONFIG, *drawn, dtype=dtype) for dtype in huggingface.DTYPES}
