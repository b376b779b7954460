"""Attention for XLA, a chunk of queries at a time, so that T x T scores never exist.

A chunk of c queries needs c + W - 1 keys at most. Few chunks are unrolled, each with just the keys that it sees (for a
causal mask without a window that saves half the work); many are scanned, each over as many keys as the widest needs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.masks import visible

_MOST_UNROLLED = 16
_MASKED = -1e30  # finite: a row that sees nothing yields the mean of the values, not NaN


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, product_dtype: str
) -> jax.Array:
    """Softmax attention of grouped queries over the keys that they see.

    Scores and softmax are float32, whatever the operands; scale H ** -0.5.

    Returns:
      float32 [B, T, K, G, H].
    """
    q_BTKGH = q_BTKGH.astype(jnp.float32) * q_BTKGH.shape[-1] ** -0.5  # there are fewer queries than scores
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, dtype=product_dtype)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, _MASKED)
    peak_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weight_BKGTS = jnp.exp(scores_BKGTS - peak_BKGT1)
    total_BKGT = jnp.sum(weight_BKGTS, axis=-1)
    mixed_BTKGH = einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, dtype=product_dtype)
    return mixed_BTKGH / jnp.transpose(total_BKGT, (0, 3, 1, 2))[..., None]


def self_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array | None,
    window: int | None,
    chunk: int,
    product_dtype: str,
) -> jax.Array:
    """Causal attention of a sequence to itself, within the window and within each token's segment.

    Distance is counted in places of the row, which within a segment is distance in position.

    Args:
      segment_BT: integers, or None where each row is one segment.
      window: W, or None.
      chunk: queries at a time.

    Returns:
      float32 [B, T, K, G, H].
    """
    length = q_BTKGH.shape[1]
    take = partial(_chunk, q_BTKGH, k_BTKH, v_BTKH, segment_BT, window, product_dtype)
    if length <= chunk * _MOST_UNROLLED:
        spans = [_span(start, min(start + chunk, length), window) for start in range(0, length, chunk)]
        outputs = [take(query, key, *sizes) for query, key, sizes in spans]
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
    padding = -length % chunk
    keys = length if window is None else min(length, chunk + window - 1)

    def step(_: None, query_start: jax.Array) -> tuple[None, jax.Array]:
        # The last chunk may begin earlier than its turn, to end with the sequence; its early queries are cut off below.
        query_start = jnp.minimum(query_start, length - chunk)
        return None, take(query_start, jnp.clip(query_start + chunk - keys, 0, length - keys), chunk, keys)

    starts = jnp.arange(0, length, chunk)
    _, outputs_XBTKGH = jax.lax.scan(step, None, starts)
    *whole, last = [outputs_XBTKGH[:-1], outputs_XBTKGH[-1]]
    body = jnp.moveaxis(whole[0], 0, 1).reshape(q_BTKGH.shape[0], length + padding - chunk, *q_BTKGH.shape[2:])
    return jnp.concatenate([body, last[:, padding:]], axis=1)


def _span(start: int, stop: int, window: int | None) -> tuple[int, int, tuple[int, int]]:
    """The first query, the first key that one of the queries sees, and how many of each.

    Queries 4..7 with W = 3 see keys 2..7: (4, 2, (4, 6)).
    """
    first_key = 0 if window is None else max(0, start - window + 1)
    return start, first_key, (stop - start, stop - first_key)


@partial(jax.checkpoint, static_argnums=(4, 5, 8, 9))
def _chunk(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array | None,
    window: int | None,
    product_dtype: str,
    query_start: jax.Array | int,
    key_start: jax.Array | int,
    num_queries: int,
    num_keys: int,
) -> jax.Array:
    # Its scores are computed again in the backward pass: kept, they would add up to T x T.
    slice_queries = partial(jax.lax.dynamic_slice_in_dim, start_index=query_start, slice_size=num_queries, axis=1)
    slice_keys = partial(jax.lax.dynamic_slice_in_dim, start_index=key_start, slice_size=num_keys, axis=1)
    query_position_T = query_start + jnp.arange(num_queries)
    key_position_S = key_start + jnp.arange(num_keys)
    if segment_BT is None:
        visible_BTS = visible(query_position_T, key_position_S, window)[None]
    else:
        segments = slice_queries(segment_BT), slice_keys(segment_BT)
        visible_BTS = visible(query_position_T[None], key_position_S[None], window, *segments)
    return attend(slice_queries(q_BTKGH), slice_keys(k_BTKH), slice_keys(v_BTKH), visible_BTS, product_dtype)


def cached_attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible_BTS: jax.Array,
    chunk: int,
    product_dtype: str,
) -> jax.Array:
    """Attention to a cache, whose slots are in no order: the mask says who sees what.

    Returns:
      float32 [B, T, K, G, H].
    """
    outputs = [
        attend(q_BTKGH[:, start : start + chunk], k_BSKH, v_BSKH, visible_BTS[:, start : start + chunk], product_dtype)
        for start in range(0, q_BTKGH.shape[1], chunk)
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
