"""Attention to a cache for GPUs, as a Triton kernel that reads the slots which a text has filled, and no others
(Flash-Decoding, Dao et al., 2023).

It takes hundreds of programs to keep a GPU busy, and there may be one text. So a head's slots are dealt out to several
programs, a block at a time, and what these find is put together afterwards. Of nine blocks a text has filled five here,
and three programs share them:

    block      0  1  2  3  4  5  6  7  8
    program    0  1  2  0  1
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixtral_jax.model.backends.cached import Seen
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.backends.softmax import MASKED

HEAD_DIMS = (64, 128)
_SLOTS = 64  # of a block
_FEWEST_QUERIES, _MOST_QUERIES = 16, 64  # of a tile, which a program takes
_PROGRAMS = 256  # about two for each of a large GPU's multiprocessors
_PARAMS = triton.CompilerParams(num_warps=4, num_stages=3)
_LOG2_E = math.log2(math.e)


def suits(head_dim: int, product_dtype: str, kept_dtype: str) -> bool:
    """Whether the kernel takes such heads and such a cache; it rounds to bfloat16."""
    return head_dim in HEAD_DIMS and product_dtype == "bfloat16" and kept_dtype in ("bfloat16", "int8")


def can_address(kept_BKSH: jax.Array | Quantized, seen: Seen, shards: int) -> bool:
    """Whether the kernel finds all of a cache, whose heads so many devices share: Triton counts an array's elements in
    32 bits, unless it has more than four GiB."""
    return max(math.prod(kept_BKSH.shape) // shards, seen.visible_BTS.size) < 1 << 31


def cached_attention(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    seen: Seen,
    product_dtype: str,
    interpret: bool = False,
) -> jax.Array:
    """What `cached.cached_attention` gives, on one device; of a query that sees nothing, some number.

    Args:
      k_BKSH, v_BKSH: numbers, or int8 with scales.
      interpret: run it step by step on any platform, which is slow, for tests.

    Returns:
      float32 [B, T, K, G, H].
    """
    batch, length, num_kv_heads, num_groups, head_dim = q_BTKGH.shape
    queries = length * num_groups  # that share a key head, token by token
    programs = programs_of(batch, num_kv_heads, queries, seen.visible_BTS.shape[2])
    q_BKTGH = jnp.transpose(q_BTKGH.astype(product_dtype), (0, 2, 1, 3, 4))
    q_BKQH = q_BKTGH.reshape(batch, num_kv_heads, queries, head_dim)
    shape = programs, batch, num_kv_heads, queries
    mixed_PBKQH, peak_PBKQ, total_PBKQ = pl.pallas_call(
        partial(_kernel, groups=num_groups, programs=programs),
        grid=(pl.cdiv(queries, _queries_of(queries)) * programs, num_kv_heads, batch),
        out_shape=tuple(jax.ShapeDtypeStruct(each, jnp.float32) for each in ((*shape, head_dim), shape, shape)),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="cached_attention",
    )(q_BKQH, _whole(k_BKSH), _whole(v_BKSH), seen.visible_BTS.astype(jnp.int8), seen.extent_B)
    by_PBKQ = jnp.exp2(peak_PBKQ - jnp.max(peak_PBKQ, axis=0, keepdims=True))
    total_BKQ = jnp.sum(total_PBKQ * by_PBKQ, axis=0)
    mixed_BKQH = jnp.sum(mixed_PBKQH * by_PBKQ[..., None], axis=0)
    y_BKQH = mixed_BKQH / jnp.where(total_BKQ > 0, total_BKQ, 1)[..., None]
    return jnp.transpose(y_BKQH.reshape(q_BKTGH.shape), (0, 2, 1, 3, 4))


def programs_of(batch: int, num_kv_heads: int, queries: int, slots: int) -> int:
    """How many programs share the slots of each tile of so many queries of a text and key head."""
    tiles = batch * num_kv_heads * pl.cdiv(queries, _queries_of(queries))
    return min(pl.cdiv(_PROGRAMS, tiles), pl.cdiv(slots, _SLOTS))


def _queries_of(queries: int) -> int:
    """A tile's: a power of two."""
    return min(max(_FEWEST_QUERIES, pl.next_power_of_2(queries)), _MOST_QUERIES)


def _whole(cache_BKSH: jax.Array | Quantized) -> tuple[jax.Array, jax.Array | None]:
    """Numbers, and their scales [B, K, S]."""
    if isinstance(cache_BKSH, Quantized):
        return cache_BKSH.values, cache_BKSH.scale[..., 0]
    return cache_BKSH, None


def _kernel(
    q_ref: Any, keys: tuple[Any, Any], values: tuple[Any, Any], seen_ref: Any, extent_ref: Any,
    mixed_ref: Any, peak_ref: Any, total_ref: Any, *, groups: int, programs: int,
) -> None:  # fmt: skip
    queries, slots = q_ref.shape[2], seen_ref.shape[2]
    tile, program = pl.program_id(0) // programs, pl.program_id(0) % programs
    head, batch = pl.program_id(1), pl.program_id(2)
    size = _queries_of(queries)
    rows, row_Q = pl.ds(tile * size, size), tile * size + jnp.arange(size)
    token_Q = jnp.minimum(row_Q, queries - 1) // groups
    held_Q = row_Q < queries
    q_QH = triton.load(q_ref.at[batch, head, rows], mask=held_Q[:, None], other=0)
    scale = q_QH.shape[-1] ** -0.5 * _LOG2_E

    def step(number: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed_QH, peak_Q, total_Q = carry
        start = (program + number * programs) * _SLOTS
        slot_S = start + jnp.arange(_SLOTS)
        held_S = slot_S < slots

        def block(numbers_ref: Any, scale_ref: Any) -> tuple[jax.Array, Any]:
            own = batch, head, pl.ds(start, _SLOTS)
            numbers_SH = triton.load(numbers_ref.at[own], mask=held_S[:, None], other=0).astype(q_QH.dtype)
            return numbers_SH, 1 if scale_ref is None else triton.load(scale_ref.at[own], mask=held_S, other=0)[None]

        (k_SH, k_scale_1S), (v_SH, v_scale_1S) = block(*keys), block(*values)
        seen_QS = triton.load(seen_ref.at[batch, token_Q[:, None], jnp.minimum(slot_S, slots - 1)[None]]) != 0
        score_QS = triton.dot(q_QH, k_SH, trans_b=True) * scale * k_scale_1S
        score_QS = jnp.where(seen_QS & held_S[None], score_QS, MASKED)
        higher_Q = jnp.maximum(peak_Q, jnp.max(score_QS, axis=1))
        # A row that has seen nothing yet has weights of 1 here, which its first real score scales to zero.
        weight_QS, shrink_Q = jnp.exp2(score_QS - higher_Q[:, None]), jnp.exp2(peak_Q - higher_Q)
        total_Q = total_Q * shrink_Q + jnp.sum(weight_QS, axis=1)
        weight_QS = (weight_QS * v_scale_1S).astype(v_SH.dtype)
        return mixed_QH * shrink_Q[:, None] + triton.dot(weight_QS, v_SH), higher_Q, total_Q

    nothing = jnp.zeros(q_QH.shape, jnp.float32), jnp.full((size,), MASKED), jnp.zeros((size,), jnp.float32)
    blocks = pl.cdiv(triton.load(extent_ref.at[batch]), _SLOTS)
    found = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(blocks - program, 0), programs), step, nothing)
    for ref, own in zip((mixed_ref, peak_ref, total_ref), found, strict=True):
        place = ref.at[program, batch, head, rows]
        triton.store(place, own, mask=held_Q if own.ndim == 1 else held_Q[:, None])
