"""Who goes where: the router's choice, and what it says of balance. Pure functions; nothing here moves a token.

Everything is float32: probabilities decide by small differences, and a flip sends a token to another expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.model.balance import BalanceName, layer_loss, per_sequence


class Routing(NamedTuple):
    """The router's choice for each token."""

    logits_BTE: jax.Array
    """float32."""
    probability_BTE: jax.Array
    """float32, over all experts."""
    expert_BTA: jax.Array
    """int32, the chosen experts, the best score first; ties go to the lower index."""
    gate_BTA: jax.Array
    """float32, the chosen experts' weights, which sum to 1."""


class Statistics(NamedTuple):
    """What a layer's routing did, as float32 sums over real tokens, so that parts of a batch add up; see `means`."""

    assigned_E: jax.Array
    """Tokens that chose each expert."""
    dropped: jax.Array
    """Choices that found their expert full."""
    entropy: jax.Array
    """Of the router's distribution, in nats."""
    z_loss: jax.Array
    """Squared log of the router's partition function (ST-MoE, equation 5)."""
    balance_loss: jax.Array
    """The balance loss by the tokens that it is taken over; see `balance.layer_loss`."""
    tokens: jax.Array
    """Real tokens."""
    probability_E: jax.Array | None = None
    """The router's probabilities; None unless the balance loss is hf_global, which needs them of all layers."""


def route(logits_BTE: jax.Array, experts_per_token: int, bias_E: jax.Array | None = None) -> Routing:
    """Softmax over all experts, the top k, renormalised over those (Mixtral paper, section 2.1).

    Args:
      logits_BTE: float32.
      bias_E: float32, added to the probabilities for choosing alone: the gates are of the probabilities themselves.
    """
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    if bias_E is None:
        top_BTA, expert_BTA = jax.lax.top_k(probability_BTE, experts_per_token)
    else:
        score_BTE = jax.lax.stop_gradient(probability_BTE) + bias_E[None, None]
        expert_BTA = jax.lax.top_k(score_BTE, experts_per_token)[1]
        top_BTA = jnp.take_along_axis(probability_BTE, expert_BTA, axis=-1)
    return Routing(logits_BTE, probability_BTE, expert_BTA, top_BTA / jnp.sum(top_BTA, axis=-1, keepdims=True))


def balance_loss(routing: Routing, mask_BT: jax.Array) -> jax.Array:
    """The Switch formula in each sequence: E * sum over experts of (share of choices) * (mean probability).

    Balanced routing gives k, the number of experts a token; all tokens on the same k experts up to E. It is a
    sequence's own, so its gradient does not depend on what else is in the batch (Switch paper, equation 4, a sequence
    at a time).

    Args:
      mask_BT: bool, True for real tokens.

    Returns:
      float32 [B]; zero for a sequence without real tokens.
    """
    choice_BTE = _choices(routing.expert_BTA, routing.probability_BTE.shape[-1])
    return per_sequence(choice_BTE, routing.probability_BTE, mask_BT)


def statistics(
    routing: Routing,
    kept_BTA: jax.Array,
    mask_BT: jax.Array,
    balance: BalanceName = "per_sequence",
    shards: int = 1,
) -> Statistics:
    """The sums of a layer.

    Args:
      kept_BTA: bool, whether the choice found a place.
      mask_BT: bool, True for real tokens.
      balance: whose tokens the balance loss is taken over.
      shards: that the rows lie on, for the loss that is a data shard's.
    """
    real_BT = mask_BT.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(routing.logits_BTE, axis=-1)
    entropy_BT = log_z_BT - jnp.sum(routing.probability_BTE * routing.logits_BTE, axis=-1)
    together = balance == "hf_global"
    chosen_BTE = _choices(routing.expert_BTA, routing.logits_BTE.shape[-1])
    return Statistics(
        assigned_E=jnp.sum(chosen_BTE * real_BT[..., None], axis=(0, 1)),
        dropped=jnp.sum(~kept_BTA * real_BT[..., None]),
        entropy=jnp.sum(entropy_BT * real_BT),
        z_loss=jnp.sum(jnp.square(log_z_BT) * real_BT),
        balance_loss=layer_loss(balance, chosen_BTE, routing.probability_BTE, mask_BT, shards),
        tokens=jnp.sum(real_BT),
        probability_E=jnp.sum(routing.probability_BTE * real_BT[..., None], axis=(0, 1)) if together else None,
    )


def _choices(expert_BTA: jax.Array, num_experts: int) -> jax.Array:
    """float32 [B, T, E]: 1 where the token chose the expert."""
    return jnp.sum(jax.nn.one_hot(expert_BTA, num_experts, dtype=jnp.float32), axis=2)
