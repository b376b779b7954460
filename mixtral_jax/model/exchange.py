"""Dropless expert parallelism: tokens travel to the shards that hold their experts, and their results back.

Each shard has M rows, one a choice of its tokens, in the order of the experts they chose; S shards hold E / S experts
each. A shard's queue is all rows for its experts, those of its first expert first, and of one expert those of the first
shard first. It may be S times as long as a shard's own rows, so it is served in rounds of R rows: as many rounds as the
longest queue takes. With S = 2, E = 2, and shards that send [2, 1] and [3, 0] rows to
experts 0 and 1, shard 0's queue has 5 rows and shard 1's has 1; for R = 4:

    round 0     shard 0 serves     rows 0, 1 of shard 0, rows 0, 1 of shard 1       shard 1 serves     row 2 of shard 0
    round 1     shard 0 serves     row 2 of shard 1                                 shard 1 serves     nothing

Sizes and offsets are pure functions of how many rows each shard has for each expert, which all shards know. Rows move
by `ragged_all_to_all`; where there is none, on CPU and on large slices of v5e, by an `all_to_all` at the same sizes and
offsets, which sends whole buffers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.sharding.chips import chip
from mixtral_jax.sharding.mesh import current_mesh


class Transfer(NamedTuple):
    """What a shard sends and receives, in K = E pieces: int32 arrays as `jax.lax.ragged_all_to_all` takes them."""

    from_K: jax.Array
    """The first row of each piece that it sends."""
    send_K: jax.Array
    """Rows of each piece that it sends, by the shard that it goes to."""
    to_K: jax.Array
    """Where each piece that it sends begins on the shard that it goes to."""
    receive_K: jax.Array
    """Rows of each piece that it receives, by the shard that it comes from."""


class Round(NamedTuple):
    """A shard's part in a round."""

    there: Transfer
    """Of rows to their experts."""
    back: Transfer
    """Of results to where the rows came from."""
    sizes_E: jax.Array
    """int32, rows in the buffer for each of the shard's own experts."""


def rounds(sizes_SE: jax.Array, rows: int) -> jax.Array:
    """Rounds of so many rows that the longest queue takes: int32, a scalar.

    Args:
      sizes_SE: rows that each shard has for each expert.
    """
    queue_S = jnp.sum(_by_holder(sizes_SE), axis=(1, 2))
    return jnp.max(-(-queue_S // rows))


def plan_round(sizes_SE: jax.Array, shard: jax.Array | int, number: jax.Array | int, rows: int) -> Round:
    """What a shard sends and receives in a round.

    Args:
      sizes_SE: int32, rows that each shard has for each expert.
      shard: which of the S this is.
      number: of the round, from 0.
      rows: R, of the buffer.
    """
    num_shards, num_experts = sizes_SE.shape
    # Where each piece begins: in the queue of its expert's holder, and among its own shard's rows. [E, S].
    size_ES = sizes_SE.T
    queue_HX = size_ES.reshape(num_shards, -1)
    in_queue_ES = (jnp.cumsum(queue_HX, axis=1) - queue_HX).reshape(num_experts, num_shards)
    at_home_ES = (jnp.cumsum(sizes_SE, axis=1) - sizes_SE).T
    # The part of each piece that falls into this round's rows of the queue.
    first_ES = jnp.clip(in_queue_ES, number * rows, (number + 1) * rows)
    served_ES = jnp.clip(in_queue_ES + size_ES, number * rows, (number + 1) * rows) - first_ES
    in_buffer_ES = first_ES - number * rows
    at_home_ES = at_home_ES + first_ES - in_queue_ES

    def of_holder(x_ES: jax.Array) -> jax.Array:
        """The pieces that come to this shard, by the shard that they come from."""
        return _by_holder(x_ES.T)[shard].reshape(-1)

    def of_sender(x_ES: jax.Array) -> jax.Array:
        """The pieces that this shard sends, by the expert, so by the shard that they go to."""
        return x_ES[:, shard]

    there = Transfer(of_sender(at_home_ES), of_sender(served_ES), of_sender(in_buffer_ES), of_holder(served_ES))
    back = Transfer(of_holder(in_buffer_ES), of_holder(served_ES), of_holder(at_home_ES), of_sender(served_ES))
    return Round(there, back, jnp.sum(served_ES.reshape(num_shards, -1, num_shards)[shard], axis=1))


def _by_holder(x_SE: jax.Array) -> jax.Array:
    """[S, E] as [S, S, E / S]: by the experts' holder, by the rows' shard, and by expert."""
    num_shards = x_SE.shape[0]
    return jnp.swapaxes(x_SE.reshape(num_shards, num_shards, -1), 0, 1)


def transfer(x_MD: jax.Array, moves: Transfer, into_RD: jax.Array, axis: str) -> jax.Array:
    """`into` with the rows in it that come from the axis's shards; to be called on each of them."""
    ragged = partial(jax.lax.ragged_all_to_all, axis_name=axis)
    emulated = partial(_emulated, axis=axis)
    elsewhere = ragged if _is_ragged() else emulated
    result: jax.Array = jax.lax.platform_dependent(x_MD, into_RD, *moves, cpu=emulated, default=elsewhere)
    return result


def _is_ragged() -> bool:
    """Whether the current mesh's chips have a ragged all-to-all; those that are not known are taken to."""
    mesh = current_mesh()
    if mesh is None or mesh.abstract_device is None:
        return True
    found = chip(mesh.abstract_device)
    return found is None or found.exchanges_ragged(mesh.size)


def _emulated(
    x_MD: jax.Array,
    into_RD: jax.Array,
    from_K: jax.Array,
    send_K: jax.Array,
    to_K: jax.Array,
    receive_K: jax.Array,
    *,
    axis: str,
) -> jax.Array:
    """ragged_all_to_all, of whole buffers: what one shard writes into another's, at its place, and zeros elsewhere."""
    num_shards, (num_rows, *_) = jax.lax.axis_size(axis), into_RD.shape
    row_1R = jnp.arange(num_rows)[None]
    first_K1, count_K1 = to_K[:, None], send_K[:, None]
    inside_KR = (row_1R >= first_K1) & (row_1R < first_K1 + count_K1)
    # One past the end where nothing is written; pieces of one receiver don't overlap.
    source_KR = jnp.where(inside_KR, from_K[:, None] + row_1R - first_K1, x_MD.shape[0])
    source_SR = jnp.min(source_KR.reshape(num_shards, -1, num_rows), axis=1)
    sent_SRD = x_MD.at[source_SR].get(mode="fill", fill_value=0)
    written_SR = source_SR < x_MD.shape[0]
    came_SRD = jax.lax.all_to_all(sent_SRD, axis, split_axis=0, concat_axis=0, tiled=True)
    written_SR = jax.lax.all_to_all(written_SR, axis, split_axis=0, concat_axis=0, tiled=True)
    written_R1 = jnp.any(written_SR, axis=0)[:, None]
    return jnp.where(written_R1, jnp.sum(came_SRD, axis=0, dtype=came_SRD.dtype), into_RD)
