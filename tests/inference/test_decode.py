"""The parts of a step."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import Execution
from mixtral_jax.inference.decode import embed
from mixtral_jax.inference.weights import Prepared


def test_a_token_is_a_row_of_the_embedding_and_a_loop_makes_no_copy_of_it():
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.standard_normal((4096, 64)), jnp.bfloat16)
    tokens_BT = jnp.asarray(rng.integers(0, 4096, (2, 3)), jnp.int32)

    @jax.jit
    def sums(table_VD, tokens_BT, turns):
        def turn(number, total_BTD):
            weights = Prepared(table_VD, (), None, None)
            return total_BTD + embed(weights, tokens_BT + number, Execution(activation_dtype="float32"))

        return jax.lax.fori_loop(0, turns, turn, jnp.zeros((*tokens_BT.shape, 64)))

    table = np.asarray(table_VD, np.float32)
    tokens = np.minimum(tokens_BT, 4094)
    np.testing.assert_array_equal(sums(table_VD, tokens, 2), table[tokens] + table[tokens + 1])
    used = sums.lower(table_VD, tokens, 2).compile().memory_analysis()
    assert used.temp_size_in_bytes < table_VD.nbytes / 8
