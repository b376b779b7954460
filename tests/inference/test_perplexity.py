"""Perplexity by overlapping windows, against a loop over transformers."""

import itertools

import numpy as np
import pytest
import torch
from oracles import huggingface, tiny

from mixtral_jax.config import Execution
from mixtral_jax.errors import InputError
from mixtral_jax.inference.perplexity import Perplexity, perplexity, windows
from mixtral_jax.inference.weights import prepare


def test_windows():
    assert [tuple(each) for each in windows(10, 4, 2)] == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert [tuple(each) for each in windows(3, 4, 2)] == [(0, 1, 3)]


@pytest.mark.parametrize(("count", "window", "stride"), list(itertools.product([2, 7, 8, 9, 30], [2, 8], [1, 7])))
def test_every_token_but_the_first_is_scored_once(count, window, stride):
    stride = min(stride, window - 1)
    scored = [token for each in windows(count, window, stride) for token in range(each.scored, each.end)]
    assert scored == list(range(1, count))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (64, 32)])
def test_equals_a_loop_over_transformers(family, window, stride):
    config = tiny.config(family)
    params = tiny.params(config)
    (ids,) = tiny.tokens(config, 1, 50).tolist()
    model = huggingface.to_huggingface(config, params)
    nats = 0.0
    for begin, scored, end in windows(len(ids), window, stride):
        logits = torch.from_numpy(huggingface.logits(model, np.array([ids[begin:end]])))[0].double()
        cost = -torch.log_softmax(logits, -1)[range(end - begin - 1), ids[begin + 1 : end]]
        nats += float(cost[scored - begin - 1 :].sum())
    found = perplexity(prepare(params, config, Execution()), ids, config, Execution(), window, stride)
    assert found.tokens == 49
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_is_the_exponential_of_the_mean():
    assert Perplexity(tokens=2, nats=2 * np.log(8)).value == pytest.approx(8)


@pytest.mark.parametrize(
    ("ids", "window", "stride", "message"),
    [
        ([1], 8, 4, "text = 1: two tokens or more"),
        ([1, 40], 8, 4, "text = 40: token ids go from 0 to 39"),
        ([1, 2], 1, 1, "window = 1: from 2 to the model's 32768"),
        ([1, 2], 8, 8, "stride = 8: from 1 to under the window of 8"),
    ],
)
def test_refuses(ids, window, stride, message):
    config = tiny.config("mistral")
    with pytest.raises(InputError, match=message):
        perplexity(prepare(tiny.params(config), config, Execution()), ids, config, Execution(), window, stride)
