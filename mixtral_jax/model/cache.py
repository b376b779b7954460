"""The rolling key-value cache: a ring of R slots a layer, each with the absolute position that it holds.

Position p lies in slot p mod R. With R = 4, after six tokens:

    slot        0  1  2  3
    position    4  5  2  3

R = W + D - 1 slots serve D tokens written at once before they attend: the oldest of them sees W - 1 positions back, and
those are still there. The bytes don't depend on how long the text is.

A head's slots lie together, [B, K, R, H], as attention reads them: laid out by tokens, compilers for GPUs make another
cache by heads before a loop over tokens, and copy it back after.

On a CPU numbers in bfloat16 are kept as their bits, see `backends.bits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.backends.bits import BITS, bits, numbers
from mixtral_jax.model.backends.cached import Seen
from mixtral_jax.model.backends.quantized import Quantized, in_int8
from mixtral_jax.model.masks import visible
from mixtral_jax.sharding.mesh import platform

EMPTY = -1


class LayerCache(NamedTuple):
    """One layer's keys and values, in a float dtype, its bits, or int8 with scales: each leaf is [B, K, R, H or 1]."""

    k_BKRH: jax.Array | Quantized
    v_BKRH: jax.Array | Quantized


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


@partial(jax.tree_util.register_dataclass, data_fields=("slot_BT", "seen", "row_B"), meta_fields=("chunk_is_apart",))
@dataclass(frozen=True)
class View:
    """Where a chunk's tokens go and what they see, the same for all layers."""

    slot_BT: jax.Array
    """int32; R for a token that is not stored."""
    seen: Seen | None
    """Of the ring, or of the chunk and then the ring; None where the ring was empty: the chunk sees itself."""
    chunk_is_apart: bool
    """Whether to attend to the ring as it was and the chunk beside it, and to store the chunk afterwards."""
    row_B: jax.Array | None = None
    """int32, the cache's row of each of the chunk's; None: they are the same."""


def num_slots(config: ModelConfig, max_length: int, written_at_once: int = 1) -> int:
    """R for texts of up to max_length tokens, of which up to written_at_once are stored before they attend."""
    if config.sliding_window is None:
        return max_length
    return min(config.sliding_window + written_at_once - 1, max_length)


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: str) -> Cache:
    """A cache that holds nothing, for the platform compiled for; in int8 with a scale for each token and head."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    as_bits = dtype == "bfloat16" and platform() == "cpu"

    def empty() -> jax.Array | Quantized:
        whole = jnp.zeros(shape, BITS if as_bits else dtype)
        return Quantized(whole, jnp.zeros((*shape[:-1], 1), jnp.float32)) if dtype == "int8" else whole

    layers = tuple(LayerCache(empty(), empty()) for _ in range(config.num_layers))
    return Cache(layers, jnp.full((batch, slots), EMPTY, jnp.int32), jnp.zeros((batch,), jnp.int32))


def view(
    cache: Cache, real_BT: jax.Array, window: int | None, fresh: bool = False, row_B: jax.Array | None = None
) -> tuple[View, Cache, jax.Array]:
    """Finds places for a chunk of tokens, the real ones at the front of each row.

    Args:
      real_BT: bool; padding is stored nowhere and seen by nobody.
      fresh: whether the texts begin here, which spares looking at the cache; what the rows held is forgotten.
      row_B: int32, the cache's row of each of the chunk's, no row twice; one beyond the last stands for none. None: the
        chunk has all rows.

    Returns:
      The view; the cache with its positions and lengths moved on (its layers are for each layer to replace); and
      int32 [B, T], the tokens' positions, -1 for padding.
    """
    slots, chunk = cache.num_slots, real_BT.shape[1]
    before_BR, start_B = (_rows(each, row_B) for each in (cache.position_BR, cache.length_B))
    if fresh:
        before_BR, start_B = jnp.full_like(before_BR, EMPTY), jnp.zeros_like(start_B)
    count_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
    position_BT = jnp.where(real_BT, start_B[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None], EMPTY)
    end_B = start_B + count_B
    # Of tokens that share a slot the last one stays, so the earlier are not written at all.
    stays_BT = real_BT & (position_BT >= end_B[:, None] - slots)
    slot_BT = jnp.where(stays_BT, position_BT % slots, slots)
    row_B1 = jnp.arange(real_BT.shape[0])[:, None]
    after_BR = before_BR.at[row_B1, slot_BT].set(position_BT, mode="drop")
    if row_B is None:
        after = Cache(cache.layers, after_BR, end_B)
    else:
        position_BR = cache.position_BR.at[row_B].set(after_BR, mode="drop")
        after = Cache(cache.layers, position_BR, cache.length_B.at[row_B].set(end_B, mode="drop"))
    if fresh:
        return View(slot_BT, None, False, row_B), after, position_BT
    # Without a window the ring is as long as the text, so nothing that is still seen is overwritten.
    apart = window is not None and chunk > 1 and window + chunk - 1 > slots
    position_BS = jnp.concatenate([position_BT, before_BR], axis=1) if apart else after_BR
    # Slots are filled from the first on. Rows that take nothing in are not looked at, such as of texts that have ended.
    filled_B = jnp.minimum(start_B, slots) + chunk if apart else jnp.minimum(end_B, slots)
    seen = Seen(visible(position_BT, position_BS, window), jnp.where(count_B > 0, filled_B, 0))
    return View(slot_BT, seen, apart, row_B), after, position_BT


def _rows(array: jax.Array, row_B: jax.Array | None) -> jax.Array:
    return array if row_B is None else array.at[row_B].get(mode="clip")


def rewind(cache: Cache, length_B: jax.Array) -> Cache:
    """The cache as if each row had ended at a length, no more than D - 1 tokens back; see `num_slots`.

    What is forgotten has overwritten only what no later token sees. With W = 3, R = 4 and so D = 2: after token 5 the
    ring holds 2..5; token 4, once 5 is forgotten, goes on to see 3 and 4, and so does its successor.
    """
    stays_BR = cache.position_BR < length_B[:, None]
    return Cache(cache.layers, jnp.where(stays_BR, cache.position_BR, EMPTY), length_B)


def store(layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, slot_BT: jax.Array) -> LayerCache:
    """The layer's cache with the chunk's keys and values in their slots."""
    return _write(layer, _in_form(layer, k_BTKH, v_BTKH), View(slot_BT, None, False))


class _Chunk(NamedTuple):
    """A chunk's keys and values in the cache's form, as they come: every leaf is [B, T, K, H or 1]."""

    k_BTKH: jax.Array | Quantized
    v_BTKH: jax.Array | Quantized


def _in_form(layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array) -> _Chunk:
    if isinstance(layer.k_BKRH, Quantized):
        return _Chunk(in_int8(k_BTKH), in_int8(v_BTKH))
    if layer.k_BKRH.dtype == BITS:
        return _Chunk(bits(k_BTKH), bits(v_BTKH))
    return _Chunk(k_BTKH.astype(layer.k_BKRH.dtype), v_BTKH.astype(layer.k_BKRH.dtype))


def _write(layer: LayerCache, chunk: _Chunk, view: View) -> LayerCache:
    row_B = jnp.arange(view.slot_BT.shape[0]) if view.row_B is None else view.row_B

    def write(ring: jax.Array, new: jax.Array) -> jax.Array:
        if ring.shape[-1] == 1 and view.row_B is None:
            return _select(ring, new, view.slot_BT)
        # Told of whole tokens, compilers for TPUs lay the ring out by them, in a second one.
        head_K = jnp.arange(ring.shape[1])
        return ring.at[row_B[:, None, None], head_K, view.slot_BT[..., None]].set(new, mode="drop")

    return LayerCache(*(jax.tree.map(write, ring, new) for ring, new in zip(layer, chunk, strict=True)))


def _select(ring_BKR1: jax.Array, new_BTK1: jax.Array, slot_BT: jax.Array) -> jax.Array:
    """Writes scales without a scatter, for which TPUs lay each out in a row of 128, at twice the memory of prefill."""
    batch, _, slots, _ = ring_BKR1.shape
    chunk = slot_BT.shape[1]
    new_BKT1 = jnp.swapaxes(new_BTK1, 1, 2)
    if chunk == 1:
        hit_BR, picked = slot_BT == jnp.arange(slots)[None], new_BKT1
    else:
        empty_BR = jnp.full((batch, slots), -1)
        at_BR = empty_BR.at[jnp.arange(batch)[:, None], slot_BT].set(jnp.arange(chunk)[None], mode="drop")
        hit_BR = at_BR >= 0
        picked = jnp.take_along_axis(new_BKT1, jnp.maximum(at_BR, 0)[:, None, :, None], axis=2)
    # Fused into the product that reads them, they have made the compiler run out of its scratch memory.
    return jax.lax.optimization_barrier(jnp.where(hit_BR[:, None, :, None], picked, ring_BKR1))


def advance(layer: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, view: View) -> tuple[LayerCache, Any, Any]:
    """Stores a chunk, and gives the keys and values that `view.seen` speaks of.

    Where the ring was empty, these are the chunk's own, arrays [B, T, K, H]; else they are in the cache's form,
    [B, K, S, H]. Either way a token sees keys and values as they are kept, its own too, so that it makes no difference
    how a text was divided into chunks.
    """
    chunk = _in_form(layer, k_BTKH, v_BTKH)
    stored = _write(layer, chunk, view)
    if view.seen is None:
        return stored, _as_array(chunk.k_BTKH, k_BTKH.dtype), _as_array(chunk.v_BTKH, v_BTKH.dtype)
    if not view.chunk_is_apart:
        return stored, *jax.tree.map(lambda ring: _rows(ring, view.row_B), stored)

    def before(ring: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.swapaxes(new, 1, 2), _rows(ring, view.row_B)], axis=2)

    # Storing first would lose the keys that the chunk's early tokens still see.
    keys, values = (jax.tree.map(before, ring, new) for ring, new in zip(layer, chunk, strict=True))
    return stored, keys, values


def _as_array(kept: jax.Array | Quantized, dtype: DTypeLike) -> jax.Array:
    return kept.dequantized(dtype) if isinstance(kept, Quantized) else numbers(kept).astype(dtype)
