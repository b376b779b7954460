"""Looks a model over: which release it is, and everything that is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np

from mixtral_jax import configs
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.config import ModelConfig, model_config
from mixtral_jax.errors import InputError

_ROPE_RATIO = 1.5
"""How much better the other pairing of rows has to fit before a rope layout is called wrong."""


def release(config: ModelConfig) -> str | None:
    """The shipped model that a config is, or None; positions don't count, since files often don't say them."""
    return next((name for name in configs.names("models") if not _differences(config, model_config(name))), None)


def _differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    names = [field.name for field in fields(one) if field.name != "max_position"]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def findings(source: Source) -> list[str]:
    """What is off, without reading weights: the tensors' names and shapes, the config, the tokenizer."""
    return [*source.problems(), *_of_config(source.config), *_of_tokenizer(source)]


def _of_config(config: ModelConfig) -> Iterator[str]:
    """A config that is one value away from a release is more likely wrong than new."""
    if release(config) is not None:
        return
    for name in configs.names("models"):
        other = model_config(name)
        if set(_differences(config, other)) in ({"rope_theta"}, {"sliding_window"}, {"vocab_size"}, {"norm_eps"}):
            (key,) = _differences(config, other)
            yield f"{key} is {getattr(config, key)}, and all else is {name}'s, whose {key} is {getattr(other, key)}"
    if config.sliding_window is not None and config.rope_theta >= 1e6:
        yield f"a window of {config.sliding_window} with rope_theta {config.rope_theta:g}: no release has both"


def _of_tokenizer(source: Source) -> Iterator[str]:
    try:
        tokenizer = source.tokenizer()
    except InputError as error:
        yield str(error)
        return
    vocab = source.config.vocab_size
    if tokenizer is None:
        yield "no tokenizer: only token ids can be generated from"
    elif tokenizer.vocab_size > vocab:
        yield f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {vocab}: ids from {vocab} on can't be used"
    elif tokenizer.vocab_size < vocab:
        yield f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {vocab}: some ids have no text"


def scan(source: Source, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What reading every weight shows: damage, values that are no numbers, and rows in another rope's order."""
    found, fits = [], []
    for number, tensor in enumerate(source.tensors):
        try:
            array = source.read(tensor)
        except InputError as error:
            found.append(str(error))
            continue
        wrong = array.size - int(np.isfinite(array).sum())
        if wrong:
            found.append(f"{tensor.name}: {wrong:,} of {array.size:,} values are NaN or infinite")
        elif tensor.kind in ("attention.query", "attention.key"):
            fits.append(rope_fit(array))
        elif tensor.kind.endswith("scale") and not array.any():
            found.append(f"{tensor.name}: all zero")
        progress(number + 1, len(source.tensors))
    # Queries and keys of random weights fit both ways alike; trained ones tell them apart.
    if fits and np.median(fits) > _ROPE_RATIO:
        why = f"fit the other order {np.median(fits):.1f} times better"
        found.append(f"rows of queries and keys don't lie as this format has them for rope; they {why}")
    return found


def rope_fit(weight_DNH: np.ndarray) -> float:
    """How much more alike neighbouring rows are than rows half a head apart, the pairs that our rope rotates together.

    The two rows of a pair share a frequency, and training gives them like norms: well under 1 in our order, above 1
    where the rows were interleaved.
    """
    norm_NH = np.log(np.sqrt(np.square(weight_DNH.astype(np.float32)).sum(axis=0)) + 1e-9)
    half = norm_NH.shape[-1] // 2
    ours = np.abs(norm_NH[:, :half] - norm_NH[:, half:]).mean()
    other = np.abs(norm_NH[:, 0::2] - norm_NH[:, 1::2]).mean()
    return float(ours / max(other, 1e-9))


def stored_dtypes(source: Source) -> dict[str, int]:
    """How many values are stored in each type."""
    counts: dict[str, int] = {}
    for tensor in source.tensors:
        code = source.stored_as(tensor)
        counts[code] = counts.get(code, 0) + math.prod(tensor.shape)
    return counts
