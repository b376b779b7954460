"""Attention for GPUs, as Triton kernels: scores stay on the chip (FlashAttention-2, arXiv 2307.08691).

Causality, the window, the documents of a row and places that hold nothing all say the same of a query: it sees its own
place and those before it, down to a first one. So a mask is one number a query, and what no query of a block sees is
skipped by where the block's numbers begin. For W = 3 and documents of four and two tokens:

    place    0  1  2  3  4  5
    first    0  0  0  1  4  4

The backward pass computes scores again, once along a block of queries for their gradients, and once along a block of
keys for theirs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixtral_jax.model.backends.chunked import Keys

LANES = 128
"""Lengths are multiples of it."""
HEAD_DIMS = (64, 128)
_QUERIES, _KEYS = 128, 64  # of a block, forward
_LONG, _SHORT = 128, 32  # of a block, backward: along what its gradients are of, and along what they are summed over
_FORWARD = triton.CompilerParams(num_warps=8, num_stages=3)
_BACKWARD = triton.CompilerParams(num_warps=8, num_stages=3)
_MASKED = -1e30
_LOG2_E = math.log2(math.e)


def suits(length: int, head_dim: int, product_dtype: str) -> bool:
    """Whether the kernels take so many queries; they round to bfloat16."""
    return length % LANES == 0 and head_dim in HEAD_DIMS and product_dtype == "bfloat16"


def self_attention(
    q_BTKGH: jax.Array,
    keys: Keys,
    segment_BT: jax.Array | None,
    window: int | None,
    product_dtype: str,
    interpret: bool = False,
) -> jax.Array:
    """What `chunked.self_attention` gives, where the tokens of a segment are neighbours, and on one device.

    Args:
      interpret: run it step by step on any platform, which is slow, for tests.

    Returns:
      float32 [B, T, K, G, H].
    """
    first_BT = first_seen(q_BTKGH.shape[:2], keys, segment_BT, window)
    place = jnp.asarray(keys.first_query, jnp.int32)[None]
    operands = (x.astype(product_dtype) for x in (q_BTKGH, keys.k_BSKH, keys.v_BSKH))
    return _attend(*operands, first_BT, place, interpret).astype(jnp.float32)


def first_seen(shape: Any, keys: Keys, segment_BT: jax.Array | None, window: int | None) -> jax.Array:
    """The first place that each query sees, int32 [B, T]: it sees all from there to its own."""
    length = shape[1]
    place_T = keys.first_query + jnp.arange(length)
    first_BT = jnp.broadcast_to(jnp.asarray(keys.absent), shape)
    if window is not None:
        first_BT = jnp.maximum(first_BT, (place_T - window + 1)[None])
    if segment_BT is not None and keys.segment_BS is not None:
        begins_BS = keys.segment_BS != jnp.roll(keys.segment_BS, 1, axis=1)
        start_BS = jax.lax.cummax(jnp.where(begins_BS, jnp.arange(begins_BS.shape[1])[None], 0), axis=1)
        first_BT = jnp.maximum(first_BT, jax.lax.dynamic_slice_in_dim(start_BS, keys.first_query, length, axis=1))
    return first_BT.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, first_BT: jax.Array, place: jax.Array, interpret: bool
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, first_BT, place, interpret)[0]


def _forward(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, first_BT: jax.Array, place: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, length, num_kv_heads, num_groups, _ = q_BTKGH.shape
    y_BTKGH, log_BKGT = pl.pallas_call(
        partial(_forward_kernel, groups=num_groups),
        grid=(length // _QUERIES, num_kv_heads * num_groups, batch),
        out_shape=(
            jax.ShapeDtypeStruct(q_BTKGH.shape, q_BTKGH.dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, num_groups, length), jnp.float32),
        ),
        compiler_params=_FORWARD,
        interpret=interpret,
        name="attention",
    )(q_BTKGH, k_BSKH, v_BSKH, first_BT, place)
    return y_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, first_BT, place, y_BTKGH, log_BKGT)


def _backward(interpret: bool, saved: tuple[jax.Array, ...], dy_BTKGH: jax.Array) -> tuple[Any, ...]:
    q_BTKGH, k_BSKH, v_BSKH, first_BT, place, y_BTKGH, log_BKGT = saved
    batch, length, num_kv_heads, num_groups, _ = q_BTKGH.shape
    products = dy_BTKGH.astype(jnp.float32) * y_BTKGH.astype(jnp.float32)
    mean_BKGT = jnp.transpose(jnp.sum(products, axis=-1), (0, 2, 3, 1))
    given = q_BTKGH, k_BSKH, v_BSKH, first_BT, place, dy_BTKGH, log_BKGT, mean_BKGT
    run = partial(pl.pallas_call, compiler_params=_BACKWARD, interpret=interpret)
    dq_BTKGH = run(
        partial(_query_kernel, groups=num_groups),
        grid=(length // _LONG, num_kv_heads * num_groups, batch),
        out_shape=jax.ShapeDtypeStruct(q_BTKGH.shape, q_BTKGH.dtype),
        name="attention_gradient_of_queries",
    )(*given)
    blocks = -(-k_BSKH.shape[1] // _LONG)
    # Later queries see later first places, so those that see a block are neighbours, and this is where they end.
    stop_BJ = jnp.sum(first_BT[:, None] < ((1 + jnp.arange(blocks)) * _LONG)[None, :, None], axis=-1, dtype=jnp.int32)
    dk_BSKH, dv_BSKH = run(
        partial(_key_kernel, groups=num_groups),
        grid=(blocks, num_kv_heads, batch),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKH)),
        name="attention_gradient_of_keys",
    )(*given, stop_BJ)
    return dq_BTKGH, dk_BSKH, dv_BSKH, None, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, place_ref: Any, y_ref: Any, log_ref: Any, *, groups: int
) -> None:
    batch, head, group = _head(groups)
    rows = pl.ds(pl.program_id(0) * _QUERIES, _QUERIES)
    q_QH, first_Q = q_ref[batch, rows, head, group], first_ref[batch, rows]
    place_Q = place_ref[0] + pl.program_id(0) * _QUERIES + jnp.arange(_QUERIES)
    scale = q_QH.shape[-1] ** -0.5 * _LOG2_E

    def step(number: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed_QH, peak_Q, total_Q = carry
        place_S = number * _KEYS + jnp.arange(_KEYS)
        k_SH, v_SH = (_keys(ref, batch, number * _KEYS, _KEYS, head) for ref in (k_ref, v_ref))
        score_QS = triton.dot(q_QH, k_SH, trans_b=True) * scale
        score_QS = jnp.where(_seen(place_Q[:, None], place_S[None], first_Q[:, None]), score_QS, _MASKED)
        higher_Q = jnp.maximum(peak_Q, jnp.max(score_QS, axis=1))
        # A row that has seen nothing yet has weights of 1 here, which its first real score scales to zero.
        weight_QS, shrink_Q = jnp.exp2(score_QS - higher_Q[:, None]), jnp.exp2(peak_Q - higher_Q)
        mixed_QH = mixed_QH * shrink_Q[:, None] + triton.dot(weight_QS.astype(v_SH.dtype), v_SH)
        return mixed_QH, higher_Q, total_Q * shrink_Q + jnp.sum(weight_QS, axis=1)

    nothing = jnp.zeros(q_QH.shape, jnp.float32), jnp.full((_QUERIES,), _MASKED), jnp.zeros((_QUERIES,), jnp.float32)
    start, stop = jnp.min(first_Q) // _KEYS, pl.cdiv(jnp.max(place_Q) + 1, _KEYS)
    mixed_QH, peak_Q, total_Q = jax.lax.fori_loop(start, stop, step, nothing)
    y_ref[batch, rows, head, group] = (mixed_QH / total_Q[:, None]).astype(y_ref.dtype)
    log_ref[batch, head, group, rows] = peak_Q + jnp.log2(total_Q)


def _query_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, place_ref: Any, dy_ref: Any, log_ref: Any, mean_ref: Any,
    dq_ref: Any, *, groups: int,
) -> None:  # fmt: skip
    batch, head, group = _head(groups)
    rows = pl.ds(pl.program_id(0) * _LONG, _LONG)
    q_QH, dy_QH, first_Q = q_ref[batch, rows, head, group], dy_ref[batch, rows, head, group], first_ref[batch, rows]
    log_Q, mean_Q = log_ref[batch, head, group, rows], mean_ref[batch, head, group, rows]
    place_Q = place_ref[0] + pl.program_id(0) * _LONG + jnp.arange(_LONG)
    scale = q_QH.shape[-1] ** -0.5

    def step(number: Any, dq_QH: jax.Array) -> jax.Array:
        place_S = number * _SHORT + jnp.arange(_SHORT)
        k_SH, v_SH = (_keys(ref, batch, number * _SHORT, _SHORT, head) for ref in (k_ref, v_ref))
        score_QS = triton.dot(q_QH, k_SH, trans_b=True) * (scale * _LOG2_E)
        seen_QS = _seen(place_Q[:, None], place_S[None], first_Q[:, None])
        weight_QS = jnp.where(seen_QS, jnp.exp2(score_QS - log_Q[:, None]), 0)
        dscore_QS = weight_QS * (triton.dot(dy_QH, v_SH, trans_b=True) - mean_Q[:, None])
        return dq_QH + triton.dot(dscore_QS.astype(k_SH.dtype), k_SH)

    start, stop = jnp.min(first_Q) // _SHORT, pl.cdiv(jnp.max(place_Q) + 1, _SHORT)
    dq_QH = jax.lax.fori_loop(start, stop, step, jnp.zeros(q_QH.shape, jnp.float32))
    dq_ref[batch, rows, head, group] = (dq_QH * scale).astype(dq_ref.dtype)


def _key_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, place_ref: Any, dy_ref: Any, log_ref: Any, mean_ref: Any,
    stop_ref: Any, dk_ref: Any, dv_ref: Any, *, groups: int,
) -> None:  # fmt: skip
    block, head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    k_SH, v_SH = (_keys(ref, batch, block * _LONG, _LONG, head) for ref in (k_ref, v_ref))
    place_S, first_query = block * _LONG + jnp.arange(_LONG), place_ref[0]
    scale = k_SH.shape[-1] ** -0.5

    def step(number: Any, carry: tuple[jax.Array, jax.Array], group: Any) -> tuple[jax.Array, jax.Array]:
        dk_SH, dv_SH = carry
        rows = pl.ds(number * _SHORT, _SHORT)
        q_QH, dy_QH, first_Q = q_ref[batch, rows, head, group], dy_ref[batch, rows, head, group], first_ref[batch, rows]
        log_Q, mean_Q = log_ref[batch, head, group, rows], mean_ref[batch, head, group, rows]
        place_Q = first_query + number * _SHORT + jnp.arange(_SHORT)
        # Keys down, queries across: what is multiplied next lies in registers as it is.
        score_SQ = triton.dot(k_SH, q_QH, trans_b=True) * (scale * _LOG2_E)
        seen_SQ = _seen(place_Q[None], place_S[:, None], first_Q[None])
        weight_SQ = jnp.where(seen_SQ, jnp.exp2(score_SQ - log_Q[None]), 0)
        dv_SH += triton.dot(weight_SQ.astype(dy_QH.dtype), dy_QH)
        dscore_SQ = weight_SQ * (triton.dot(v_SH, dy_QH, trans_b=True) - mean_Q[None])
        return dk_SH + triton.dot(dscore_SQ.astype(q_QH.dtype), q_QH), dv_SH

    start = jnp.maximum(block * _LONG - first_query, 0) // _SHORT
    stop = pl.cdiv(triton.load(stop_ref.at[batch, block]), _SHORT)

    def of_group(group: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(start, stop, partial(step, group=group), carry)

    zeros = jnp.zeros(k_SH.shape, jnp.float32)
    dk_SH, dv_SH = jax.lax.fori_loop(0, groups, of_group, (zeros, zeros))
    held_S1 = (place_S < k_ref.shape[1])[:, None]
    for ref, gradient_SH in ((dk_ref, dk_SH * scale), (dv_ref, dv_SH)):
        place = ref.at[batch, pl.ds(block * _LONG, _LONG), head]
        triton.store(place, gradient_SH.astype(ref.dtype), mask=held_S1)


def _head(groups: int) -> tuple[Any, Any, Any]:
    """Of a program along (queries, query heads, rows): its row, its key head, and its query head of that one's."""
    return pl.program_id(2), pl.program_id(1) // groups, pl.program_id(1) % groups


def _keys(ref: Any, batch: Any, start: Any, count: int, head: Any) -> jax.Array:
    """So many keys, or values; zeros beyond the last."""
    held_S1 = (start + jnp.arange(count) < ref.shape[1])[:, None]
    keys_SH: jax.Array = triton.load(ref.at[batch, pl.ds(start, count), head], mask=held_S1, other=0)
    return keys_SH


def _seen(place_of_query: jax.Array, place_of_key: jax.Array, first: jax.Array) -> jax.Array:
    return (place_of_key <= place_of_query) & (place_of_key >= first)
