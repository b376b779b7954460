"""The table from logical to mesh axes: complete, and never the same mesh axis twice."""

import jax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from oracles import tiny

from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.sharding.axes import LOGICAL_AXES, MESH_AXES
from mixtral_jax.sharding.rules import DECODING, TRAINING, Rules


@pytest.mark.parametrize("rules", [TRAINING, DECODING], ids=["training", "decoding"])
def test_a_table_covers_every_axis_once(rules):
    names = [name for name, _ in rules.table]
    assert sorted(names) == sorted(LOGICAL_AXES)
    assert {axis for _, axes in rules.table for axis in axes} <= set(MESH_AXES)


def test_refuses_a_table_with_gaps():
    table = tuple(rule for rule in TRAINING.table if rule[0] not in ("heads", "batch"))
    with pytest.raises(ValueError, match=r"no rule for the logical axes \['batch', 'heads'\]"):
        Rules(table)


def test_refuses_a_mesh_axis_twice():
    with pytest.raises(ValueError, match=r"\('hidden', 'heads'\) would use a mesh axis twice: .*tensor"):
        TRAINING.storage(("hidden", "heads"))
    with pytest.raises(ValueError, match=r"would use a mesh axis twice"):
        TRAINING.use(("batch", "experts"))


@pytest.mark.parametrize(
    ("names", "storage", "use"),
    [
        (("embed", "heads", "head_dim"), P(("fsdp", "expert"), ("tensor",), None), P(None, ("tensor",), None)),
        (
            ("experts", "expert_embed", "hidden"),
            P(("expert",), ("fsdp",), ("tensor",)),
            P(("expert",), None, ("tensor",)),
        ),
        (("layers", "norm"), P(None, None), P(None, None)),
        (("batch", "length"), P(("data", "fsdp", "expert"), ("context",)), P(("data", "fsdp", "expert"), ("context",))),
        (("embed", None), P(("fsdp", "expert"), None), P(None, None)),
    ],
)
def test_training_layouts(names, storage, use):
    assert TRAINING.storage(names) == storage
    assert TRAINING.use(names) == use


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_has_a_layout(family):
    """flax would leave a parameter with an unknown name unsharded and say nothing."""
    leaves = jax.tree.leaves(
        abstract_params(tiny.config(family)), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    for leaf in leaves:
        assert isinstance(leaf, nn.Partitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) - {None} <= set(LOGICAL_AXES)
        assert any(TRAINING.storage(leaf.names)) == ("norm" not in leaf.names)


def test_rules_are_hashable():
    assert hash(TRAINING) == hash(Rules(TRAINING.table, TRAINING.only_stored))
