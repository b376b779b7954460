"""Prepared weights."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.inference.weights import prepare, restore


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_restores_the_public_tree(family, tie):
    config = tiny.config(family, tie_embeddings=tie)
    params = tiny.params(config)
    chex.assert_trees_all_equal(restore(prepare(params, config, Execution())), params)


def test_matrices_are_short_and_what_decides_is_not():
    config = tiny.config("mixtral")
    prepared = prepare(tiny.params(config), config, Execution(product_dtype="bfloat16"))
    layer = prepared.layers[0]
    assert layer["params"]["attention"]["query"].dtype == jnp.bfloat16
    assert layer["params"]["moe"]["router"].dtype == jnp.float32
    assert layer["params"]["attention_norm"]["scale"].dtype == jnp.float32


def test_each_expert_is_an_array_of_its_own():
    config = tiny.config("mixtral")
    params = tiny.params(config)
    experts = prepare(params, config, Execution()).layers[1]["prepared"]["moe"]["experts"]
    assert len(experts) == 4
    np.testing.assert_array_equal(experts[2].down, params["layers"]["moe"]["down"][1, 2])
