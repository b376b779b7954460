"""Beginnings that prompts share: kept in blocks, and copied into a slot's ring when they are met again.

A block holds C tokens in a row, as the prefill of one prompt left them. What a token's keys are depends on all before
it, so a block's name is made of the whole text up to its end. A ring of R slots needs the blocks of R positions alone:
with a window the older ones may be long gone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.inference.decode import CACHE_AXES
from mixtral_jax.inference.slots import Slots, pinned
from mixtral_jax.model.cache import EMPTY, Cache, LayerCache
from mixtral_jax.sharding.partition import constrain
from mixtral_jax.sharding.rules import DECODING

Pool = tuple[tuple[LayerCache, ...], ...]
"""Of each model and layer, arrays [P, K, C, ...]: P blocks."""


class Prefixes:
    """Which block holds what; the block that was not used for longest makes room."""

    def __init__(self, num_blocks: int, block: int, slots: int):
        """For blocks of so many tokens, of which a ring of so many slots takes the last."""
        self._block, self._slots = block, slots
        self._free = list(range(num_blocks))
        self._held: OrderedDict[bytes, int] = OrderedDict()

    def names(self, prompt: Sequence[int]) -> list[bytes]:
        """The names of a prompt's whole blocks."""
        names, name = [], b""
        for start in range(0, len(prompt) - self._block + 1, self._block):
            tokens = np.asarray(prompt[start : start + self._block], np.int32).tobytes()
            name = hashlib.sha256(name + tokens).digest()
            names.append(name)
        return names

    def find(self, names: Sequence[bytes], least: int) -> dict[int, int]:
        """The blocks for the longest beginning of more than `least` blocks, by their place in the text; {} if none."""
        for count in range(len(names), least, -1):
            first = max(0, count * self._block - self._slots) // self._block
            wanted = names[first:count]
            if all(name in self._held for name in wanted):
                for name in wanted:
                    self._held.move_to_end(name)
                return {first + index: self._held[name] for index, name in enumerate(wanted)}
        return {}

    def take(self, name: bytes) -> int | None:
        """A block to save into; None where the name is held already, or there are no blocks."""
        if name in self._held:
            return None
        if self._free:
            self._held[name] = self._free.pop()
        elif self._held:
            _, block = self._held.popitem(last=False)
            self._held[name] = block
        else:
            return None
        return self._held[name]


@partial(jax.jit, static_argnames=("num_blocks", "block"))
def empty_pool(caches: tuple[Cache, ...], num_blocks: int, block: int) -> Pool:
    """Blocks for what these caches hold, laid out as `save` leaves them."""

    def blocks(ring: jax.Array) -> jax.Array:
        _, heads, _, head_dim = ring.shape
        return constrain(jnp.zeros((num_blocks, heads, block, head_dim), ring.dtype), CACHE_AXES, DECODING)

    return tuple(jax.tree.map(blocks, cache.layers) for cache in caches)


@partial(jax.jit, donate_argnames=("pool",))
def save(pool: Pool, slots: Slots, row: jax.Array, start: jax.Array, block: jax.Array) -> Pool:
    """Copies the positions start..start + C of a row, just taken in, into a block.

    Where the ring is shorter than a block it holds the last R of them; those before are not read again.
    """

    def copy(kept: jax.Array, ring: jax.Array) -> jax.Array:
        slot_C = (start + jnp.arange(kept.shape[2])) % ring.shape[2]
        return constrain(kept.at[block].set(ring[row][:, slot_C]), CACHE_AXES, DECODING)

    return tuple(jax.tree.map(copy, own, cache.layers) for own, cache in zip(pool, slots.caches, strict=True))


@partial(jax.jit, donate_argnames=("slots",))
def restore(pool: Pool, slots: Slots, row: jax.Array, block_X: jax.Array, length: jax.Array) -> Slots:
    """A row that holds the beginning of a text, and nothing else.

    Args:
      block_X: int32, the block of each C tokens of the text; those that the ring has no room for mean nothing.
      length: int32, tokens in the beginning; a multiple of C.
    """
    caches = []
    for own, cache in zip(pool, slots.caches, strict=True):
        size, block = cache.num_slots, jax.tree.leaves(own)[0].shape[2]
        # Slot s holds the last position p < length with p mod R = s: for R = 4 and length 6, 4 5 2 3.
        position_R = length - 1 - (length - 1 - jnp.arange(size)) % size
        index_R = jnp.maximum(position_R, 0)

        def copy(ring: jax.Array, kept: jax.Array, index_R: jax.Array = index_R, block: int = block) -> jax.Array:
            held_RKH = kept[block_X[index_R // block], :, index_R % block]
            return ring.at[row].set(jnp.swapaxes(held_RKH, 0, 1))

        layers = jax.tree.map(copy, cache.layers, own)
        position_R = jnp.where(position_R >= 0, position_R, EMPTY)
        caches.append(Cache(layers, cache.position_BR.at[row].set(position_R), cache.length_B.at[row].set(length)))
    return pinned(slots._replace(caches=tuple(caches)))
