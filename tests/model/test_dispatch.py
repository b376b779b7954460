"""Slots by hand, against queues simulated one choice at a time, and moving tokens there and back."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import mixture

from mixtral_jax.config import Dispatch
from mixtral_jax.errors import InputError
from mixtral_jax.model import dispatch as d

# The module's docstring: token 2's first choice finds expert 0 full.
DOCSTRING = jnp.array([[[0, 1], [0, 2], [0, 1]]])


def _slots(expert_GTA, mask_GT, num_experts, gate_GTA=None, **kwargs):
    return d.capacity_slots(jnp.asarray(expert_GTA), jnp.asarray(mask_GT), num_experts, Dispatch(**kwargs), gate_GTA)


def _random_choices(rng, groups, length, choices, experts):
    order = np.argsort(rng.random((groups, length, experts)), axis=-1)
    return order[..., :choices].astype(np.int32), rng.random((groups, length)) < 0.8


def test_the_docstrings_example():
    """C = ceil(1.0 * 2 * 3 / 3) = 2."""
    slots = _slots(DOCSTRING, np.ones((1, 3), bool), 3, capacity_factor=1.0)
    np.testing.assert_array_equal(slots.slot_NA, [[0, 2], [1, 4], [6, 3]])
    # n * A + a: token 0's first, 1's first, 0's second, 2's second, 1's second, empty.
    np.testing.assert_array_equal(slots.assignment_M, [0, 2, 1, 5, 3, 6])


def test_priorities_by_hand():
    """Three tokens, two experts, C = ceil(0.5 * 2 * 3 / 2) = 2: each expert is wanted by all.

    By position tokens 0 and 1 fill both. By choice expert 1 first serves token 2, whose first choice it is, then 0. By
    probability expert 0 serves token 1 at 0.9 and token 0 at 0.6, and expert 1 token 2 at 0.7 and token 0 at 0.4.
    """
    expert = np.array([[[0, 1], [0, 1], [1, 0]]])
    gate = jnp.array([[[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]])
    mask = np.ones((1, 3), bool)
    priorities = ("position", "choice", "probability")
    kept = {p: _kept(_slots(expert, mask, 2, gate, capacity_factor=0.5, priority=p)) for p in priorities}
    assert kept["position"].tolist() == [[True, True], [True, True], [False, False]]
    assert kept["choice"].tolist() == [[True, True], [True, False], [True, False]]
    assert kept["probability"].tolist() == [[True, True], [True, False], [True, False]]


def _kept(slots):
    return np.asarray(slots.slot_NA < slots.assignment_M.size)


def test_ranks_by_hand():
    expert = jnp.array([[[1, 0], [1, 2], [0, 1]]])
    rank, sizes = d.ranks(expert, jnp.ones((1, 3), bool), 3, "position")
    np.testing.assert_array_equal(rank, [[[0, 0], [1, 0], [1, 2]]])
    np.testing.assert_array_equal(sizes, [[2, 3, 1]])
    rank, _ = d.ranks(expert, jnp.ones((1, 3), bool), 3, "choice")
    np.testing.assert_array_equal(rank, [[[0, 1], [1, 0], [0, 2]]])
    rank, sizes = d.ranks(expert, jnp.array([[False, True, True]]), 3, "position")
    np.testing.assert_array_equal(rank[:, 1:], [[[0, 0], [0, 1]]])
    np.testing.assert_array_equal(sizes, [[1, 2, 1]])


@pytest.mark.parametrize(
    ("factor", "tokens", "choices", "experts", "places"),
    [
        (1.0, 16, 2, 8, 4),
        (1.0, 17, 2, 8, 5),
        (1.25, 16, 2, 8, 5),
        (1.2, 50, 2, 8, 15),
        (1.1, 200, 2, 8, 55),
        (0.01, 16, 2, 8, 1),
        (100.0, 16, 2, 8, 16),
        (1.0, 0, 2, 8, 0),
        (None, 16, 2, 8, 16),
    ],
)
def test_capacity(factor, tokens, choices, experts, places):
    assert d.capacity(Dispatch(capacity_factor=factor), tokens, choices, experts) == places


@settings(max_examples=300)
@given(st.integers(1, 400), st.integers(0, 4096), st.integers(1, 4), st.integers(4, 16))
def test_capacity_is_exact_for_decimal_factors(hundredths, tokens, choices, experts):
    dispatch = Dispatch(capacity_factor=hundredths / 100)
    expected = min(tokens, math.ceil(mixture.places(dispatch, tokens, choices, experts)))
    assert d.capacity(dispatch, tokens, choices, experts) == expected


@pytest.mark.parametrize("priority", ["position", "choice", "probability"])
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0, 1.2, 2.0, None])
@pytest.mark.parametrize("group", [5, 10])
def test_served_as_in_a_queue(factor, priority, group):
    rng = np.random.default_rng(0)
    expert_BTA, mask_BT = _random_choices(rng, 3, 10, 2, 4)
    gate_BTA = np.float32(rng.integers(0, 8, (3, 10, 2)) / 8)  # some are like others
    dispatch = Dispatch(capacity_factor=factor, priority=priority, group_size=group)
    groups = (each.reshape(-1, group, *each.shape[2:]) for each in (expert_BTA, mask_BT, gate_BTA))
    expert_GTA, mask_GT, gate_GTA = map(jnp.asarray, groups)
    slots = _slots(expert_GTA, mask_GT, 4, gate_GTA, capacity_factor=factor, priority=priority)
    kept = _kept(slots).reshape(3, 10, 2)
    np.testing.assert_array_equal(kept, mixture.served(expert_BTA, mask_BT, 4, dispatch, gate_BTA))
    assert factor in (None, 2.0) or not kept[mask_BT].all()


@pytest.mark.parametrize("factor", [0.5, 1.2, None])
def test_slots_are_the_experts_own_and_both_directions_agree(factor):
    expert_GTA, mask_GT = _random_choices(np.random.default_rng(1), 3, 10, 2, 4)
    slots = jax.tree.map(np.asarray, _slots(expert_GTA, mask_GT, 4, capacity_factor=factor))
    num_slots, assignments = slots.assignment_M.size, slots.slot_NA.size
    places = num_slots // (4 * 3)
    taken = slots.slot_NA[_kept(slots)]
    assert len(set(taken)) == len(taken)
    np.testing.assert_array_equal(taken // (3 * places), expert_GTA.reshape(-1, 2)[_kept(slots)])
    filled = slots.assignment_M < assignments
    assert filled.sum() == len(taken)
    np.testing.assert_array_equal(slots.slot_NA.ravel()[slots.assignment_M[filled]], np.flatnonzero(filled))


def test_padding_makes_no_place_where_a_float32_would_round_up():
    """1.2 * 2 * 50 / 8 is 15; as float32 it is a little more. All 50 tokens choose experts 0 and 1."""
    expert = np.zeros((1, 64, 2), np.int32) + np.array([0, 1])
    real = np.arange(64)[None] < 50
    padded = _kept(_slots(expert, real, 8, capacity_factor=1.2))
    short = _kept(_slots(expert[:, :50], real[:, :50], 8, capacity_factor=1.2))
    assert padded[:, 0].sum() == short[:, 0].sum() == 15


def test_sorted_slots_by_hand():
    """Token 1 is padding: expert 0 has token 0, expert 1 tokens 0 and 2, expert 2 token 2; two slots stay empty."""
    slots, sizes = d.sorted_slots(jnp.array([[0, 1], [0, 1], [1, 2]]), jnp.array([True, False, True]), 3)
    np.testing.assert_array_equal(sizes, [1, 2, 1])
    np.testing.assert_array_equal(slots.slot_NA, [[0, 1], [6, 6], [2, 3]])
    np.testing.assert_array_equal(slots.assignment_M, [0, 1, 4, 5, 6, 6])


def test_moving_by_hand():
    """Three tokens of width 1 in the docstring's slots."""
    slots = _slots(DOCSTRING, np.ones((1, 3), bool), 3, capacity_factor=1.0)
    x_MD = d.spread(jnp.array([[10.0], [20.0], [30.0]]), slots)
    np.testing.assert_array_equal(x_MD.ravel(), [10, 20, 10, 30, 20, 0])
    y_MD = jnp.arange(1.0, 7.0)[:, None]
    np.testing.assert_array_equal(d.collect(y_MD, slots)[..., 0], [[1, 3], [2, 5], [0, 4]])
    gate_NA = jnp.array([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
    np.testing.assert_allclose(d.combine(y_MD, gate_NA, slots).ravel(), [1.5, 3.5, 0.4], rtol=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.5, None])
def test_gathers_differentiate_as_autodiff_would_scatter(factor):
    rng = np.random.default_rng(2)
    expert, mask = _random_choices(rng, 2, 8, 2, 4)
    slots = _slots(expert, mask, 4, capacity_factor=factor)
    x_ND = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32)
    y_MD, dy_NAD = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((slots.assignment_M.size, 5), (16, 2, 5))
    )

    def plain_spread(x_ND):
        return jnp.concatenate([jnp.repeat(x_ND, 2, 0), jnp.zeros((1, 5))])[slots.assignment_M]

    def plain_collect(y_MD):
        return jnp.concatenate([y_MD, jnp.zeros((1, 5))])[slots.slot_NA]

    for ours, plain, at, cotangent in (
        (d.spread, plain_spread, x_ND, y_MD),
        (d.collect, plain_collect, y_MD, dy_NAD),
    ):
        value, vjp = jax.vjp(lambda x, ours=ours: ours(x, slots), at)
        expected, plain_vjp = jax.vjp(plain, at)
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_allclose(vjp(cotangent)[0], plain_vjp(cotangent)[0], rtol=1e-6)


def test_spread_sums_gradients_in_float32():
    """1 + 2**-8 is exact only in float32, and then rounds to even; 257 choices of ones count to 256 in bfloat16."""
    slots, _ = d.sorted_slots(jnp.arange(300)[None], jnp.array([True]), 300)
    gradient = jax.grad(lambda x: jnp.sum(d.spread(x, slots)).astype(jnp.float32))(jnp.ones((1, 1), jnp.bfloat16))
    assert gradient[0, 0] == 300


@pytest.mark.parametrize(("length", "group_size", "size"), [(16, 4, 4), (16, 16, 16), (16, 2048, 16), (5, 1, 1)])
def test_group(length, group_size, size):
    assert d.group(length, group_size) == size


def test_group_refuses():
    with pytest.raises(InputError, match=r"group_size = 6: must divide the 16 tokens of a sequence"):
        d.group(16, 6)


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_slots(self):
        expert_GTA, mask_GT = _random_choices(np.random.default_rng(0), 2, 8, 2, 4)
        rank_GTA, sizes_GE = self.variant(lambda *inputs: d.ranks(*inputs, 4, "choice"))(expert_GTA, mask_GT)
        chex.assert_shape([rank_GTA, sizes_GE], [(2, 8, 2), (2, 4)])
        dispatch = Dispatch(capacity_factor=1.0)
        slots = self.variant(lambda *inputs: d.capacity_slots(*inputs, 4, dispatch))(expert_GTA, mask_GT)
        chex.assert_shape(list(slots), [(16, 2), (4 * 2 * 4,)])
        slots, sizes_E = self.variant(lambda *inputs: d.sorted_slots(*inputs, 4))(
            expert_GTA.reshape(-1, 2), mask_GT.reshape(-1)
        )
        chex.assert_shape([*slots, sizes_E], [(16, 2), (32,), (4,)])
        chex.assert_type([rank_GTA, sizes_GE, *slots, sizes_E], jnp.int32)

    @chex.variants(with_jit=True, without_jit=True)
    def test_moves(self):
        slots = _slots(DOCSTRING, np.ones((1, 3), bool), 3, capacity_factor=1.0)
        x_MD = self.variant(d.spread)(jnp.ones((3, 5), jnp.bfloat16), slots)
        y_NAD = self.variant(d.collect)(x_MD, slots)
        y_ND = self.variant(d.combine)(x_MD, jnp.ones((3, 2)), slots)
        chex.assert_shape([x_MD, y_NAD, y_ND], [(6, 5), (3, 2, 5), (3, 5)])
        chex.assert_type([x_MD, y_NAD, y_ND], [jnp.bfloat16, jnp.bfloat16, jnp.float32])
