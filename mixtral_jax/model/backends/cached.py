"""Attention to a cache, a chunk of queries at a time, so that a long prompt's scores never exist at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mixtral_jax.model.backends.chunked import Run, over, plan, scaled, softmax
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.quantized import Quantized

MOST_SCORES = 1 << 28
"""Of a chunk of queries on a device, 1 GiB in float32; where there would be more, chunks are smaller."""


def cached_attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    visible_BTS: jax.Array,
    chunk: int,
    product_dtype: str,
    shards: int = 1,
) -> jax.Array:
    """Attention to a cache, whose slots are in no order: the mask says who sees what.

    Args:
      chunk: queries at a time, at most.
      shards: devices that the heads are split over.

    Returns:
      float32 [B, T, K, G, H].
    """
    batch, length, num_kv_heads, num_groups, _ = q_BTKGH.shape
    slots = visible_BTS.shape[2]
    chunk = queries_at_once(chunk, batch * num_kv_heads * num_groups * slots // shards)

    def take(run: Run, start: jax.Array | int, rows_BTKGH: jax.Array) -> jax.Array:
        def own(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, run.queries, axis=1)

        mixed = _attend(own(rows_BTKGH), k_BKSH, v_BKSH, own(visible_BTS), product_dtype)
        return jax.lax.dynamic_update_slice_in_dim(rows_BTKGH, mixed, start, axis=1)

    # Results take the place of queries: an array of zeros for them, a compiler is free to make for all layers at once.
    return over(plan(length, slots, None, None, chunk), take, q_BTKGH.astype(jnp.float32))


def queries_at_once(chunk: int, scores: int) -> int:
    """A chunk of queries over a cache, each of which has so many scores on a device, over all texts and heads."""
    # A power of two, so that it divides a chunk of prefill.
    return min(chunk, 1 << max(1, MOST_SCORES // scores).bit_length() - 1)


def _attend(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    visible_BTS: jax.Array,
    product_dtype: str,
) -> jax.Array:
    """`chunked.attend` as products of one matrix a text and head: of other forms XLA:GPU makes some for which it lays
    the whole cache out anew."""
    batch, length, num_kv_heads, num_groups, head_dim = q_BTKGH.shape
    q_BKMH = jnp.transpose(scaled(q_BTKGH), (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, -1, head_dim)
    scores_BKMS = einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, dtype=product_dtype)
    scores_BKGTS = scores_BKMS.reshape(batch, num_kv_heads, num_groups, length, -1)
    weight_BKGTS, _, total_BKGT = softmax(scores_BKGTS, visible_BTS[:, None, None])
    mixed_BKMH = einsum("BKMS,BKSH->BKMH", weight_BKGTS.reshape(scores_BKMS.shape), v_BKSH, dtype=product_dtype)
    mixed_BKGTH = mixed_BKMH.reshape(*total_BKGT.shape, head_dim) / total_BKGT[..., None]
    return jnp.transpose(mixed_BKGTH, (0, 3, 1, 2, 4))
