"""The single tensors of a model are its parameter tree, no more and no less."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from oracles import tiny

from mixtral_jax.model.tensors import assign, look_up, tensors
from mixtral_jax.model.transformer import abstract_params

CONFIGS = [tiny.config(family, tie_embeddings=tied) for family in tiny.FAMILIES for tied in (False, True)]


@pytest.mark.parametrize("config", CONFIGS)
def test_together_they_are_exactly_the_leaves(config):
    seen = jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), nn.unbox(abstract_params(config)))
    for tensor in tensors(config):
        assert look_up(seen, tensor).shape == tensor.shape
        leaf = seen
        for key in tensor.path:
            leaf = leaf[key]
        leaf[tensor.index] += 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen):
        assert (leaf == 1).all(), path


@pytest.mark.parametrize("config", CONFIGS)
def test_names_are_unique(config):
    names = [tensor.name for tensor in tensors(config)]
    assert len(set(names)) == len(names)
    assert ("unembedding" in names) != config.tie_embeddings


def test_names_kinds_and_axes():
    found = {tensor.name: tensor for tensor in tensors(tiny.config("mixtral"))}
    gate = found["layers.1.moe.gate.3"]
    assert (gate.kind, gate.layer, gate.expert, gate.shape) == ("moe.gate", 1, 3, (16, 24))
    query = found["layers.0.attention.query"]
    assert (query.kind, query.layer, query.expert, query.shape) == ("attention.query", 0, None, (16, 4, 8))
    norm = found["norm.scale"]
    assert (norm.kind, norm.layer, norm.index) == ("norm.scale", None, ())
    assert all(len(tensor.axes) == len(tensor.shape) for tensor in found.values())


def test_assign_makes_the_tables_on_the_way():
    tree = {"a": {"b": 1}}
    assign(tree, ("a", "c", "d"), 2)
    assign(tree, ("e",), 3)
    assert tree == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
