"""The state of continuous batching on the device: a fixed number of slots, a text in each."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.inference.decode import laid_out, replicated
from mixtral_jax.inference.sampling import Values
from mixtral_jax.model.cache import Cache

MOST_STOP_IDS = 16
MOST_LOGPROBS = 20
"""Likeliest tokens that a text may ask for beside its own."""
NO_LOGPROBS = -1


class Settings(NamedTuple):
    """What a text was asked for with: scalars, or in the slots an array [B, ...]."""

    values: Values
    key: jax.Array
    """uint32 [2]; token n of the text is drawn with fold_in(key, n)."""
    limit: jax.Array
    """int32, new tokens at most."""
    stop_X: jax.Array
    """int32, tokens that end the text, -1 where there are fewer."""
    logprobs: jax.Array
    """int32, how many likely tokens are wanted beside each; NO_LOGPROBS: not even its own probability."""


class Slots(NamedTuple):
    """The texts under way, a row each."""

    caches: tuple[Cache, ...]
    """The model's, and its draft model's if it has one."""
    settings: Settings
    token_B: jax.Array
    """int32, the prompt's last or chosen last; not yet in the caches."""
    count_B: jax.Array
    """int32, new tokens so far."""
    active_B: jax.Array
    """bool: the text is being continued."""
    seen_BV: jax.Array
    """bool, tokens of the text so far."""
    history_BN: jax.Array
    """int32, the text so far, prompt and all, -1 after its end."""


class Chosen(NamedTuple):
    """New tokens, [B, M]; beyond count_B they mean nothing."""

    token_BM: jax.Array
    logprob_BM: jax.Array
    """float32, of the model's own distribution, before temperature and filters; 0 where it was not asked for."""
    top_BMA: jax.Array
    """int32, the likeliest tokens there, the likeliest first."""
    top_logprob_BMA: jax.Array
    count_B: jax.Array
    """int32."""
    proposed: jax.Array
    """int32, how many tokens were proposed, and how many of those were right."""
    accepted: jax.Array


class Model(NamedTuple):
    """What the programs are made for."""

    config: ModelConfig
    execution: Execution


def empty_settings(batch: int) -> Settings:
    """Of slots that hold nothing."""
    f32, i32 = partial(jnp.full, (batch,), dtype=jnp.float32), partial(jnp.full, (batch,), dtype=jnp.int32)
    values = Values(repetition_penalty=f32(1), temperature=f32(0), top_p=f32(1), min_p=f32(0), top_k=i32(0))
    stop_BX = jnp.full((batch, MOST_STOP_IDS), -1, jnp.int32)
    return Settings(values, jnp.zeros((batch, 2), jnp.uint32), i32(0), stop_BX, i32(NO_LOGPROBS))


def keys(key_B2: jax.Array, count_B: jax.Array) -> jax.Array:
    """A random key for token number `count` of each text."""
    return jax.vmap(lambda key, count: jax.random.fold_in(jax.random.wrap_key_data(key), count))(key_B2, count_B)


def active_values(slots: Slots) -> Values:
    """The active texts' values, each [B, 1]; a text that has ended asks for nothing any more."""

    def column(own_B: jax.Array, neutral_B: jax.Array) -> jax.Array:
        return jnp.where(slots.active_B, own_B, neutral_B)[:, None]

    return jax.tree.map(column, slots.settings.values, empty_settings(slots.active_B.shape[0]).values)


def pinned(slots: Slots) -> Slots:
    """The slots laid out as programs take them and leave them; see `laid_out`."""
    return Slots(tuple(map(laid_out, slots.caches)), *replicated(slots[1:]))
