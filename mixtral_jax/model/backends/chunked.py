"""Attention for XLA, a chunk of queries at a time, so that T x T scores never exist.

A chunk of c queries sees c + W - 1 keys at most. Few chunks are unrolled, each with just the keys that it sees (for a
causal mask without a window that saves half the work). Many are looped over (see `runs`): in a few spans, each chunk of
a span with as many keys as its widest needs; or on a CPU in one, the keys of each chunk a block at a time as far as it
sees: a block's scores stay in a cache of the processor where rows and heads are not many, those of all keys would go
through memory. The backward pass keeps the result and a number for each query and head, and computes scores again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from mixtral_jax.model.backends.products import einsum, weight_gradient
from mixtral_jax.model.backends.runs import SPANS, Run, are_unrolled, keys_of, over, plan
from mixtral_jax.model.backends.softmax import Part, nothing, softmax, together
from mixtral_jax.model.masks import visible
from mixtral_jax.sharding.mesh import platform

KEYS_AT_ONCE = 384
"""Of a block: of those in docs/other-cpus.md the fastest more often than not. 128 queries and W = 1,024 are three."""
FEWEST_BLOCKS = 3
"""Of a chunk: with fewer, what the last is filled up with is too much."""
LEAST_FILLED = 7 / 8
"""Of a window's blocks: what the last is filled up with is computed for each chunk."""
FEWEST_QUERIES = 128
"""Of a chunk: fewer do little with a block."""


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, product_dtype: str
) -> Part:
    """Grouped queries' part of softmax attention over the keys that they see, float32 [B, T, K, G, H].

    Scores and softmax are float32, whatever the operands; scale H ** -0.5.
    """
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", scaled(q_BTKGH), k_BSKH, dtype=product_dtype)
    weight_BKGTS, peak_BKGT, total_BKGT = softmax(scores_BKGTS, visible_BTS[:, None, None])
    mixed_BTKGH = einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, dtype=product_dtype)
    peak_BTKG, total_BTKG = (jnp.transpose(each, (0, 3, 1, 2)) for each in (peak_BKGT, total_BKGT))
    return Part(mixed_BTKGH, peak_BTKG, total_BTKG)


def _pull(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible_BTS: jax.Array,
    log_z_BTKG: jax.Array,
    mean_BTKG: jax.Array,
    dy_BTKGH: jax.Array,
    product_dtype: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangents of queries, keys and values, float32, from that of attention's result (Dao et al., 2022).

    The weights are computed again, and what would be sums over scores is at hand. A query that sees nothing has no part
    in it.

    Args:
      log_z_BTKG: the log of each query's partition function.
      mean_BTKG: of the weights' cotangents, by the weights: the product of a query's result and its cotangent.
    """
    q_BTKGH = scaled(q_BTKGH)
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, dtype=product_dtype)
    log_z_BKGT, mean_BKGT = (jnp.transpose(each, (0, 2, 3, 1)) for each in (log_z_BTKG, mean_BTKG))
    weight_BKGTS = jnp.where(visible_BTS[:, None, None], jnp.exp(scores_BKGTS - log_z_BKGT[..., None]), 0)
    dv_BSKH = weight_gradient("BKGTS,BTKGH->BSKH", weight_BKGTS, dy_BTKGH, dtype=product_dtype)
    dweight_BKGTS = einsum("BTKGH,BSKH->BKGTS", dy_BTKGH, v_BSKH, dtype=product_dtype)
    # Cast here, once, for the two products that take it.
    dscores_BKGTS = (weight_BKGTS * (dweight_BKGTS - mean_BKGT[..., None])).astype(product_dtype)
    dq_BTKGH = einsum("BKGTS,BSKH->BTKGH", dscores_BKGTS, k_BSKH, dtype=product_dtype)
    dk_BSKH = weight_gradient("BKGTS,BTKGH->BSKH", dscores_BKGTS, q_BTKGH, dtype=product_dtype)
    return scaled(dq_BTKGH), dk_BSKH, dv_BSKH


def scaled(q: jax.Array) -> jax.Array:
    """Queries times H ** -0.5, float32."""
    return q.astype(jnp.float32) * q.shape[-1] ** -0.5  # there are fewer queries than scores


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
    first, segments, length = keys.first_query, None, q_BTKGH.shape[1]
    if segment_BT is not None and keys.segment_BS is not None:
        segments = segment_BT, keys.segment_BS
    by_blocks = goes_by_blocks(length, keys.k_BSKH.shape[1], window, chunk, platform())
    form = _Form(window, chunk, by_blocks, product_dtype, length, first if isinstance(first, int) else None)
    places = _Places(jnp.asarray(first), jnp.asarray(keys.absent), segments)
    return _self_attention(form, q_BTKGH, keys.k_BSKH, keys.v_BSKH, places)


def goes_by_blocks(length: int, num_places: int, window: int | None, chunk: int, name: str) -> bool:
    """Whether a chunk of queries takes its keys, of so many places, a block at a time, on a platform of this name."""
    keys = keys_of(chunk, window, num_places)
    are_many = keys >= FEWEST_BLOCKS * KEYS_AT_ONCE and not are_unrolled(length, chunk)
    are_filled = window is None or keys >= LEAST_FILLED * -(-keys // KEYS_AT_ONCE) * KEYS_AT_ONCE
    return name == "cpu" and chunk >= FEWEST_QUERIES and are_many and are_filled


@dataclass(frozen=True)
class _Form:
    """What is static in the attention of a sequence to itself."""

    window: int | None
    chunk: int
    by_blocks: bool
    product_dtype: str
    length: int
    """Of the queries."""
    first_query: int | None
    """As of Keys, where it is known when compiling."""


class _Places(NamedTuple):
    """Where queries and keys lie: `first_query` and `absent` of Keys, and the segments of both."""

    first_query: jax.Array
    absent: jax.Array
    segments: tuple[jax.Array, jax.Array] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _self_attention(
    form: _Form, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: _Places
) -> jax.Array:
    return _forward(form, q_BTKGH, k_BSKH, v_BSKH, places)[0]


_Inputs: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, _Places]


def _forward(
    form: _Form, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: _Places
) -> tuple[jax.Array, tuple[_Inputs, jax.Array, jax.Array]]:
    def take(piece: _Piece, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Results take the place of queries: an array of zeros for them, a compiler is free to make for all layers at
        # once.
        rows_BTKGH, log_z_BTKG = carry
        own_q = piece.queries(rows_BTKGH)

        def more(some: _Piece, so_far: Part | None) -> Part:
            seen_BTS = some.visible(places, form.window)
            own = attend(own_q, some.keys(k_BSKH), some.keys(v_BSKH), seen_BTS, form.product_dtype)
            return own if so_far is None else together(so_far, own)

        found = piece.over_keys(form.by_blocks, places, more, nothing(own_q))
        log_z = found.peak + jnp.log(found.total)
        return piece.put(found.attention(), rows_BTKGH), piece.put(log_z, log_z_BTKG)

    rows_BTKGH = q_BTKGH.astype(jnp.float32)
    carry = rows_BTKGH, rows_BTKGH[..., 0]
    y_BTKGH, log_z_BTKG = _over_pieces(form, places, k_BSKH.shape[1], take, carry)
    return y_BTKGH, ((q_BTKGH, k_BSKH, v_BSKH, places), y_BTKGH, log_z_BTKG)


def _backward(form: _Form, saved: tuple[_Inputs, jax.Array, jax.Array], dy_BTKGH: jax.Array) -> tuple[Any, ...]:
    # Not before the cotangent is there; and apart from what was computed before, which would else be kept.
    saved, dy_BTKGH = jax.lax.optimization_barrier((saved, dy_BTKGH))
    (q_BTKGH, k_BSKH, v_BSKH, places), y_BTKGH, log_z_BTKG = saved
    mean_BTKG = jnp.sum(y_BTKGH * dy_BTKGH, axis=-1)

    def take(piece: _Piece, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # Queries are carried so that a chunk's scores wait for the chunk before it; cotangents become those of queries.
        q_BTKGH, rows_BTKGH, dk_BSKH, dv_BSKH = carry
        own_q, own_log_z, own_mean, own_dy = map(piece.queries, (q_BTKGH, log_z_BTKG, mean_BTKG, rows_BTKGH))

        def more(some: _Piece, so_far: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
            operands = own_q, some.keys(k_BSKH), some.keys(v_BSKH), some.visible(places, form.window)
            own_dq, own_dk, own_dv = _pull(*operands, own_log_z, own_mean, own_dy, form.product_dtype)
            if so_far is None:
                return own_dq, some.add(own_dk, dk_BSKH), some.add(own_dv, dv_BSKH)
            dq_so_far, dk_so_far, dv_so_far = so_far
            return dq_so_far + own_dq, some.add(own_dk, dk_so_far), some.add(own_dv, dv_so_far)

        begin: tuple[jax.Array, ...] = jnp.zeros_like(own_q, jnp.float32), dk_BSKH, dv_BSKH
        dq_BTKGH, *sums = piece.over_keys(form.by_blocks, places, more, begin)
        return q_BTKGH, piece.put(dq_BTKGH, rows_BTKGH), *sums

    zeros = (jnp.zeros_like(each, jnp.float32) for each in (k_BSKH, v_BSKH))
    _, *found = _over_pieces(form, places, k_BSKH.shape[1], take, (q_BTKGH, dy_BTKGH, *zeros))
    operands = q_BTKGH, k_BSKH, v_BSKH
    return *(own.astype(x.dtype) for own, x in zip(found, operands, strict=True)), None


_self_attention.defvjp(_forward, _backward)


_Carry = TypeVar("_Carry")


class _Piece(NamedTuple):
    """A chunk of queries, and the row of keys that it is given."""

    query: jax.Array | int
    """The first."""
    key: jax.Array | int
    """The first."""
    num_queries: int
    num_keys: int
    counted: jax.Array | None = None
    """Keys before this place do not count."""

    def queries(self, x: jax.Array) -> jax.Array:
        """The chunk's part of an array [B, T, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self.query, self.num_queries, axis=1)

    def keys(self, x: jax.Array) -> jax.Array:
        """The keys' part of an array [B, S, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self.key, self.num_keys, axis=1)

    def put(self, own: jax.Array, x: jax.Array) -> jax.Array:
        """x [B, T, ...], with `own` in the chunk's place."""
        return jax.lax.dynamic_update_slice_in_dim(x, own, self.query, axis=1)

    def add(self, own: jax.Array, x: jax.Array) -> jax.Array:
        """x [B, S, ...], with `own` added in the keys' place."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.keys(x) + own, self.key, axis=1)

    def over_keys(
        self,
        by_blocks: bool,
        places: _Places,
        step: Callable[[_Piece, _Carry | None], _Carry],
        begin: _Carry,
    ) -> _Carry:
        """step(piece, so far) of one block of the keys after another, as far as the chunk sees, or of all from None."""
        block = KEYS_AT_ONCE
        if not by_blocks or self.num_keys <= block:
            return step(self, None)

        def take(number: jax.Array, so_far: _Carry) -> _Carry:
            # The last block is as large as the others, and is not to count what was counted.
            first = self.key + number * block
            key = jnp.minimum(first, self.key + self.num_keys - block)
            return step(self._replace(key=key, num_keys=block, counted=first), so_far)

        seen = places.first_query + self.query + self.num_queries - self.key
        return jax.lax.fori_loop(0, -(-jnp.clip(seen, 1, self.num_keys) // block), take, begin)

    def visible(self, places: _Places, window: int | None) -> jax.Array:
        """Which of the keys each of the queries sees, [B or 1, T, S]."""
        query_T = places.first_query + self.query + jnp.arange(self.num_queries)
        place_S = self.key + jnp.arange(self.num_keys)
        first = places.absent if self.counted is None else jnp.maximum(places.absent, self.counted)
        position_S = jnp.where(place_S >= first, place_S, -1)
        if places.segments is None:
            return visible(query_T, position_S, window)[None]
        segment_BT, segment_BS = places.segments
        return visible(query_T[None], position_S[None], window, self.queries(segment_BT), self.keys(segment_BS))


def _over_pieces(
    form: _Form, places: _Places, num_places: int, take: Callable[[_Piece, _Carry], _Carry], carry: _Carry
) -> _Carry:
    """carry = take(piece, carry) for one chunk of queries after another."""

    def step(run: Run, query: jax.Array | int, carry: _Carry) -> _Carry:
        if form.first_query is not None and isinstance(query, int):
            key: jax.Array | int = max(0, form.first_query + query + run.queries - run.keys)
        else:
            key = jnp.clip(places.first_query + query + run.queries - run.keys, 0, num_places - run.keys)
        return take(_Piece(query, key, run.queries, run.keys), carry)

    spans = 1 if form.by_blocks else SPANS
    return over(plan(form.length, num_places, form.first_query, form.window, form.chunk, spans), step, carry)
