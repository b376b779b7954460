"""The alarm that a router has collapsed, and what the losses say of it."""

import jax
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import MoEConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.collapse import PATIENCE, CollapseAlarm
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.state import TrainState
from mixtral_jax.train.step import compute_losses, make_step, routing_metrics, totals

EVEN, PAIR = [1.0] * 8, [0, 4.0, 0, 0, 4.0, 0, 0, 0]
NEARLY = [0.35, 2.8, 0.35, 0.35, 2.8, 0.35, 0.5, 0.5]  # experts 1 and 4 have 70%


def _see(alarm, load, steps, first=0):
    return [alarm.see(first + step, np.array(load)) for step in range(steps)]


def test_tells_once_which_layer_and_pair():
    seen = _see(CollapseAlarm(2), [EVEN, PAIR], 3 * PATIENCE)
    told = [text for _, texts in seen for text in texts]
    assert len(told) == 1
    assert f"step {PATIENCE}: the router of layer 1 has collapsed: experts 1 and 4 have 100%" in told[0]
    assert seen[PATIENCE - 2] == ([], [])
    assert seen[-1][0][0]._asdict() == {"layer": 1, "experts": (1, 4), "share": 1.0}


def test_tells_of_the_recovery_and_of_another_collapse():
    alarm = CollapseAlarm(2)
    _see(alarm, [PAIR], PATIENCE)
    assert alarm.see(PATIENCE, [NEARLY]) == ([], [f"step {PATIENCE + 1}: the router of layer 0 has recovered"])
    assert len(_see(alarm, [PAIR[::-1]], PATIENCE)[-1][1]) == 1


def test_a_step_alone_and_a_load_that_is_only_uneven_are_no_collapse():
    alarm = CollapseAlarm(2)
    for _ in range(PATIENCE):
        assert alarm.see(0, [PAIR]) == ([], [])
        assert alarm.see(0, [NEARLY]) == ([], [])


def test_with_no_more_experts_than_choices_nothing_can_collapse():
    assert _see(CollapseAlarm(2), [[1.0, 1.0]], PATIENCE)[-1] == ([], [])


def _collapsed_losses(losses):
    """The sums and the load of four layers of which layer l sends all tokens to experts 2l and 2l + 1 of eight.

    The routers read a dimension that is large in every token.
    """
    config = tiny.config("mixtral", num_layers=4, moe=MoEConfig(num_experts=8, experts_per_token=2))
    params = jax.tree.map(np.copy, tiny.params(config))
    params["embedding"][:, 0] = 10
    params["layers"]["feed_forward_norm"]["scale"][:] = 1
    router_LDE = params["layers"]["moe"]["router"]
    router_LDE[:] = 0
    for layer in range(4):
        router_LDE[layer, 0, 2 * layer : 2 * layer + 2] = 10
    ones = np.ones((2, 8), np.int32)
    tokens = tiny.tokens(config, 2, 8)
    batch = Batch(tokens, tokens, ones, np.tile(np.arange(8, dtype=np.int32), (2, 1)), np.float32(ones))
    model = Transformer(config, router=losses.router)
    sums = jax.jit(lambda: compute_losses(model, losses, params, batch, totals(batch)))()
    return sums, routing_metrics(sums.routing)["expert_load"]


def test_each_layer_on_its_own_pair_is_told_and_costs_four_times_as_much():
    """E = 8 where balanced is k = 2; transformers' definition gives 2 whatever the layers do each on its own."""
    sums, load_LE = _collapsed_losses(LossConfig())
    assert sums.balance_loss == pytest.approx(8, rel=1e-3)
    np.testing.assert_array_equal(load_LE, 4 * np.repeat(np.eye(4), 2, axis=1))
    (*_, (_, told)) = _see(CollapseAlarm(2), load_LE, PATIENCE)
    assert [text.split(": ", 2)[2].split(" have")[0] for text in told] == [
        f"the router of layer {n} has collapsed: experts {2 * n} and {2 * n + 1}" for n in range(4)
    ]
    blind, _ = _collapsed_losses(LossConfig(balance_loss="hf_global"))
    assert blind.balance_loss == pytest.approx(2, rel=1e-3)


def _busiest(losses, steps=80):
    """The share of each layer's two busiest experts of eight over the last ten steps, from a collapsed router on."""
    moe = MoEConfig(num_experts=8, experts_per_token=2, selection_bias=True)
    config = tiny.config("mixtral", moe=moe)
    params = jax.tree.map(np.copy, tiny.params(config))
    params["embedding"][:, 0] = 3
    params["layers"]["feed_forward_norm"]["scale"][:] = 1
    params["layers"]["moe"]["bias"][:] = 0
    router_LDE = params["layers"]["moe"]["router"]
    router_LDE *= 0.2
    for layer in range(2):
        router_LDE[layer, 0, 2 * layer : 2 * layer + 2] += 1
    ones = np.ones((8, 16), np.int32)
    tokens = tiny.tokens(config, 8, 17)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, np.tile(np.arange(16, dtype=np.int32), (8, 1)), np.float32(ones))
    settings = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    optimizer = make_optimizer(settings, steps)
    step = jax.jit(make_step(Transformer(config), losses, optimizer, learning_rate(settings, steps)))
    params = jax.tree.map(jax.numpy.asarray, params)
    state, loads = TrainState(jax.numpy.zeros((), jax.numpy.int32), params, optimizer.init(params)), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        loads.append(np.asarray(metrics["expert_load"]) / 8)
    assert np.sort(loads[0])[:, -2:].sum(axis=1) == pytest.approx([1, 1], abs=0.02)
    return np.sort(np.mean(loads[-10:], axis=0))[:, -2:].sum(axis=1)


def test_a_collapsed_router_recovers_with_the_loss_and_with_the_bias_and_not_without():
    """Without, the first layer stays as it is; the second's router reads what the first one's experts learn."""
    for losses in (LossConfig(balance=0.02), LossConfig(balance=0.0, bias_rate=0.02)):
        assert _busiest(losses).max() < 0.5
    assert _busiest(LossConfig(balance=0.0))[0] > 0.8
