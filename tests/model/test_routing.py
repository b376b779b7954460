"""Who goes where, and the losses of it, by hand and against transformers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mixture

from mixtral_jax.model.routing import balance_loss, route, statistics


def _logits(batch=3, length=7, experts=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, length, experts)), jnp.float32)


def _mask(batch=3, length=7):
    """Padding at the end, in the middle, and a row of it."""
    mask = np.ones((batch, length), bool)
    mask[0, 5:], mask[1, 2], mask[2] = False, False, False
    return mask


def _one_hot_logits(experts, num_experts, size=20.0):
    """Logits by which each token surely chooses its experts, the first more than the second."""
    return sum(size * (1 - 0.1 * rank) * jax.nn.one_hot(jnp.array(e), num_experts) for rank, e in enumerate(experts))


def test_by_hand():
    """Softmax of log(1, 2, 4, 1) is (1, 2, 4, 1) / 8; the top two are 4 and 2, renormalised 2/3 and 1/3."""
    routing = route(jnp.log(jnp.array([[[1.0, 2.0, 4.0, 1.0]]])), 2)
    np.testing.assert_allclose(routing.probability_BTE, [[[0.125, 0.25, 0.5, 0.125]]], rtol=1e-6)
    np.testing.assert_array_equal(routing.expert_BTA, [[[2, 1]]])
    np.testing.assert_allclose(routing.gate_BTA, [[[2 / 3, 1 / 3]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "experts"), [([0, 0, 0, 0], [0, 1]), ([1, 3, 2, 3], [1, 3]), ([5, 1, 1, 1], [0, 1])]
)
def test_ties_go_to_the_lower_index(logits, experts):
    np.testing.assert_array_equal(route(jnp.array([[logits]], jnp.float32), 2).expert_BTA, [[experts]])


@pytest.mark.parametrize("choices", [1, 2, 3, 8])
def test_equals_softmax_over_the_top_logits(choices):
    routing = route(_logits(), choices)
    expert_BTA, gate_BTA = mixture.route(_logits(), choices)
    np.testing.assert_array_equal(routing.expert_BTA, expert_BTA)
    np.testing.assert_allclose(routing.gate_BTA, gate_BTA, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(routing.gate_BTA, -1), 1, atol=1e-6)


def test_balance_loss_by_hand():
    """Four tokens, E = 4, k = 1, two each on experts 0 and 1, probabilities (0.4, 0.4, 0.1, 0.1) on average.

    4 * (2/4 * 0.4 + 2/4 * 0.4) = 1.6.
    """
    rows = [[0.5, 0.3, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1]] * 2
    losses = balance_loss(route(jnp.log(jnp.array([rows])), 1), jnp.ones((1, 4), bool))
    np.testing.assert_allclose(losses, [1.6], rtol=1e-6)


@pytest.mark.parametrize(("choices", "most"), [(1, 8.0), (2, 4.0), (4, 2.0)])
def test_balance_loss_of_even_and_of_collapsed_routing(choices, most):
    """k where each expert has its share; E where all tokens take the same k and the router is sure of one of them."""
    turns = np.arange(8)
    even = _one_hot_logits([[(turns + rank) % 8] for rank in range(choices)], 8, size=1e-4)
    loss = balance_loss(route(even, choices), jnp.ones((1, 8), bool))
    np.testing.assert_allclose(loss, [choices], rtol=1e-4)
    collapsed = jnp.broadcast_to(jnp.where(jnp.arange(8) < choices, 30.0, 0.0)[None, None], (1, 8, 8))
    loss = balance_loss(route(collapsed, choices), jnp.ones((1, 8), bool))
    np.testing.assert_allclose(loss, [most * choices], rtol=1e-4)


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_balance_loss_in_float64(choices):
    losses = balance_loss(route(_logits(), choices), jnp.asarray(_mask()))
    np.testing.assert_allclose(losses, mixture.balance_loss(_logits(), choices, _mask()), rtol=1e-5)
    assert losses[2] == 0


def test_balance_loss_gradient_by_finite_differences():
    """In float64, at logits whose order a step of 1e-6 doesn't change."""
    mask, weight_B = _mask(), np.array([0.3, 1.7, 0.9])

    def loss(logits):
        return jnp.sum(balance_loss(route(logits, 2), jnp.asarray(mask)) * jnp.asarray(weight_B, jnp.float32))

    gradient = np.asarray(jax.grad(loss)(_logits()))
    logits, expected = np.float64(_logits()), np.zeros(gradient.shape)
    for index in np.ndindex(*logits.shape):
        step = np.zeros(logits.shape)
        step[index] = 1e-6
        above, below = (mixture.balance_loss(logits + s, 2, mask) @ weight_B for s in (step, -step))
        expected[index] = (above - below) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max() + 1e-7)
    np.testing.assert_array_equal(gradient[~mask], 0)
    assert np.abs(gradient[mask]).max() > 1e-3


@pytest.fixture(scope="module")
def their_loss():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")

    def loss(logits_LTE, choices):
        layers = tuple(torch.from_numpy(np.array(logits_TE)) for logits_TE in logits_LTE)
        return float(modeling.load_balancing_loss_func(layers, logits_LTE[0].shape[-1], choices))

    return loss


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_balance_loss_of_one_layer_and_sequence_equals_transformers(their_loss, choices):
    logits = _logits(batch=1, length=40)
    ours = balance_loss(route(logits, choices), jnp.ones((1, 40), bool))
    np.testing.assert_allclose(ours, [their_loss(logits, choices)], rtol=1e-5)


def test_layers_that_collapse_each_on_its_own_pair_are_seen(their_loss):
    """Four layers of eight experts, all tokens of layer l on 2l and 2l + 1: transformers calls it balanced."""
    layers = [_one_hot_logits([[[2 * layer] * 6], [[2 * layer + 1] * 6]], 8, size=0.0) for layer in range(4)]
    layers = [x.at[..., 2 * layer : 2 * layer + 2].set(30.0) for layer, x in enumerate(layers)]
    ours = [balance_loss(route(x, 2), jnp.ones((1, 6), bool)) for x in layers]
    np.testing.assert_allclose(ours, 8, rtol=1e-4)
    np.testing.assert_allclose(their_loss([x[0] for x in layers], 2), 2, rtol=1e-4)


def test_statistics_by_hand():
    """Three real tokens of four: two choose experts 0 and 1, one 1 and 2; one choice of the real ones is dropped."""
    logits = jnp.log(jnp.array([[[4.0, 2.0, 1.0], [4.0, 2.0, 1.0], [1.0, 4.0, 2.0], [1.0, 1.0, 6.0]]]))
    kept = jnp.array([[[True, False], [True, True], [True, True], [False, False]]])
    mask = jnp.array([[True, True, True, False]])
    sums = statistics(route(logits, 2), kept, mask)
    np.testing.assert_array_equal(sums.assigned_E, [2, 3, 1])
    assert (sums.dropped, sums.tokens) == (1, 3)
    p = np.array([4, 2, 1]) / 7
    np.testing.assert_allclose(sums.entropy, -3 * np.sum(p * np.log(p)), rtol=1e-5)
    np.testing.assert_allclose(sums.z_loss, 3 * np.log(7) ** 2, rtol=1e-5)
    # Mean probabilities (4+4+1, 2+2+4, 1+1+2) / 21, shares (2, 3, 1) / 3, times E = 3, times 3 tokens.
    np.testing.assert_allclose(sums.balance_loss, 3 * 3 * (2 * 9 + 3 * 8 + 1 * 4) / 3 / 21, rtol=1e-5)


def test_statistics_of_parts_add_up():
    kept, mask = jnp.ones((3, 7, 2), bool), jnp.asarray(_mask())
    whole = statistics(route(_logits(), 2), kept, mask)
    parts = [statistics(route(_logits()[r : r + 1], 2), kept[r : r + 1], mask[r : r + 1]) for r in range(3)]
    chex.assert_trees_all_close(whole, jax.tree.map(lambda *x: sum(x), *parts), rtol=1e-5)


def test_padding_changes_no_statistic():
    logits, mask = _logits(), jnp.asarray(_mask())
    kept = jnp.ones((3, 7, 2), bool)
    rows = [(logits[r][mask[r]][None], kept[r][mask[r]][None]) for r in range(2)]
    apart = [statistics(route(x, 2), k, jnp.ones(x.shape[:2], bool)) for x, k in rows]
    chex.assert_trees_all_close(statistics(route(logits, 2), kept, mask), jax.tree.map(jnp.add, *apart), rtol=1e-5)


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_routing(self):
        routing = self.variant(lambda logits: route(logits, 2))(_logits())
        chex.assert_shape([routing.logits_BTE, routing.probability_BTE], (3, 7, 8))
        chex.assert_shape([routing.expert_BTA, routing.gate_BTA], (3, 7, 2))
        chex.assert_type([routing.probability_BTE, routing.gate_BTA, routing.expert_BTA], [float, float, jnp.int32])
        mask = jnp.asarray(_mask())
        losses = self.variant(balance_loss)(routing, mask)
        chex.assert_shape(losses, (3,))
        sums = self.variant(statistics)(routing, jnp.ones((3, 7, 2), bool), mask)
        leaves = jax.tree.leaves(sums)
        chex.assert_shape(leaves, [(8,)] + [()] * (len(leaves) - 1))
        chex.assert_type(leaves, jnp.float32)
