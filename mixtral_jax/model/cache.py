"""The rolling key-value cache: a ring of R slots a layer, each with the absolute position that it holds.

Position p lies in slot p mod R. With R = 4, after six tokens:

    slot        0  1  2  3
    position    4  5  2  3

R = W + D - 1 slots serve D tokens written at once before they attend: the oldest of them sees W - 1 positions back, and
those are still there. The bytes don't depend on how long the text is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.masks import visible

EMPTY = -1


class LayerCache(NamedTuple):
    """One layer's keys and values, in the activation dtype."""

    k_BRKH: jax.Array
    v_BRKH: jax.Array


class Cache(NamedTuple):
    """The state of a batch of texts; each row has its own positions."""

    layers: tuple[LayerCache, ...]
    position_BR: jax.Array
    """int32, what each slot holds, the same for all layers; -1 where it is empty."""
    length_B: jax.Array
    """int32, the next token's position."""

    @property
    def num_slots(self) -> int:
        """R."""
        return self.position_BR.shape[1]


@partial(jax.tree_util.register_dataclass, data_fields=("slot_BT", "visible_BTS"), meta_fields=("chunk_is_apart",))
@dataclass(frozen=True)
class View:
    """Where a chunk's tokens go and what they see, the same for all layers."""

    slot_BT: jax.Array
    """int32; R for a token that is not stored."""
    visible_BTS: jax.Array | None
    """bool over the ring, or over the ring and then the chunk; None where the ring was empty: the chunk sees itself."""
    chunk_is_apart: bool
    """Whether to attend to the ring as it was and the chunk beside it, and to store the chunk afterwards."""


def num_slots(config: ModelConfig, max_length: int, written_at_once: int = 1) -> int:
    """R for texts of up to max_length tokens, of which up to written_at_once are stored before they attend."""
    if config.sliding_window is None:
        return max_length
    return min(config.sliding_window + written_at_once - 1, max_length)


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: str) -> Cache:
    """A cache that holds nothing."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
    return Cache(layers, jnp.full((batch, slots), EMPTY, jnp.int32), jnp.zeros((batch,), jnp.int32))


def view(cache: Cache, real_BT: jax.Array, window: int | None, fresh: bool = False) -> tuple[View, Cache, jax.Array]:
    """Finds places for a chunk of tokens, the real ones at the front of each row.

    Args:
      real_BT: bool; padding is stored nowhere and seen by nobody.
      fresh: whether the cache is known to be empty, which spares looking at it.

    Returns:
      The view; the cache with its positions and lengths moved on (its layers are for each layer to replace); and
      int32 [B, T], the tokens' positions, -1 for padding.
    """
    slots, chunk = cache.num_slots, real_BT.shape[1]
    count_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
    position_BT = jnp.where(real_BT, cache.length_B[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None], EMPTY)
    length_B = cache.length_B + count_B
    # Of tokens that share a slot the last one stays, so the earlier are not written at all.
    stays_BT = real_BT & (position_BT >= length_B[:, None] - slots)
    slot_BT = jnp.where(stays_BT, position_BT % slots, slots)
    row_B1 = jnp.arange(real_BT.shape[0])[:, None]
    position_BR = cache.position_BR.at[row_B1, slot_BT].set(position_BT, mode="drop")
    if fresh:
        return View(slot_BT, None, False), Cache(cache.layers, position_BR, length_B), position_BT
    # Without a window the ring is as long as the text, so nothing that is still seen is overwritten.
    apart = window is not None and chunk > 1 and window + chunk - 1 > slots
    seen_BS = jnp.concatenate([cache.position_BR, position_BT], axis=1) if apart else position_BR
    seen_BTS = visible(position_BT, seen_BS, window)
    return View(slot_BT, seen_BTS, apart), Cache(cache.layers, position_BR, length_B), position_BT


def store(layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, slot_BT: jax.Array) -> LayerCache:
    """The layer's cache with the chunk's keys and values in their slots."""
    row_B1 = jnp.arange(slot_BT.shape[0])[:, None]
    return LayerCache(
        layer.k_BRKH.at[row_B1, slot_BT].set(k_BTKH.astype(layer.k_BRKH.dtype), mode="drop"),
        layer.v_BRKH.at[row_B1, slot_BT].set(v_BTKH.astype(layer.v_BRKH.dtype), mode="drop"),
    )


def advance(
    layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, view: View
) -> tuple[LayerCache, jax.Array, jax.Array]:
    """Stores a chunk, and gives the keys and values [B, S, K, H] that `view.visible_BTS` speaks of."""
    stored = store(layer, k_BTKH, v_BTKH, view.slot_BT)
    if view.visible_BTS is None:
        return stored, k_BTKH, v_BTKH
    if not view.chunk_is_apart:
        return stored, stored.k_BRKH, stored.v_BRKH
    # Storing first would lose the keys that the chunk's early tokens still see.
    keys = jnp.concatenate([layer.k_BRKH, k_BTKH.astype(layer.k_BRKH.dtype)], axis=1)
    values = jnp.concatenate([layer.v_BRKH, v_BTKH.astype(layer.v_BRKH.dtype)], axis=1)
    return stored, keys, values
