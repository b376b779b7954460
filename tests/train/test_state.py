"""The state is made in its place, the same on every mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import tiny

from mixtral_jax.errors import InputError
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.optimizer import OptimizerConfig, make_optimizer
from mixtral_jax.train.state import abstract_state, create, init_state

CONFIG = tiny.config("mixtral")
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


@pytest.fixture(scope="module")
def state(mesh):
    return init_state(CONFIG, OPTIMIZER, mesh, TRAINING, seed=0)


def _moments(state):
    """Adam's first and second moments."""
    return [
        next(part for part in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(part))[i] for i in (1, 2)
    ]


def _is_adam(part):
    return hasattr(part, "mu")


def test_abstract_state_is_what_is_made(mesh, state):
    shapes, shardings = abstract_state(CONFIG, OPTIMIZER, mesh, TRAINING)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    for leaf, shape, sharding in zip(*map(jax.tree.leaves, (state, shapes, shardings)), strict=True):
        assert leaf.sharding == shape.sharding == sharding


def test_experts_and_their_moments_are_split(state):
    """4 experts over two shards, 16 wide over fsdp = 2, 24 hidden over tensor = 2: an eighth on each device."""
    for tree in (state.params, *_moments(state)):
        gate, down = (tree["layers"]["moe"][name] for name in ("gate", "down"))
        assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 2, 8, 12)}
        assert {shard.data.shape for shard in down.addressable_shards} == {(2, 2, 12, 8)}
        assert len({str(shard.index) for shard in gate.addressable_shards}) == 8


def test_other_weights_are_split_over_expert_too(state):
    for tree in (state.params, *_moments(state)):
        assert tree["embedding"].addressable_shards[0].data.shape == (20, 4)
        assert tree["layers"]["attention"]["query"].addressable_shards[0].data.shape == (2, 4, 2, 8)


def test_starts_at_zero(state):
    assert state.step == 0
    assert state.step.dtype == jnp.int32
    for leaf in jax.tree.leaves(_moments(state)):
        assert leaf.dtype == jnp.float32
        assert not np.any(leaf)


def test_does_not_depend_on_the_mesh(state):
    one = init_state(CONFIG, OPTIMIZER, make_mesh(MeshConfig(), jax.devices()[:1]), TRAINING, seed=0)
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(one), rtol=1e-6)


def test_depends_on_the_seed(mesh, state):
    other = init_state(CONFIG, OPTIMIZER, mesh, TRAINING, seed=1)
    assert np.all(np.asarray(other.params["embedding"]) != np.asarray(state.params["embedding"]))


def test_refuses_a_mesh_that_does_not_divide():
    mesh = make_mesh(MeshConfig(expert=8))
    message = r"mesh = 'expert=8': [^$]*dimension 1 of params\.layers\.moe\.down is 4, not divisible by expert = 8"
    with pytest.raises(InputError, match=message) as caught:
        abstract_state(CONFIG, OPTIMIZER, mesh, TRAINING)
    for name in ("gate", "up", "down"):
        assert str(caught.value).count(f"moe.{name} ") == 3  # the weight and its two moments


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_create(self):
        state = self.variant(lambda key: create(CONFIG, OPTIMIZER, key))(jax.random.key(0))
        params = nn.unbox(state.params)
        chex.assert_trees_all_equal_structs(params, tiny.params(CONFIG))
        chex.assert_trees_all_equal_shapes_and_dtypes(params, *(nn.unbox(tree) for tree in _moments(state)))
