"""Balance losses by name against float64 and transformers; the selection bias; the jitter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mixture

from mixtral_jax.model.balance import hf_global, shift_bias
from mixtral_jax.model.routing import route, statistics

LAYERS, ROWS, LENGTH, EXPERTS = 3, 4, 9, 8


def _logits():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((LAYERS, ROWS, LENGTH, EXPERTS)) + rng.standard_normal(EXPERTS)).astype(np.float32)


def _mask():
    mask = np.ones((ROWS, LENGTH), bool)
    mask[0, 5:], mask[1, 2], mask[2] = False, False, False
    return mask


def _sums(logits, mask, name, shards=1, choices=2):
    routing = route(jnp.asarray(logits), choices)
    return statistics(routing, jnp.ones((*mask.shape, choices), bool), jnp.asarray(mask), name, shards)


def _exact(logits_BTE, mask_BT, choices=2):
    """The formula over all real tokens as one sequence, in float64, and their number."""
    flat, real = logits_BTE.reshape(1, -1, logits_BTE.shape[-1]), mask_BT.reshape(1, -1)
    return mixture.balance_loss(flat, choices, real)[0], real.sum()


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_switch_in_float64(choices):
    for logits in _logits():
        value, tokens = _exact(logits, _mask(), choices)
        sums = _sums(logits, _mask(), "switch", choices=choices)
        np.testing.assert_allclose(sums.balance_loss, value * tokens, rtol=1e-5)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_megatron_in_float64(shards):
    """A shard of padding alone among the four."""
    for logits in _logits():
        parts = [_exact(*each) for each in zip(np.split(logits, shards), np.split(_mask(), shards), strict=True)]
        expected = sum(value * tokens for value, tokens in parts) / 2
        sums = _sums(logits, _mask(), "megatron", shards)
        np.testing.assert_allclose(sums.balance_loss, expected, rtol=1e-5)


def _hf_global(layers_LBTE, mask):
    sums = [_sums(logits, mask, "hf_global") for logits in layers_LBTE]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *sums)
    return hf_global(stacked.assigned_E, stacked.probability_E, stacked.tokens) / stacked.tokens[0]


@pytest.mark.parametrize("padded", [False, True])
def test_hf_global_equals_transformers(padded):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    mask = _mask() if padded else np.ones((ROWS, LENGTH), bool)
    layers = tuple(torch.from_numpy(each.reshape(-1, EXPERTS)) for each in _logits())
    theirs = modeling.load_balancing_loss_func(layers, EXPERTS, 2, torch.from_numpy(mask.astype(np.int64)))
    np.testing.assert_allclose(_hf_global(_logits(), mask), float(theirs), rtol=1e-5)


def test_hf_global_does_not_see_layers_that_collapse_each_on_its_own_pair():
    layers = np.zeros((4, 1, 6, 8), np.float32)
    for layer in range(4):
        layers[layer, ..., 2 * layer : 2 * layer + 2] = 30
    mask = np.ones((1, 6), bool)
    np.testing.assert_allclose(_hf_global(layers, mask), 2, rtol=1e-4)
    for logits in layers:
        np.testing.assert_allclose(_sums(logits, mask, "switch").balance_loss / 6, 8, rtol=1e-4)


@pytest.mark.parametrize(("name", "value"), [("per_sequence", 2), ("switch", 2), ("megatron", 1)])
def test_balanced_values(name, value):
    """Eight tokens, all but indifferent, each on its own pair of eight experts."""
    turns = np.arange(8)
    logits = 1e-4 * (np.eye(8)[turns] + 0.9 * np.eye(8)[(turns + 1) % 8])
    sums = _sums(np.float32(logits)[None], np.ones((1, 8), bool), name)
    np.testing.assert_allclose(sums.balance_loss / 8, value, rtol=1e-3)


@pytest.mark.parametrize("name", ["switch", "megatron", "hf_global"])
def test_padding_changes_nothing(name):
    logits = _logits()[0]
    more, mask = np.concatenate([logits, logits[:1]]), np.concatenate([_mask(), np.zeros((1, LENGTH), bool)])
    plain, padded = _sums(logits, _mask(), name), _sums(more, mask, name)
    for own, other in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)


def test_the_selection_bias_chooses_and_does_not_weigh():
    """Probabilities (1, 2, 4, 1) / 8: with 0.5 on expert 3 the scores are (1, 2, 4, 5) / 8; gates 1 to 4 of fifths."""
    logits = jnp.log(jnp.array([[[1.0, 2.0, 4.0, 1.0]]]))
    routing = route(logits, 2, jnp.array([0.0, 0.0, 0.0, 0.5]))
    np.testing.assert_array_equal(routing.expert_BTA, [[[3, 2]]])
    np.testing.assert_allclose(routing.gate_BTA, [[[0.2, 0.8]]], rtol=1e-6)
    gradient = jax.grad(lambda bias: route(logits, 2, bias).gate_BTA[0, 0, 0])(jnp.zeros(4))
    np.testing.assert_array_equal(gradient, 0)


def test_a_bias_of_zero_changes_nothing():
    logits = jnp.asarray(_logits()[0])
    for own, other in zip(route(logits, 2), route(logits, 2, jnp.zeros(EXPERTS)), strict=True):
        np.testing.assert_array_equal(own, other)


def test_the_bias_rises_where_the_load_is_low():
    """Two layers: loads (6, 2, 4) with mean 4, and an even one."""
    bias = shift_bias(jnp.full((2, 3), 0.5), jnp.array([[6.0, 2.0, 4.0], [4.0, 4.0, 4.0]]), 0.1)
    np.testing.assert_allclose(bias, [[0.4, 0.6, 0.5], [0.5, 0.5, 0.5]], rtol=1e-6)
