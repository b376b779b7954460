"""Attention's softmax, of all keys at once or of some after others (Milakov and Gimelshein, 2018)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30
"""A score that is not to count. Finite: a row that sees nothing yields some mean of the values, not NaN."""


class Part(NamedTuple):
    """Attention to some of the keys, float32. All but the first array have one dimension less, the last."""

    mixed: jax.Array
    """The sums of the values by their weights, not divided by the weights' sums."""
    peak: jax.Array
    """The score whose weight is 1."""
    total: jax.Array
    """The weights' sums."""

    def attention(self) -> jax.Array:
        """The values' means by their weights."""
        return self.mixed / self.total[..., None]


def softmax(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights along the last dimension, not normalised; the score whose weight is 1; and the weights' sums."""
    scores = jnp.where(visible, scores, MASKED)
    peak = jnp.max(scores, axis=-1)
    weight = jnp.exp(scores - peak[..., None])
    return weight, peak, jnp.sum(weight, axis=-1)


def nothing(like: jax.Array) -> Part:
    """Attention to no keys, of queries of this shape."""
    zeros = jnp.zeros_like(like[..., 0])
    return Part(jnp.zeros_like(like), zeros + MASKED, zeros)


def together(one: Part, other: Part) -> Part:
    """Attention to the keys of both."""
    peak = jnp.maximum(one.peak, other.peak)
    by_one, by_other = (jnp.exp(each.peak - peak) for each in (one, other))
    mixed = one.mixed * by_one[..., None] + other.mixed * by_other[..., None]
    return Part(mixed, peak, one.total * by_one + other.total * by_other)
