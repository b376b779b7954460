"""From logits to the next token. Pure functions of a batch of rows, each with its own random key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.errors import InputError

_OUT = -jnp.inf
WORD = 32
"""Tokens that a word of bits speaks of."""
EVERY_TOKEN = np.uint32(0xFFFFFFFF)
"""A word in which all of them are allowed."""
_BLOCK = 32
"""Logits that are compared together on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose a token; checked at construction. The filters apply in the order in which they stand here.

    Raises:
      InputError: a value out of bounds.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens seen before are divided by it where positive, else multiplied (Keskar et al., 2019)."""
    temperature: float = 0.0
    """0: the likeliest token, always."""
    top_k: int = 0
    """Only the k likeliest; 0: all."""
    top_p: float = 1.0
    """Only the likeliest that together reach probability p (Holtzman et al., 2020)."""
    min_p: float = 0.0
    """Only those at least this fraction as likely as the likeliest."""

    def __post_init__(self) -> None:
        bounds = {
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "a finite number above zero"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number, zero or more"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, zero (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
        }
        for key, (ok, allowed) in bounds.items():
            if not ok:
                raise InputError(key, getattr(self, key), allowed)

    @property
    def form(self) -> Form:
        """What has to be computed."""
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return Form(self.temperature == 0, filtered, self.repetition_penalty != 1)

    @property
    def values(self) -> Values:
        """The numbers, with dtypes: other numbers of the same form don't compile anew."""
        # Of numpy: each array of jax would be a transfer of its own.
        real: Any = np.float32
        whole: Any = np.int32
        return Values(
            repetition_penalty=real(self.repetition_penalty),
            temperature=real(self.temperature),
            top_p=real(self.top_p),
            min_p=real(self.min_p),
            top_k=whole(self.top_k),
        )


class Form(NamedTuple):
    """The static part of a SamplingConfig."""

    greedy: bool
    filtered: bool
    penalised: bool


class Values(NamedTuple):
    """The numbers of a SamplingConfig, float32 scalars and int32 top_k."""

    repetition_penalty: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array


def sample(logits_BV: jax.Array, key_B: jax.Array, seen_BV: jax.Array | None, form: Form, values: Values) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float32.
      key_B: a random key for each row.
      seen_BV: bool, the tokens of the text so far; needed where form.penalised.
    """
    if form.penalised:
        assert seen_BV is not None
        logits_BV = penalise(logits_BV, seen_BV, values.repetition_penalty)
    if form.greedy:
        return greedy(logits_BV)
    logits_BV = logits_BV / values.temperature
    if form.filtered:
        logits_BV = keep_likely(logits_BV, values)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def choose(
    logits_BV: jax.Array,
    key_B: jax.Array,
    seen_BV: jax.Array,
    values: Values,
    allowed_BW: jax.Array | None = None,
) -> jax.Array:
    """The next token of each row by its own numbers, int32 [B]; what `sample` gives for each by itself.

    Where all rows ask for the likeliest token and no more, nothing else is computed; where none is drawn, or no drawn
    one filtered, not what that takes.

    Args:
      logits_BV: float32.
      key_B: a random key for each row.
      seen_BV: bool, the tokens of the text so far.
      values: each [B, 1].
      allowed_BW: uint32, a bit for each token that may come; None: any may.
    """
    is_drawn_B1 = values.temperature > 0
    is_filtered_B1 = (values.top_k > 0) | (values.top_p < 1) | (values.min_p > 0)
    is_plain = ~jnp.any(is_drawn_B1) & jnp.all(values.repetition_penalty == 1)
    if allowed_BW is not None:
        is_plain &= jnp.all(allowed_BW == EVERY_TOKEN)

    def draw(logits_BV: jax.Array) -> jax.Array:
        warm_BV = logits_BV / jnp.where(is_drawn_B1, values.temperature, 1)
        # A row without filters keeps all: top_p = 1 would cut off what rounding leaves above a sum of 1.
        warm_BV = jax.lax.cond(
            jnp.any(is_drawn_B1 & is_filtered_B1),
            lambda x_BV: jnp.where(is_filtered_B1, keep_likely(x_BV, values), x_BV),
            lambda x_BV: x_BV,
            warm_BV,
        )
        drawn_B = jax.vmap(jax.random.categorical)(key_B, warm_BV).astype(jnp.int32)
        return jnp.where(is_drawn_B1[:, 0], drawn_B, greedy(logits_BV))

    def choose_by_values(logits_BV: jax.Array) -> jax.Array:
        if allowed_BW is not None:
            logits_BV = masked(logits_BV, allowed_BW)
        logits_BV = penalise(logits_BV, seen_BV, values.repetition_penalty)
        return jax.lax.cond(jnp.any(is_drawn_B1), draw, greedy, logits_BV)

    # One condition around all: XLA copies logits that come out of a branch, even those that went in.
    return jax.lax.cond(is_plain, greedy, choose_by_values, jax.lax.optimization_barrier(logits_BV))


def masked(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Logits with -inf for the tokens whose bit is not set."""
    bit_W = jnp.arange(WORD, dtype=jnp.uint32)
    allowed_BV = (allowed_BW[..., None] >> bit_W[None, None]) & 1
    allowed_BV = allowed_BV.reshape(allowed_BW.shape[0], -1)[:, : logits_BV.shape[1]]
    return jnp.where(allowed_BV == 1, logits_BV, _OUT)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest token, int32 [B]; ties go to the lowest id."""
    width = math.gcd(logits_BV.shape[-1], _BLOCK)
    token_B: jax.Array = jax.lax.platform_dependent(
        logits_BV, cpu=partial(_first_in_blocks, width), default=_first_best
    )
    return token_B


def _first_best(x_BV: jax.Array) -> jax.Array:
    """argmax, int32 [B]: as two plain reductions, since one that carries two values is not vectorised on CPU."""
    best_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    index_1V = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(x_BV == best_B1, index_1V, x_BV.shape[-1] - 1), axis=-1)


def _first_in_blocks(width: int, x_BV: jax.Array) -> jax.Array:
    """`_first_best` of each row's best block of so many: reads x once, which takes a quarter of the time."""
    x_BNW = x_BV.reshape(x_BV.shape[0], -1, width)
    # Without the barrier XLA takes the best of all from x itself again.
    block_B = _first_best(jax.lax.optimization_barrier(jnp.max(x_BNW, axis=-1)))
    best_BW = jnp.take_along_axis(x_BNW, block_B[:, None, None], axis=1)[:, 0]
    return block_B * width + _first_best(best_BW)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with those of seen tokens made less likely, for a penalty above 1."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def keep_likely(logits_BV: jax.Array, values: Values) -> jax.Array:
    """Logits with -inf for the tokens that top-k, top-p or min-p leave out; the likeliest always stays.

    top_p = 0.7 of probabilities 0.5, 0.3, 0.2 keeps two: a token stays while those before it have less than 0.7.
    """
    size = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_1V = jnp.arange(size)[None]
    count = jnp.where(values.top_k > 0, jnp.minimum(values.top_k, size), size)
    sorted_BV = jnp.where(rank_1V < count, sorted_BV, _OUT)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    stays_BV = (before_BV < values.top_p) & (rank_1V < count)
    stays_BV &= probability_BV >= values.min_p * probability_BV[:, :1]
    least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, _OUT)
