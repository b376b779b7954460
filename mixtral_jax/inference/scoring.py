"""What each token of a text costs the model, without the logits of a whole text in memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.inference.compiling import program
from mixtral_jax.inference.decode import forward, unembed
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.cache import empty_cache, num_slots

_CHUNK = 128
"""Tokens whose logits are in memory at a time."""


class Scores(NamedTuple):
    """Of each token given those before it in its row; what is said of the first means nothing."""

    nats_BT: jax.Array
    """float32, minus the log-probability."""
    likeliest_BT: jax.Array
    """bool, whether greedy decoding would have chosen it."""


@program(static_argnames=("config", "execution"))
def score(
    weights: Prepared, tokens_BT: jax.Array, real_BT: jax.Array, *, config: ModelConfig, execution: Execution
) -> Scores:
    """The scores of every token.

    Args:
      tokens_BT: int32.
      real_BT: bool; each row's real tokens come first, the rest is padding.
      execution: with a `cache_dtype`, tokens see keys and values as such a cache would keep them.
    """
    batch, length = tokens_BT.shape
    kept = execution.cache_dtype
    cache = None if kept is None else empty_cache(config, batch, num_slots(config, length), kept)
    hidden_BTD, _ = forward(weights, tokens_BT, real_BT, cache, config, execution, fresh=True)
    chunk = min(_CHUNK, length)
    pad = -length % chunk
    next_BT = jnp.pad(jnp.roll(tokens_BT, -1, axis=1), ((0, 0), (0, pad)))
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))

    def of_chunk(start: jax.Array) -> Scores:
        part_BTD = jax.lax.dynamic_slice_in_dim(hidden_BTD, start, chunk, axis=1)
        token_BT = jax.lax.dynamic_slice_in_dim(next_BT, start, chunk, axis=1)
        logits_BTV = unembed(weights, part_BTD, execution)
        chosen_BT = jnp.take_along_axis(logits_BTV, token_BT[..., None], axis=-1)[..., 0]
        nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT
        return Scores(nats_BT, chosen_BT == jnp.max(logits_BTV, axis=-1))

    def in_a_row(parts: jax.Array) -> jax.Array:
        flat = jnp.moveaxis(parts, 0, 1).reshape(tokens_BT.shape[0], -1)
        return jnp.roll(flat[:, :length], 1, axis=1)

    return jax.tree.map(in_a_row, jax.lax.map(of_chunk, jnp.arange(0, length + pad, chunk)))
