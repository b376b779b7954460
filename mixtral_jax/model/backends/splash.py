"""Attention for TPU by jax's splash kernel: scores stay on the chip, and blocks of them that no query sees are skipped.

The kernel takes fewer key heads than query heads as they are. What its mask can't say, that some of the first places
hold nothing, is said by segments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mixtral_jax.model.backends.chunked import Keys

LANES = 128
"""Of a TPU's vector registers: lengths, and what a head is wide, are multiples of it."""
BLOCKS = (512, 256, 128)
"""Queries, and keys, of a block; the largest that divides the queries is taken."""
_NOTHING = -1  # a segment of no token


def suits(length: int, head_dim: int, product_dtype: str) -> bool:
    """Whether the kernel takes so many queries; it rounds to bfloat16, and must know their place among the keys."""
    return length % LANES == 0 and head_dim % LANES == 0 and product_dtype == "bfloat16"


def self_attention(
    q_BTKGH: jax.Array,
    keys: Keys,
    segment_BT: jax.Array | None,
    window: int | None,
    product_dtype: str,
    interpret: bool = False,
) -> jax.Array:
    """What `chunked.self_attention` gives, of queries and keys that `suits` accepts, and on one device.

    Args:
      interpret: run it step by step on any platform, which is slow, for tests.

    Returns:
      float32 [B, T, K, G, H].
    """
    assert isinstance(keys.first_query, int)
    batch, length, num_kv_heads, num_groups, head_dim = q_BTKGH.shape
    block = next(size for size in BLOCKS if length % size == 0)
    padding = -keys.k_BSKH.shape[1] % block
    first_query, num_places = keys.first_query + padding, keys.k_BSKH.shape[1] + padding
    scaled_BTKGH = (q_BTKGH.astype(jnp.float32) * head_dim**-0.5).astype(product_dtype)
    q_BNTH = scaled_BTKGH.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)
    k_BKSH, v_BKSH = (
        jnp.pad(x_BSKH.astype(product_dtype), ((0, 0), (padding, 0), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for x_BSKH in (keys.k_BSKH, keys.v_BSKH)
    )
    kernel = _kernel(num_kv_heads * num_groups, (length, num_places), first_query, window, block, interpret)
    mixed_BNTH: Any = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, _segments(keys, segment_BT, padding, (batch, length)))
    mixed_BTKGH: jax.Array = mixed_BNTH.transpose(0, 2, 1, 3).reshape(q_BTKGH.shape).astype(jnp.float32)
    return mixed_BTKGH


def _segments(
    keys: Keys, segment_BT: jax.Array | None, padding: int, shape: tuple[int, int]
) -> splash_attention_kernel.SegmentIds | None:
    """Of queries and of padded keys; None where the mask says it all."""
    whole = isinstance(keys.absent, int) and keys.absent == 0
    if segment_BT is None and whole and padding == 0:
        return None
    places_BS = jnp.zeros((shape[0], keys.k_BSKH.shape[1]), jnp.int32)
    if segment_BT is None or keys.segment_BS is None:
        segment_BT, segment_BS = jnp.zeros(shape, jnp.int32), places_BS
    else:
        segment_BS = keys.segment_BS.astype(jnp.int32)
    held_S = jnp.arange(places_BS.shape[1]) >= keys.absent
    segment_BS = jnp.where(held_S[None], segment_BS, _NOTHING)
    segment_BS = jnp.pad(segment_BS, ((0, 0), (padding, 0)), constant_values=_NOTHING)
    return splash_attention_kernel.SegmentIds(segment_BT.astype(jnp.int32), segment_BS)


def _kernel(
    num_heads: int, shape: tuple[int, int], first_query: int, window: int | None, block: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    mask: splash_attention_mask.Mask
    if window is None:
        mask = splash_attention_mask.CausalMask(shape, first_query)
    else:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), first_query)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * num_heads), block_sizes=sizes, interpret=interpret
    )
