"""Scores of tokens, against the logits."""

import jax
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.inference import decode
from mixtral_jax.inference.scoring import score
from mixtral_jax.inference.weights import prepare


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("length", [2, 127, 128, 130])
def test_scores_are_those_of_the_logits(family, length):
    """Below, at and above the tokens whose logits are in memory at a time; rows of other lengths beside."""
    config = tiny.config(family)
    weights, execution = prepare(tiny.params(config), config, Execution()), Execution()
    tokens_BT = tiny.tokens(config, 2, length)
    real_BT = np.arange(length)[None] < np.array([[length], [length // 2 + 1]])
    found = score(weights, tokens_BT, real_BT, config=config, execution=execution)
    logits_BTV = decode.logits(weights, tokens_BT, real_BT, config=config, execution=execution)
    likely_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    expected = -np.take_along_axis(likely_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]
    later_BT = real_BT[:, 1:]
    np.testing.assert_allclose(found.nats_BT[:, 1:][later_BT], expected[later_BT], atol=1e-5)
    chosen = likely_BTV[:, :-1].argmax(-1) == tokens_BT[:, 1:]
    np.testing.assert_array_equal(np.asarray(found.likeliest_BT)[:, 1:][later_BT], chosen[later_BT])
