"""Attention to a cache by XLA: a chunk of queries at a time, so that a long prompt's scores never exist at once, and,
but on a GPU, a block of slots at a time, so that no scores are made of slots that hold nothing. A GPU has a kernel for
what it can take, see `flash_decoding`.

How many blocks there are to see is known only when running. A block of finite values that a query sees nothing of
changes its result by no bit: what a text gives does not depend on how far others have come.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.model.backends.bits import numbers
from mixtral_jax.model.backends.chunked import scaled
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.backends.runs import Run, over, plan
from mixtral_jax.model.backends.softmax import Part, nothing, softmax, together
from mixtral_jax.sharding.mesh import platform

MOST_SCORES = 1 << 27
"""Of a chunk of queries on a device, half a GiB in float32; where there would be more, chunks are smaller."""
SLOTS_AT_ONCE = {"cpu": 256, "tpu": 1024}
"""By jax's name of the platform. On a GPU, by whichever name, it is all of them: before each block the host would be
asked whether there is another."""


class Seen(NamedTuple):
    """What queries see of a cache, whose slots are in no order."""

    visible_BTS: jax.Array
    """bool."""
    extent_B: jax.Array
    """int32: all that the queries of a text see is in so many slots, the first."""


def cached_attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    seen: Seen,
    chunk: int,
    product_dtype: str,
    shards: int = 1,
) -> jax.Array:
    """Attention to what is seen of a cache.

    Args:
      k_BKSH, v_BKSH: numbers, their bits, or int8 with scales.
      chunk: queries at a time, at most.
      shards: devices that the heads are split over.

    Returns:
      float32 [B, T, K, G, H].
    """
    batch, length, num_kv_heads, num_groups, _ = q_BTKGH.shape
    slots = seen.visible_BTS.shape[2]
    block = slots_at_once(slots, platform())
    chunk = queries_at_once(chunk, batch * num_kv_heads * num_groups * block // shards)

    def take(run: Run, start: jax.Array | int, rows_BTKGH: jax.Array) -> jax.Array:
        def own(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, run.queries, axis=1)

        own_seen = seen._replace(visible_BTS=own(seen.visible_BTS))
        mixed = _attend(own(rows_BTKGH), k_BKSH, v_BKSH, own_seen, block, product_dtype)
        return jax.lax.dynamic_update_slice_in_dim(rows_BTKGH, mixed, start, axis=1)

    # Results take the place of queries: an array of zeros for them, a compiler is free to make for all layers at once.
    return over(plan(length, slots, None, None, chunk), take, q_BTKGH.astype(jnp.float32))


def slots_at_once(slots: int, name: str) -> int:
    """How many of so many slots make a block on a platform of this name."""
    return min(slots, SLOTS_AT_ONCE.get(name, slots))


def queries_at_once(chunk: int, scores: int) -> int:
    """A chunk of queries over a cache, each with so many scores at a time on a device, of all texts and heads."""
    # A power of two, so that it divides a chunk of prefill.
    return min(chunk, 1 << max(1, MOST_SCORES // scores).bit_length() - 1)


def _attend(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    seen: Seen,
    block: int,
    product_dtype: str,
) -> jax.Array:
    """Softmax attention, a block of slots after another."""
    q_BKGTH = jnp.transpose(scaled(q_BTKGH), (0, 2, 3, 1, 4))
    everything, slots = (k_BKSH, v_BKSH, seen.visible_BTS), seen.visible_BTS.shape[2]

    def step(number: jax.Array, so_far: Part) -> Part:
        # The last block is as large as the others, and is not to see what was seen.
        begin = number * block
        start = jnp.minimum(begin, slots - block)
        k, v, seen_BTS = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=2), everything)
        seen_BTS &= (start + jnp.arange(block) >= begin)[None, None]
        return together(so_far, _part(q_BKGTH, k, v, seen_BTS, product_dtype))

    if block == slots:
        found = _part(q_BKGTH, *everything, product_dtype)
    else:
        blocks = -(-jnp.maximum(jnp.max(seen.extent_B), 1) // block)
        found = jax.lax.fori_loop(0, blocks, step, nothing(q_BKGTH))
    return jnp.transpose(found.attention(), (0, 3, 1, 2, 4))


def _part(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    visible_BTS: jax.Array,
    product_dtype: str,
) -> Part:
    """By products of one matrix a text and head: of other forms XLA:GPU makes some for which it lays the whole cache
    out anew."""
    q_BKMH = q_BKGTH.reshape(*q_BKGTH.shape[:2], -1, q_BKGTH.shape[-1])
    # Here, where they are a block: before the loop it would be done to the whole cache.
    k_BKSH, v_BKSH = jax.tree.map(numbers, (k_BKSH, v_BKSH))
    scores_BKMS = einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, dtype=product_dtype)
    scores_BKGTS = scores_BKMS.reshape(*q_BKGTH.shape[:-1], -1)
    weight_BKGTS, peak_BKGT, total_BKGT = softmax(scores_BKGTS, visible_BTS[:, None, None])
    mixed_BKMH = einsum("BKMS,BKSH->BKMH", weight_BKGTS.reshape(scores_BKMS.shape), v_BKSH, dtype=product_dtype)
    return Part(mixed_BKMH.reshape(q_BKGTH.shape), peak_BKGT, total_BKGT)
