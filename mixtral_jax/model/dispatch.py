"""Moves tokens to their experts and back, by gathers in both directions of differentiation.

Slots stand in expert order. By capacity, each expert has G * C of them, C for each of G groups of tokens; dropless,
just as many as tokens chose it. With tokens choosing experts [[0, 1], [0, 2], [0, 1]], E = 3, one group and C = 2:

    slot        0     1     2     3     4     5
    expert      0     0     1     1     2     2
    token       0     1     0     2     1     -        token 2's first choice finds expert 0 full: it is dropped
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import Dispatch, require


class Slots(NamedTuple):
    """A place for each choice of each of N tokens, among M; both directions of the same relation."""

    slot_NA: jax.Array
    """int32, M where the choice has no place."""
    assignment_M: jax.Array
    """int32, n * A + a of the choice that holds the slot; N * A where it is empty."""


def capacity(dispatch: Dispatch, tokens: int, experts_per_token: int, num_experts: int) -> int:
    """Places an expert has for a group of so many real tokens; no more than could be wanted."""
    if dispatch.capacity_factor is None:
        return tokens
    balanced = experts_per_token * tokens / num_experts
    # 1.1 * 50 is a little over 55: a rounding error makes no place.
    return min(tokens, math.ceil(dispatch.capacity_factor * balanced - 1e-9))


def ranks(
    expert_GTA: jax.Array,
    mask_GT: jax.Array,
    num_experts: int,
    priority: str,
    gate_GTA: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each choice's place in its expert's queue within the group, from 0, and how many wait in each queue.

    Args:
      expert_GTA: int32, distinct in the last axis.
      mask_GT: bool; tokens that are not real stand in no queue.
      priority: `position`, `choice` or `probability`, see Dispatch.
      gate_GTA: float32, what `probability` goes by.

    Returns:
      int32 [G, T, A] and int32 [G, E].
    """
    num_groups, length, choices = expert_GTA.shape
    wanted_GTAE = jax.nn.one_hot(expert_GTA, num_experts, dtype=jnp.int32) * mask_GT[..., None, None]
    if priority == "choice":
        wanted_GTAE = jnp.swapaxes(wanted_GTAE, 1, 2)
    queue_GXE = wanted_GTAE.reshape(num_groups, length * choices, num_experts)
    if priority == "probability":
        assert gate_GTA is not None
        order_GX = jnp.argsort(-jax.lax.stop_gradient(gate_GTA).reshape(num_groups, -1), axis=1, stable=True)
        queue_GXE = jnp.take_along_axis(queue_GXE, order_GX[..., None], axis=1)
    before_GXE = jnp.cumsum(queue_GXE, axis=1) - queue_GXE
    rank_GX = jnp.sum(before_GXE * queue_GXE, axis=-1)
    if priority == "probability":
        rank_GX = jnp.take_along_axis(rank_GX, jnp.argsort(order_GX, axis=1), axis=1)
    if priority == "choice":
        rank_GTA = jnp.swapaxes(rank_GX.reshape(num_groups, choices, length), 1, 2)
    else:
        rank_GTA = rank_GX.reshape(num_groups, length, choices)
    return rank_GTA, jnp.sum(queue_GXE, axis=1)


def capacity_slots(
    expert_GTA: jax.Array,
    mask_GT: jax.Array,
    num_experts: int,
    dispatch: Dispatch,
    gate_GTA: jax.Array | None = None,
) -> Slots:
    """Slots by capacity: E * G * C of them, expert-major.

    A group's limit follows its real tokens, so padding neither takes places nor makes any. The gates are needed where
    the priority is by probability.
    """
    num_groups, length, choices = expert_GTA.shape
    places = capacity(dispatch, length, choices, num_experts)
    rank_GTA, _ = ranks(expert_GTA, mask_GT, num_experts, dispatch.priority, gate_GTA)
    # A table, since the device's float32 would round some limits up, and padding would then make a place.
    limits = jnp.array([capacity(dispatch, real, choices, num_experts) for real in range(length + 1)])
    limit_G = limits[jnp.sum(mask_GT, axis=1)]
    kept_GTA = (rank_GTA < limit_G[:, None, None]) & mask_GT[..., None]
    group_G11 = jnp.arange(num_groups)[:, None, None]
    slot_GTA = (expert_GTA * num_groups + group_G11) * places + rank_GTA
    return _invert(slot_GTA.reshape(-1, choices), kept_GTA.reshape(-1, choices), num_experts * num_groups * places)


def sorted_slots(expert_NA: jax.Array, mask_N: jax.Array, num_experts: int) -> tuple[Slots, jax.Array]:
    """Dropless slots, N * A of them: all of expert 0's, then all of expert 1's, and so on.

    Returns:
      The slots, and int32 [E], how many are each expert's.
    """
    rank_1NA, sizes_1E = ranks(expert_NA[None], mask_N[None], num_experts, "position")
    start_E = jnp.cumsum(sizes_1E[0]) - sizes_1E[0]
    slot_NA = rank_1NA[0] + start_E[expert_NA]
    kept_NA = jnp.broadcast_to(mask_N[:, None], expert_NA.shape)
    return _invert(slot_NA, kept_NA, expert_NA.size), sizes_1E[0]


def _invert(slot_NA: jax.Array, kept_NA: jax.Array, num_slots: int) -> Slots:
    slot_NA = jnp.where(kept_NA, slot_NA, num_slots)
    empty_M = jnp.full((num_slots,), slot_NA.size)
    assignment_M = empty_M.at[slot_NA.reshape(-1)].set(jnp.arange(slot_NA.size), mode="drop")
    return Slots(slot_NA, assignment_M)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of x at the index; zeros where it is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x_ND: jax.Array, slots: Slots) -> jax.Array:
    """Each slot's token, [M, D]; zeros in empty slots."""
    return _rows(x_ND, slots.assignment_M // slots.slot_NA.shape[1])


def _spread_forward(x_ND: jax.Array, slots: Slots) -> tuple[jax.Array, Slots]:
    return spread(x_ND, slots), slots


def _spread_backward(slots: Slots, gradient_MD: jax.Array) -> tuple[jax.Array, None]:
    # A token's gradient is the sum over its slots: a gather, where autodiff would scatter. Summed in float32.
    gradient_ND = jnp.sum(_rows(gradient_MD, slots.slot_NA), axis=1, dtype=jnp.float32)
    return gradient_ND.astype(gradient_MD.dtype), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(y_MD: jax.Array, slots: Slots) -> jax.Array:
    """Each choice's slot, [N, A, D]; zeros for a choice without one."""
    return _rows(y_MD, slots.slot_NA)


def _collect_forward(y_MD: jax.Array, slots: Slots) -> tuple[jax.Array, Slots]:
    return collect(y_MD, slots), slots


def _collect_backward(slots: Slots, gradient_NAD: jax.Array) -> tuple[jax.Array, None]:
    return _rows(gradient_NAD.reshape(-1, gradient_NAD.shape[-1]), slots.assignment_M), None


collect.defvjp(_collect_forward, _collect_backward)


def combine(y_MD: jax.Array, gate_NA: jax.Array, slots: Slots) -> jax.Array:
    """Each token's choices, weighted by its gates and summed in float32: [N, D]."""
    y_NAD = collect(y_MD, slots).astype(jnp.float32)
    return jnp.sum(y_NAD * gate_NA[..., None], axis=1)


def group(length: int, group_size: int, shards: int = 1) -> int:
    """Tokens a capacity group has in sequences of this length, split into so many shards.

    Raises:
      InputError: the group size does not divide a longer sequence, or its part on a shard.
    """
    size = min(group_size, length)
    allowed = f"must divide the {length // shards} tokens of a sequence{' on one shard' if shards > 1 else ''}"
    require(length % (shards * size) == 0, "group_size", group_size, allowed)
    return size
