"""A packed row has the loss and the gradient of its examples in rows of their own."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Dispatch
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.examples import Example, fill_row
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.packing import empty_row, stack_rows
from mixtral_jax.train.step import gradients

LENGTH = 24
ROOM_FOR_ALL = Dispatch(capacity_factor=4.0, group_size=8)
CASES = [("mistral", Dispatch()), ("mixtral", Dispatch()), ("mixtral", ROOM_FOR_ALL)]


@pytest.mark.parametrize("window", [6, None])
@pytest.mark.parametrize(("family", "dispatch"), CASES, ids=["mistral", "dropless", "by-capacity"])
def test_a_packed_row_equals_its_examples_apart(family, dispatch, window):
    """Cross-entropy alone, since the balance loss is a row's; the examples are longer than the window, as long, and
    shorter."""
    config = tiny.config(family, sliding_window=window)
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(3, 40, size).astype(np.int32), np.arange(size) >= size // 3) for size in (13, 7, 4)
    ]
    packed = stack_rows([fill_row(examples, LENGTH), empty_row(LENGTH), empty_row(LENGTH)])
    apart = stack_rows([fill_row([each], LENGTH) for each in examples])
    assert packed.loss_weight.sum() == apart.loss_weight.sum() > 10
    model, losses = Transformer(config, dispatch=dispatch), LossConfig(balance=0.0, z=0.0)
    found = jax.jit(partial(gradients, model, losses, accumulation=1))
    (gradient, sums), (expected, expected_sums) = (found(tiny.params(config), batch) for batch in (packed, apart))
    np.testing.assert_allclose(sums.loss, expected_sums.loss, rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected, atol=1e-5, rtol=1e-4)
    if sums.routing is not None:
        assert sums.routing.dropped.sum() == expected_sums.routing.dropped.sum() == 0
