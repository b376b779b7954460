"""What an uneven share of tokens costs, by the name of its definition, and a selection bias that evens it out instead.

All are the Switch formula, E * sum over experts of (share of choices) * (mean probability), and differ in whose tokens
the shares and means are taken over, and so in what a token's gradient depends on:

    name           tokens of                                          where routing is balanced
    per_sequence   one layer, one sequence                            k
    switch         one layer, one micro-batch                         k
    hf_global      all layers together, one micro-batch               k
    megatron       one layer, one data shard of a micro-batch, / k    1 a layer, summed over layers: L
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

BalanceName = Literal["per_sequence", "switch", "hf_global", "megatron"]


@dataclass(frozen=True)
class RouterTraining:
    """What training adds to the router; a model that only infers leaves it as it is."""

    balance: BalanceName = "per_sequence"
    """Whose tokens the balance loss is taken over."""
    jitter: float = 0.0
    """The router's input is multiplied by noise, uniform in 1 - jitter to 1 + jitter (Switch paper, section 2.2), where
    the module has a key of the name `jitter`."""


def per_sequence(choice_BTE: jax.Array, probability_BTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The formula in each sequence, float32 [B]; zero for one without real tokens.

    Args:
      choice_BTE: float32, 1 where the token chose the expert.
      probability_BTE: float32, the router's.
      mask_BT: bool, True for real tokens.
    """
    num_experts = probability_BTE.shape[-1]
    real_BT1 = mask_BT.astype(jnp.float32)[..., None]
    tokens_B1 = jnp.maximum(jnp.sum(real_BT1, axis=1), 1.0)
    share_BE = jnp.sum(choice_BTE * real_BT1, axis=1) / tokens_B1
    probability_BE = jnp.sum(probability_BTE * real_BT1, axis=1) / tokens_B1
    return num_experts * jnp.sum(share_BE * probability_BE, axis=-1)


def layer_loss(
    name: BalanceName, choice_BTE: jax.Array, probability_BTE: jax.Array, mask_BT: jax.Array, shards: int
) -> jax.Array:
    """A layer's balance loss times its real tokens, so that parts of a batch add up; zero for hf_global, see there.

    Args:
      shards: equal runs of rows that each lie on a data shard of their own.
    """
    if name == "hf_global":
        return jnp.zeros(())
    if name == "per_sequence":
        tokens_B = jnp.sum(mask_BT.astype(jnp.float32), axis=1)
        return jnp.sum(per_sequence(choice_BTE, probability_BTE, mask_BT) * tokens_B)
    parts, experts = (shards if name == "megatron" else 1), probability_BTE.shape[-1]
    real_BT1 = mask_BT.astype(jnp.float32)[..., None]
    assigned_XE, probability_XE = (
        jnp.sum((each * real_BT1).reshape(parts, -1, *each.shape[1:]), axis=(1, 2))
        for each in (choice_BTE, probability_BTE)
    )
    tokens_X = jnp.sum(real_BT1.reshape(parts, -1), axis=1)
    loss_X = experts * jnp.sum(assigned_XE * probability_XE, axis=1) / jnp.maximum(tokens_X, 1.0)
    if name == "megatron":
        loss_X /= jnp.maximum(jnp.sum(assigned_XE), 1.0) / jnp.maximum(jnp.sum(tokens_X), 1.0)  # k
    return jnp.sum(loss_X)


def hf_global(assigned_LE: jax.Array, probability_LE: jax.Array, tokens_L: jax.Array) -> jax.Array:
    """The formula over the tokens of all layers as one, times the tokens of a layer (transformers'
    `load_balancing_loss_func`). Layers that collapse each on experts of their own look balanced to it.

    Args:
      assigned_LE: float32, tokens that chose each expert.
      probability_LE: float32, sums of the router's probabilities.
      tokens_L: float32, real tokens.
    """
    num_experts = assigned_LE.shape[-1]
    tokens = jnp.maximum(jnp.sum(tokens_L), 1.0)
    product = jnp.sum(jnp.sum(assigned_LE, axis=0) * jnp.sum(probability_LE, axis=0))
    return num_experts * product / tokens**2 * tokens_L[0]


def shift_bias(bias_LE: jax.Array, assigned_LE: jax.Array, rate: float) -> jax.Array:
    """The selection bias after a step: up by the rate for an expert with less than its share, down for one with more.

    Balancing without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

    Args:
      assigned_LE: float32, tokens of the step's batch that chose each expert.
    """
    error_LE = jnp.mean(assigned_LE, axis=-1, keepdims=True) - assigned_LE
    return bias_LE + rate * jnp.sign(error_LE)
