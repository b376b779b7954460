"""Floating-point operations of the model, counted from its shapes; a multiply-add is two."""

from __future__ import annotations

from typing import NamedTuple

from mixtral_jax.config import ModelConfig


class Flops(NamedTuple):
    """Operations a token, in two counts that differ in attention."""

    causal: float
    """Each query against the keys that it sees, on average over the sequence."""
    full: float
    """Each query against the whole sequence: what is often quoted, and flatters."""


def forward_flops(config: ModelConfig, length: int) -> Flops:
    """Operations of the forward pass, a token of a sequence of this length."""
    heads, dim = config.num_heads * config.head_dim, config.dim
    projections = 2 * dim * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    feed_forward = 2 * 3 * dim * config.hidden_dim
    if config.moe is not None:
        feed_forward = feed_forward * config.moe.experts_per_token + 2 * dim * config.moe.num_experts
    fixed = config.num_layers * (projections + feed_forward) + 2 * dim * config.vocab_size
    a_key = config.num_layers * 2 * 2 * heads  # of scores, and of mixing values
    return Flops(fixed + a_key * visible_keys(length, config.sliding_window), fixed + a_key * length)


def training_flops(config: ModelConfig, length: int) -> Flops:
    """Operations of forward and backward, a token; what is computed again for want of memory does not count."""
    return Flops(*(3 * count for count in forward_flops(config, length)))


def visible_keys(length: int, window: int | None) -> float:
    """Keys that a query sees, on average: for T = 4 and W = 2, (1 + 2 + 2 + 2) / 4."""
    span = length if window is None else min(window, length)
    return (span * (span + 1) / 2 + (length - span) * span) / length
