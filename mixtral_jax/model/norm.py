"""RMSNorm (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from mixtral_jax.model.recompute import recomputed


def rms_normalize(x: jax.Array, epsilon: float) -> jax.Array:
    """x over the root of its mean square along the last axis, in x's dtype."""
    x_float32 = x.astype(jnp.float32)  # a sum of squares in bfloat16 would lose 5 of 8 bits
    mean_square = jnp.mean(jnp.square(x_float32), axis=-1, keepdims=True)
    return (x_float32 * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Normalises the last axis and scales it; the cast back to x's dtype comes before the scale, as in the original."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initializer = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", initializer, (x.shape[-1],), jnp.float32)

        @recomputed
        def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
            return rms_normalize(x, self.epsilon) * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

        return normalize(x, scale)  # x in float32, twice, would be kept for the backward pass
