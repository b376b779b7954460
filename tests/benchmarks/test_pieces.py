"""The contenders of a piece give the same results and gradients: what is timed is the same work."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn

from mixtral_jax.config import MoEConfig, model_config
from mixtral_jax.model.transformer import init_params

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import pieces, products

MOE = MoEConfig(num_experts=4, experts_per_token=2)
CONFIG = replace(model_config("tiny-mixtral"), dim=16, hidden_dim=32, num_layers=1, vocab_size=64, moe=MOE)
OURS, TORCH, TRANSFORMERS = "ours, float32 products", "torch, float32", "transformers, float32"


def _draw(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def _flat(result):
    return [np.asarray(each.detach() if hasattr(each, "detach") else each) for each in jax.tree.leaves(result)]


def _close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_cross_entropy():
    target_BT = np.random.default_rng(0).integers(0, 64, (2, 8), np.int32)
    calls = pieces.cross_entropy_calls(_draw(2, 8, 16), _draw(16, 64), target_BT)
    for ours, theirs in zip(_flat(calls[OURS]()), _flat(calls[TORCH]()), strict=True):
        _close(ours, theirs)


@pytest.mark.parametrize("window", [None, 3])
def test_attention(window):
    calls = pieces.attention_calls(CONFIG, 8, window)
    for ours, theirs in zip(_flat(calls[OURS]()), _flat(calls[TORCH]()), strict=True):
        _close(ours.reshape(1, 8, -1, CONFIG.head_dim), theirs.swapaxes(1, 2))


def test_trained_experts():
    params = nn.unbox(init_params(CONFIG, jax.random.key(0)))
    calls = pieces.trained_experts_calls(CONFIG, params, _draw(2, 8, 16), _draw(2, 8, 16))
    y_BTD, (weights, x_gradient) = calls["ours, float32, dropless"]()
    theirs, (router, gate_up, down, their_x_gradient) = calls[TRANSFORMERS]()
    _close(*_flat((y_BTD, theirs)))
    _close(*_flat((x_gradient, their_x_gradient)))
    _close(weights["router"][0], _flat(router)[0].T)
    _close(weights["down"][0], _flat(down)[0].swapaxes(1, 2))
    gate, up = (np.swapaxes(weights[name][0], 1, 2) for name in ("gate", "up"))
    _close(np.concatenate([gate, up], axis=1), _flat(gate_up)[0])


def test_served_experts():
    params = nn.unbox(init_params(CONFIG, jax.random.key(0)))
    calls = pieces.served_experts_calls(CONFIG, params, _draw(3, 1, 4, 16))
    _close(calls[OURS](), np.stack(_flat(calls[TRANSFORMERS]())))


@pytest.mark.parametrize("name", ["queries", "experts' down"])
def test_products(name):
    spec, _ = products.PRODUCTS[name]
    calls = products.product_calls(spec, dict(zip("EHTCDN", (2, 3, 4, 5, 6, 7), strict=True)))
    for ours, theirs in zip(_flat(calls[OURS]()), _flat(calls[TORCH]()), strict=True):
        _close(ours, theirs)
