"""Schedules at their corners, and AdamW with clipping by hand."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import tiny

from mixtral_jax.config import build
from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.train.optimizer import OptimizerConfig, _decayed, learning_rate, make_optimizer


def _rates(steps, **config):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **config), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_warmup_is_linear_and_ends_at_the_peak():
    np.testing.assert_allclose(_rates(10, warmup_steps=4, schedule="constant")[:6], [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(_rates(10, warmup_steps=1, schedule="constant")[:3], 1)
    np.testing.assert_allclose(_rates(10, schedule="constant"), 1)


def test_cosine():
    """From step 2, over 8: half-way, at step 6, the mean of the peak and the end."""
    rates = _rates(10, warmup_steps=2, schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose([rates[2], rates[6], rates[10]], [1, 0.55, 0.1], rtol=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_wsd():
    """Ten steps, two to warm up; of the eight others the last quarter decays: step 8 is the last at the peak."""
    rates = _rates(10, warmup_steps=2, schedule="wsd", decay_fraction=0.25, final_fraction=0.2)
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.6, 0.2], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_rates_are_finite_and_within_bounds(schedule):
    for steps, warmup in ((1, 0), (2, 1), (50, 49)):
        rates = np.array(_rates(steps, warmup_steps=warmup, schedule=schedule))
        assert np.all((rates > 0) & (rates <= 1))


def test_refuses_a_warmup_as_long_as_the_run():
    with pytest.raises(InputError, match=r"optimizer\.warmup_steps = 10: fewer than steps = 10"):
        learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate = 0.0: a number above zero"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: a number above zero"),
        ({"epsilon": -1.0}, "epsilon = -1.0: a number above zero"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0: a number above zero"),
        ({"beta1": 1.0}, "beta1 = 1.0: zero or more and below 1"),
        ({"beta2": -0.1}, "beta2 = -0.1: zero or more and below 1"),
        ({"final_fraction": 2.0}, "final_fraction = 2.0: a number from 0 to 1"),
        ({"decay_fraction": -1.0}, "decay_fraction = -1.0: a number from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1: zero or more"),
        ({"warmup_steps": -1}, "warmup_steps = -1: zero or more"),
        ({"schedule": "linear"}, "schedule = 'linear': "),
    ],
)
def test_refuses(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build(OptimizerConfig, {"learning_rate": 1e-3} | change)


def _update(gradient, params, **config):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, schedule="constant", **config), 10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return updates


def test_the_first_step_by_hand():
    """Adam's first step is the gradient over its size plus epsilon: 3 / (3 + 1); decay adds 0.1 * 10."""
    updates = _update(
        {"w": jnp.array([3.0])}, {"w": jnp.array([10.0])}, epsilon=1.0, weight_decay=0.1, clip_norm=math.inf
    )
    np.testing.assert_allclose(updates["w"], [-0.5 * (0.75 + 1.0)], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    """The norm of (3, 4) is 5, clipped to 1: (0.6, 0.8), of which Adam makes x / (x + 1)."""
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    updates = _update(gradient, params, epsilon=1.0, clip_norm=1.0)
    np.testing.assert_allclose(updates["a"], [-0.5 * 0.6 / 1.6], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-0.5 * 0.8 / 1.8], rtol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_but_norm_scales_decay(family):
    decayed = _decayed(nn.unbox(abstract_params(tiny.config(family))))
    layers = decayed["layers"]
    assert decayed["embedding"]
    assert decayed["unembedding"]
    assert all(layers["attention"].values())
    assert all(layers["moe" if family == "mixtral" else "feed_forward"].values())
    assert not decayed["norm"]["scale"]
    assert not layers["attention_norm"]["scale"]
    assert not layers["feed_forward_norm"]["scale"]
