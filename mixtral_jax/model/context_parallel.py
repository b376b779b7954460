"""Attention over a mesh: each device its own texts and heads, and of a sequence that is split, which keys and values a
shard needs of the others.

With a window of W a shard's queries see the W - 1 keys before its own first one: it gets those from its neighbours to
the left, whatever the sequence's length. With 4 tokens a shard and W = 7, shard 2 (tokens 8..11) needs tokens 2..7:

    from shard 0    tokens 2, 3        its last (W - 1) - 4
    from shard 1    tokens 4..7        all of it

Without a window each shard gets all keys and values: with grouped queries they are the smaller part of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import cached, chunked, flash, flash_decoding, splash
from mixtral_jax.model.backends.cached import Seen
from mixtral_jax.model.backends.chunked import Keys
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.sharding.chips import computes_on_old_gpu
from mixtral_jax.sharding.mesh import current_mesh, platform
from mixtral_jax.sharding.partition import num_parts, token_axes
from mixtral_jax.sharding.rules import Rules


def attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array | None,
    window: int | None,
    execution: Execution,
    rules: Rules,
) -> jax.Array:
    """What `chunked.self_attention` gives, float32 [B, T, K, G, H], of arrays that the current mesh may split."""
    mesh, axes, length = current_mesh(), rules.mesh_axes("length"), q_BTKGH.shape[1]
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    split = shards > 1
    kernels = kernels_for(execution, length // shards, q_BTKGH.shape[-1], not split or window is not None)
    if kernels and computes_on_old_gpu():
        kernels = {}
    on_device = partial(_on_device, window=window, execution=execution, kernels=kernels)
    if mesh is None or not (split or kernels):
        return on_device(q_BTKGH, Keys(k_BTKH, v_BTKH, segment_BT), segment_BT)
    gather = _all if window is None else partial(_neighbours, halo=window - 1)

    def on_shard(q_BTKGH: jax.Array, *own: Any) -> jax.Array:
        keys = Keys(*own)
        return on_device(q_BTKGH, gather(keys, *axes) if split else keys, keys.segment_BS)

    # Over the batch's axes too: the compiler would gather whole batches around a collective that it did not place. A
    # kernel it can't divide at all.
    tokens = rules.use(("batch", "length"))
    layout = rules.use(("batch", "length", "kv_heads")) if kernels else tokens
    names = set(mesh.axis_names if kernels else token_axes(rules))
    specs = (layout, layout, layout, tokens)
    mapped = jax.shard_map(on_shard, in_specs=specs, out_specs=layout, axis_names=names, check_vma=False)
    mixed_BTKGH: jax.Array = mapped(q_BTKGH, k_BTKH, v_BTKH, segment_BT)
    return mixed_BTKGH


def kernels_for(execution: Execution, length: int, head_dim: int, place_is_known: bool) -> dict[str, Any]:
    """The kernels that take so many queries of a device, by jax's name of their platform.

    Args:
      place_is_known: where they lie among the keys, when compiling.
    """
    if execution.attention == "xla":
        return {}
    shape = length, head_dim, execution.product_dtype
    kernels = {"tpu": splash.self_attention} if place_is_known and splash.suits(*shape) else {}
    return kernels | ({"cuda": flash.self_attention} if flash.suits(*shape) else {})


def _on_device(
    q_BTKGH: jax.Array,
    keys: Keys,
    segment_BT: jax.Array | None,
    window: int | None,
    execution: Execution,
    kernels: dict[str, Any],
) -> jax.Array:
    given, dtype = (q_BTKGH, keys, segment_BT, window), execution.product_dtype
    by_xla = partial(chunked.self_attention, *given, execution.attention_chunk, dtype)
    if not kernels:
        return by_xla()
    by_platform = {platform: partial(kernel, *given, dtype) for platform, kernel in kernels.items()}
    mixed_BTKGH: jax.Array = jax.lax.platform_dependent(**by_platform, default=by_xla)
    return mixed_BTKGH


def attention_to_cache(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array | Quantized,
    v_BKSH: jax.Array | Quantized,
    seen: Seen,
    execution: Execution,
    rules: Rules,
) -> jax.Array:
    """What `cached.cached_attention` gives, float32 [B, T, K, G, H], where the current mesh may split the heads."""
    dtype, given = execution.product_dtype, (q_BTKGH, k_BKSH, v_BKSH, seen)
    shards = num_parts("kv_heads", rules)
    by_xla = partial(cached.cached_attention, chunk=execution.attention_chunk, product_dtype=dtype, shards=shards)
    has_kernel = has_kernel_for_cache(execution, q_BTKGH.shape[-1], platform()) and not computes_on_old_gpu()
    if not (has_kernel and flash_decoding.can_address(k_BKSH, seen, shards)):
        return by_xla(*given)
    kernel = over_heads(partial(flash_decoding.cached_attention, product_dtype=dtype), rules)
    mixed_BTKGH: jax.Array = jax.lax.platform_dependent(*given, cuda=kernel, default=by_xla)
    return mixed_BTKGH


def over_heads(kernel: Callable[..., jax.Array], rules: Rules) -> Callable[..., jax.Array]:
    """Attention to a cache, each device of the current mesh its own heads: the compiler can't divide a kernel."""
    if current_mesh() is None:
        return kernel
    queries = rules.use(("batch", "length", "kv_heads"))
    specs = (queries, *[rules.use(("batch", "kv_heads"))] * 2, rules.use(("batch",)))
    mapped: Callable[..., jax.Array] = jax.shard_map(kernel, in_specs=specs, out_specs=queries, check_vma=False)
    return mapped


def has_kernel_for_cache(execution: Execution, head_dim: int, platform: str) -> bool:
    """Whether attention to a cache is a kernel's on a platform, by jax's name of it or a plan's."""
    if execution.attention == "xla" or platform not in ("gpu", "cuda"):
        return False
    return flash_decoding.suits(head_dim, execution.product_dtype, execution.kept_dtype)


def halo_pieces(halo: int, length: int, num_shards: int) -> list[tuple[int, int]]:
    """Where a shard of `length` tokens gets the `halo` tokens before its own: how many shards to the left, and how many
    of that shard's last tokens; the farthest first. No farther than there are shards.

    A halo of 6 over shards of 4: [(2, 2), (1, 4)].
    """
    hops = min(-(-halo // length), num_shards - 1)
    return [(hop, min(length, halo - (hop - 1) * length)) for hop in range(hops, 0, -1)]


def _neighbours(own: Keys, axis: str, halo: int) -> Keys:
    """A shard's keys and those of the halo before them. The first shards have fewer neighbours than places for them."""
    length, num_shards = own.k_BSKH.shape[1], jax.lax.axis_size(axis)
    pieces = halo_pieces(halo, length, num_shards)

    def extend(x: jax.Array) -> jax.Array:
        received = [
            jax.lax.ppermute(x[:, length - count :], axis, [(i, i + hop) for i in range(num_shards - hop)])
            for hop, count in pieces
        ]
        return jnp.concatenate([*received, x], axis=1)

    before = sum(count for _, count in pieces)
    absent = jnp.maximum(before - jax.lax.axis_index(axis) * length, 0)
    return _each(extend, own)._replace(first_query=before, absent=absent)


def _all(own: Keys, axis: str) -> Keys:
    """The keys of the whole sequence."""
    gather: Any = partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    return _each(gather, own)._replace(first_query=jax.lax.axis_index(axis) * own.k_BSKH.shape[1])


def _each(function: Any, keys: Keys) -> Keys:
    segment_BS = None if keys.segment_BS is None else function(keys.segment_BS)
    return Keys(function(keys.k_BSKH), function(keys.v_BSKH), segment_BS)
