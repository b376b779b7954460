"""What an engine is asked for, and what it answers: token ids, never text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.inference.sampling import SamplingConfig, Values
from mixtral_jax.inference.slots import MOST_LOGPROBS, MOST_STOP_IDS, NO_LOGPROBS, Settings

GREEDY = SamplingConfig()
_DEFAULT_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's fixed shapes; checked at construction.

    Raises:
      InputError: a value out of bounds.
    """

    slots: int = 8
    """Texts that are continued at a time; others wait."""
    max_length: int | None = None
    """Tokens of a prompt and its continuation together; None: 4096, or the model's positions where there are fewer."""
    prefill_chunk: int = 256
    """Tokens of prompts that are taken in between two decode steps, and so the most that a text waits for another."""
    prefix_blocks: int = 32
    """Blocks of prefill_chunk tokens that are kept of prompts, for others that begin alike; 0: none."""
    speculation: Literal["lookup", "draft"] | None = None
    """Where guesses of the next tokens come from: what followed in the text itself, or a draft model."""
    speculated_tokens: int = 4
    """Guesses a step."""

    def __post_init__(self) -> None:
        for key in ("slots", "max_length", "prefill_chunk", "speculated_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(key, value, "one or more")
        if self.prefix_blocks < 0:
            raise InputError("prefix_blocks", self.prefix_blocks, "zero (none) or more")
        if self.speculation not in (None, "lookup", "draft"):
            raise InputError("speculation", self.speculation, "'lookup', 'draft' or None")

    def length(self, model: ModelConfig) -> int:
        """max_length for a model. Raises InputError if the model has fewer positions."""
        if self.max_length is None:
            return min(_DEFAULT_LENGTH, model.max_position)
        if self.max_length > model.max_position:
            raise InputError("max_length", self.max_length, f"at most the model's {model.max_position} positions")
        return self.max_length

    @property
    def guesses(self) -> int:
        """D, tokens guessed a step."""
        return 0 if self.speculation is None else self.speculated_tokens


class Constraint(Protocol):
    """What a text may say: one object a text, asked before each token and told of it afterwards."""

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit v % 32 of word v // 32 says that token v may come next; at least one may."""
        ...

    def accept(self, token: int) -> None:
        """The token was chosen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue; checked by `Engine.check`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig = GREEDY
    seed: int = 0
    """From 0 to 2 ** 64 - 1; below 2 ** 32 it draws what `generate` draws."""
    index: int = 0
    """Which of several texts that are drawn from one prompt and seed; the row's number in `generate`."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; they are part of it."""
    logprobs: int | None = None
    """None: none; n: the logarithm of each token's probability, and the n likeliest tokens' beside it."""
    constraint: Constraint | None = None


class Token(NamedTuple):
    """A new token."""

    id: int
    logprob: float | None
    """By the model's own distribution, before temperature, filters and constraint; None where it was not asked for."""
    alternatives: tuple[tuple[int, float], ...]
    """The likeliest tokens at this place and their logprobs, the likeliest first."""


class Update(NamedTuple):
    """What is new of one text."""

    ticket: int
    tokens: tuple[Token, ...]
    ended: Literal["stop", "length", "cancelled"] | None


class Counts(NamedTuple):
    """What an engine has done since it was made."""

    prompt_tokens: int = 0
    """Of prompts that were admitted."""
    cached_tokens: int = 0
    """Of these, found in blocks that others left."""
    new_tokens: int = 0
    finished: int = 0
    """Texts that ended by themselves."""
    cancelled: int = 0
    decode_calls: int = 0
    proposed: int = 0
    """Tokens guessed, and how many of them were right."""
    accepted: int = 0


def check(request: Request, model: ModelConfig, max_length: int) -> None:
    """Raises InputError for what the engine can't do, naming the field."""
    if not request.prompt:
        raise InputError("prompt", [], "at least one token is needed")
    wrong = next((token for token in request.prompt if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        raise InputError("prompt", wrong, f"token ids go from 0 to {model.vocab_size - 1}")
    if request.max_new_tokens < 1:
        raise InputError("max_new_tokens", request.max_new_tokens, "one or more")
    total = len(request.prompt) + request.max_new_tokens
    if total > max_length:
        raise InputError("prompt", len(request.prompt), f"tokens, with max_new_tokens {total}: over {max_length}")
    bounds: Mapping[str, tuple[int, int]] = {
        "seed": (0, 2**64 - 1),
        "index": (0, 2**32 - 1),
        "logprobs": (0, MOST_LOGPROBS),
    }
    for key, (least, most) in bounds.items():
        value = getattr(request, key)
        if value is not None and not least <= value <= most:
            raise InputError(key, value, f"from {least} to {most}")
    if len(request.stop_ids) > MOST_STOP_IDS:
        raise InputError("stop_ids", len(request.stop_ids), f"at most {MOST_STOP_IDS}")


def settings(request: Request) -> Settings:
    """A request's numbers as the programs take them, numpy scalars and arrays.

    The key is that of jax.random.key(seed) for seeds of 32 bits; `begin` folds the index in.
    """
    own = request.sampling
    stop_X = np.full((MOST_STOP_IDS,), -1, np.int32)
    stop_X[: len(request.stop_ids)] = request.stop_ids
    values: dict[str, Any] = {
        "repetition_penalty": np.float32(own.repetition_penalty),
        "temperature": np.float32(own.temperature),
        "top_p": np.float32(own.top_p),
        "min_p": np.float32(own.min_p),
        "top_k": np.int32(own.top_k),
    }
    others: dict[str, Any] = {
        "key": np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32),
        "limit": np.int32(request.max_new_tokens),
        "stop_X": stop_X,
        "logprobs": np.int32(NO_LOGPROBS if request.logprobs is None else request.logprobs),
    }
    return Settings(values=Values(**values), **others)
