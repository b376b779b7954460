"""The slots of continuous batching."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.inference.slots import Slots, active_values, empty_settings


def test_a_text_that_has_ended_asks_for_nothing():
    """Else the next texts would wait for what one before them was drawn with."""
    neutral = empty_settings(3)
    values = jax.tree.map(lambda each: each + 2, neutral.values)
    slots = Slots(
        caches=(),
        settings=neutral._replace(values=values),
        token_B=jnp.zeros((3,), jnp.int32),
        count_B=jnp.zeros((3,), jnp.int32),
        active_B=jnp.array([True, False, True]),
        seen_BV=jnp.zeros((3, 8), bool),
        history_BN=jnp.zeros((3, 4), jnp.int32),
    )
    for found_B1, own_B, none_B in zip(active_values(slots), values, neutral.values, strict=True):
        np.testing.assert_array_equal(found_B1, np.array([own_B[0], none_B[1], own_B[2]])[:, None])
