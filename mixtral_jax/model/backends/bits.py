"""Numbers in bfloat16 kept as their bits, in uint16.

Of operations on bfloat16 XLA:CPU knows products alone: to write or to slice an array of it, it would make float32 of
the whole, and bfloat16 of that. Whole numbers it takes as they are.
"""

import jax
import jax.numpy as jnp

BITS = jnp.dtype(jnp.uint16)


def bits(numbers: jax.Array) -> jax.Array:
    """The bits of numbers, which are cast to bfloat16."""
    return jax.lax.bitcast_convert_type(numbers.astype(jnp.bfloat16), BITS)


def numbers(kept: jax.Array) -> jax.Array:
    """The numbers whose bits these are; an array of another dtype as it is."""
    return jax.lax.bitcast_convert_type(kept, jnp.bfloat16) if kept.dtype == BITS else kept
