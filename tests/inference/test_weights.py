"""Prepared weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.inference.weights import prepare, restore
from mixtral_jax.model.backends import few_rows
from mixtral_jax.model.backends.few_rows import ByOutput


@pytest.fixture(params=[True, False], ids=["fast-bfloat16", "slow-bfloat16"])
def fast(request, monkeypatch):
    """A CPU with units for bfloat16, and one without."""
    monkeypatch.setattr(few_rows, "are_for_this_host", lambda: not request.param)
    return request.param


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_restores_the_public_tree(family, tie, fast):
    config = tiny.config(family, tie_embeddings=tie)
    params = tiny.params(config)
    chex.assert_trees_all_equal(restore(prepare(params, config, Execution())), params)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = restore(prepare(short, config, Execution(weight_dtype="bfloat16")))
    chex.assert_trees_all_equal(jax.tree.map(jnp.float32, found), jax.tree.map(jnp.float32, short))


@pytest.mark.parametrize("execution", [Execution(product_dtype="bfloat16"), Execution(weight_dtype="bfloat16")])
def test_matrices_are_short_and_what_decides_is_not(execution, fast):
    config = tiny.config("mixtral")
    prepared = prepare(tiny.params(config), config, execution)
    layer = prepared.layers[0]
    query = layer["params" if fast else "prepared"]["attention"]["query"]
    assert isinstance(query, ByOutput) != fast
    assert {leaf.dtype for leaf in jax.tree.leaves((query, prepared.unembedding_DV))} == {jnp.dtype(jnp.bfloat16)}
    assert layer["params"]["moe"]["router"].dtype == jnp.float32
    assert layer["params"]["attention_norm"]["scale"].dtype == jnp.float32


def test_each_expert_is_an_array_of_its_own(fast):
    config = tiny.config("mixtral")
    params = tiny.params(config)
    experts = prepare(params, config, Execution()).layers[1]["prepared"]["moe"]["experts"]
    assert len(experts) == 4
    found = experts[2].down if fast else experts[2].down.values.T
    np.testing.assert_array_equal(found, params["layers"]["moe"]["down"][1, 2])


def test_a_matrix_in_bfloat16_stays_so_where_it_is_as_exact_and_faster(fast):
    """Whatever it is multiplied in."""
    config = tiny.config("mistral", tie_embeddings=True)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params(config))
    prepared = prepare(short, config, Execution())
    query = prepared.layers[0]["params" if fast else "prepared"]["attention"]["query"]
    assert jax.tree.leaves(query)[0].dtype == (jnp.float32 if fast else jnp.bfloat16)
    assert prepared.embedding_VD.dtype == jnp.float32  # for what one row of it is added to


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_embedding_lies_by_output_as_it_is(dtype, fast):
    config = tiny.config("mistral", tie_embeddings=True)
    prepared = prepare(tiny.params(config), config, Execution(weight_dtype=dtype))
    assert prepared.embedding_VD.dtype == dtype
    assert prepared.unembedding_DV is None if fast else prepared.unembedding_DV.values is prepared.embedding_VD
