"""Attention for XLA, a chunk of queries at a time, so that T x T scores never exist.

A chunk of c queries needs c + W - 1 keys at most. Few chunks are unrolled, each with just the keys that it sees (for a
causal mask without a window that saves half the work); many are scanned, in a few spans, each chunk of a span over as
many keys as its widest needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.masks import visible
from mixtral_jax.model.recompute import recomputed

MOST_UNROLLED = 16
"""Chunks of a sequence; where there are more, they are scanned."""
MOST_SCORES = 1 << 28
"""Of a chunk of queries over a cache on a device, 1 GiB in float32; where there would be more, chunks are smaller."""
SPANS = 4
"""Scans of a sequence without a window."""
_MASKED = -1e30  # finite: a row that sees nothing yields the mean of the values, not NaN


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, product_dtype: str
) -> jax.Array:
    """Softmax attention of grouped queries over the keys that they see.

    Scores and softmax are float32, whatever the operands; scale H ** -0.5.

    Returns:
      float32 [B, T, K, G, H].
    """
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", _scaled(q_BTKGH), k_BSKH, dtype=product_dtype)
    weight_BKGTS, total_BKGT = _softmax(scores_BKGTS, visible_BTS[:, None, None])
    mixed_BTKGH = einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, dtype=product_dtype)
    return mixed_BTKGH / jnp.transpose(total_BKGT, (0, 3, 1, 2))[..., None]


def _scaled(q: jax.Array) -> jax.Array:
    return q.astype(jnp.float32) * q.shape[-1] ** -0.5  # there are fewer queries than scores


def _softmax(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights along the last dimension, not normalised, and their sums."""
    scores = jnp.where(visible, scores, _MASKED)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weight = jnp.exp(scores - peak)
    return weight, jnp.sum(weight, axis=-1)


class Keys(NamedTuple):
    """What a sequence of queries attends to: S places in order, of which the queries' own are T in a row."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    segment_BS: jax.Array | None = None
    """Integers; None where each row is one segment."""
    first_query: jax.Array | int = 0
    """The place of the first query. Known when compiling, each chunk of queries is given only keys that it may see."""
    absent: jax.Array | int = 0
    """So many places at the start hold nothing."""


def self_attention(
    q_BTKGH: jax.Array,
    keys: Keys,
    segment_BT: jax.Array | None,
    window: int | None,
    chunk: int,
    product_dtype: str,
) -> jax.Array:
    """Causal attention of a sequence to itself, within the window and within each token's segment.

    Distance is counted in places of the row, which within a segment is distance in position.

    Args:
      segment_BT: integers, of the queries, or None where each row is one segment.
      window: W, or None.
      chunk: queries at a time.

    Returns:
      float32 [B, T, K, G, H].
    """
    length = q_BTKGH.shape[1]
    take = partial(_chunk, q_BTKGH, keys, segment_BT, window, product_dtype)
    if length <= chunk * MOST_UNROLLED:
        spans = [_span(start, min(start + chunk, length), keys, window) for start in range(0, length, chunk)]
        outputs: list[jax.Array] = []
        for query, key, sizes in spans:
            if outputs:
                # Each after the one before, and so backward: left free, a compiler holds the scores of all at once.
                q_BTKGH, outputs[-1] = jax.lax.optimization_barrier((q_BTKGH, outputs[-1]))
            outputs.append(_chunk(q_BTKGH, keys, segment_BT, window, product_dtype, query, key, *sizes))
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
    # Without a window, later spans of queries have more keys to see: a scan's steps are all as wide as its last.
    known = isinstance(keys.first_query, int)
    spans_wanted = SPANS if known and (window is None or window > length) else 1
    span = -(-length // (chunk * spans_wanted)) * chunk
    scan = partial(_scanned, take, keys, window, chunk)
    outputs = [scan(start, min(start + span, length)) for start in range(0, length, span)]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _scanned(take: Callable, keys: Keys, window: int | None, chunk: int, start: int, stop: int) -> jax.Array:
    """Attention of the queries start..stop, at least a chunk of them, a chunk a step of a scan."""
    num_places = keys.k_BSKH.shape[1]
    if isinstance(keys.first_query, int):
        num_places = keys.first_query + stop
    num_keys = num_places if window is None else min(num_places, chunk + window - 1)

    def step(_: None, query_start: jax.Array) -> tuple[None, jax.Array]:
        # The last chunk may begin earlier than its turn, to end with the span; its early queries are cut off below.
        query_start = jnp.minimum(query_start, stop - chunk)
        last_key = keys.first_query + query_start + chunk
        return None, take(query_start, jnp.clip(last_key - num_keys, 0, num_places - num_keys), chunk, num_keys)

    _, outputs_XBTKGH = jax.lax.scan(step, None, jnp.arange(start, stop, chunk))
    whole_XBTKGH, last_BTKGH = outputs_XBTKGH[:-1], outputs_XBTKGH[-1]
    padding = (start - stop) % chunk
    body_BTKGH = jnp.moveaxis(whole_XBTKGH, 0, 1).reshape(last_BTKGH.shape[0], -1, *last_BTKGH.shape[2:])
    return jnp.concatenate([body_BTKGH, last_BTKGH[:, padding:]], axis=1)


def _span(start: int, stop: int, keys: Keys, window: int | None) -> tuple[int, int, tuple[int, int]]:
    """The first query, the first key that one of the queries sees, and how many of each.

    Queries 4..7 with W = 3 see keys 2..7: (4, 2, (4, 6)). Those of a sequence whose place is not known may see any.
    """
    if not isinstance(keys.first_query, int):
        return start, 0, (stop - start, keys.k_BSKH.shape[1])
    first_key = 0 if window is None else max(0, keys.first_query + start - window + 1)
    return start, first_key, (stop - start, keys.first_query + stop - first_key)


def _chunk(
    q_BTKGH: jax.Array,
    keys: Keys,
    segment_BT: jax.Array | None,
    window: int | None,
    product_dtype: str,
    query_start: jax.Array | int,
    key_start: jax.Array | int,
    num_queries: int,
    num_keys: int,
) -> jax.Array:
    # Kept for the backward pass, its scores would add up to T x T.
    attend_to = recomputed(partial(_attend_chunk, window, product_dtype, num_queries, num_keys))
    return attend_to(q_BTKGH, keys, segment_BT, query_start, key_start)


def _attend_chunk(
    window: int | None,
    product_dtype: str,
    num_queries: int,
    num_keys: int,
    q_BTKGH: jax.Array,
    keys: Keys,
    segment_BT: jax.Array | None,
    query_start: jax.Array | int,
    key_start: jax.Array | int,
) -> jax.Array:
    slice_queries = partial(jax.lax.dynamic_slice_in_dim, start_index=query_start, slice_size=num_queries, axis=1)
    slice_keys = partial(jax.lax.dynamic_slice_in_dim, start_index=key_start, slice_size=num_keys, axis=1)
    query_position_T = keys.first_query + query_start + jnp.arange(num_queries)
    place_S = key_start + jnp.arange(num_keys)
    key_position_S = jnp.where(place_S >= keys.absent, place_S, -1)
    if segment_BT is None or keys.segment_BS is None:
        visible_BTS = visible(query_position_T, key_position_S, window)[None]
    else:
        segments = slice_queries(segment_BT), slice_keys(keys.segment_BS)
        visible_BTS = visible(query_position_T[None], key_position_S[None], window, *segments)
    return attend(slice_queries(q_BTKGH), slice_keys(keys.k_BSKH), slice_keys(keys.v_BSKH), visible_BTS, product_dtype)


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
    chunk = queries_at_once(chunk, batch * num_kv_heads * num_groups * visible_BTS.shape[2] // shards)

    def take(start: jax.Array | int, rows_BTKGH: jax.Array, size: int = chunk) -> jax.Array:
        chunk_of = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        mixed = _attend_to_cache(chunk_of(rows_BTKGH), k_BKSH, v_BKSH, chunk_of(visible_BTS), product_dtype)
        return jax.lax.dynamic_update_slice_in_dim(rows_BTKGH, mixed, start, axis=1)

    # Results take the place of queries: an array of zeros for them, a compiler is free to make for all layers at once.
    rows_BTKGH, done = q_BTKGH.astype(jnp.float32), 0
    if length > chunk * MOST_UNROLLED:
        rows_BTKGH = jax.lax.fori_loop(0, length // chunk, lambda i, rows: take(i * chunk, rows), rows_BTKGH)
        done = length // chunk * chunk
    for start in range(done, length, chunk):
        # Each after the one before: left free, it holds the scores of all at once.
        rows_BTKGH = take(start, jax.lax.optimization_barrier(rows_BTKGH), min(chunk, length - start))
    return rows_BTKGH


def queries_at_once(chunk: int, scores: int) -> int:
    """A chunk of queries over a cache, each of which has so many scores on a device, over all texts and heads."""
    # A power of two, so that it divides a chunk of prefill.
    return min(chunk, 1 << max(1, MOST_SCORES // scores).bit_length() - 1)


def _attend_to_cache(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    visible_BTS: jax.Array,
    product_dtype: str,
) -> jax.Array:
    """`attend` as products of one matrix a text and head: of other forms XLA:GPU makes some for which it lays the whole
    cache out anew."""
    batch, length, num_kv_heads, num_groups, head_dim = q_BTKGH.shape
    q_BKMH = jnp.transpose(_scaled(q_BTKGH), (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, -1, head_dim)
    scores_BKMS = einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, dtype=product_dtype)
    scores_BKGTS = scores_BKMS.reshape(batch, num_kv_heads, num_groups, length, -1)
    weight_BKGTS, total_BKGT = _softmax(scores_BKGTS, visible_BTS[:, None, None])
    mixed_BKMH = einsum("BKMS,BKSH->BKMH", weight_BKGTS.reshape(scores_BKMS.shape), v_BKSH, dtype=product_dtype)
    mixed_BKGTH = mixed_BKMH.reshape(*total_BKGT.shape, head_dim) / total_BKGT[..., None]
    return jnp.transpose(mixed_BKGTH, (0, 3, 1, 2, 4))
