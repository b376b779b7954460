"""Guessed tokens: they change how many steps a text takes, and nothing else."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.errors import InputError
from mixtral_jax.inference import decode
from mixtral_jax.inference.engine import Engine
from mixtral_jax.inference.proposals import Lookup
from mixtral_jax.inference.requests import EngineConfig, Request
from mixtral_jax.inference.runner import Loaded
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.inference.weights import prepare
from mixtral_jax.model.cache import empty_cache, num_slots, rewind

pytestmark = pytest.mark.usefixtures("blocks_of_three_slots")

EXECUTION = Execution(attention_chunk=8)
SHAPES = EngineConfig(slots=4, max_length=96, prefill_chunk=16, prefix_blocks=4)
GREEDY = SamplingConfig()
WARM = SamplingConfig(temperature=0.8, top_k=12, repetition_penalty=1.1)
TARGET = tiny.config("mixtral")
DRAFT = tiny.config("mistral", dim=8, num_layers=1, num_heads=2, num_kv_heads=1)


def _loaded(config, seed=0):
    return Loaded(prepare(tiny.params(config, seed), config, EXECUTION), config, EXECUTION)


def _requests():
    rng = np.random.default_rng(3)
    for length, sampling, new in ((1, GREEDY, 60), (7, WARM, 61), (30, GREEDY, 3), (20, WARM, 40), (9, GREEDY, 1)):
        yield Request(prompt=tuple(rng.integers(0, 40, length).tolist()), max_new_tokens=new, sampling=sampling)


def _texts(engine, requests):
    tickets = [engine.submit(request) for request in requests]
    ids = {ticket: [] for ticket in tickets}
    while engine.busy:
        for update in engine.step():
            ids[update.ticket] += [token.id for token in update.tokens]
    return [ids[ticket] for ticket in tickets]


@pytest.fixture(scope="module")
def plain():
    """The texts without guesses, sixty tokens with a window of six."""
    return _texts(Engine(_loaded(TARGET), SHAPES), _requests())


@pytest.mark.parametrize("draft", ["lookup", "itself", "another"])
def test_texts_are_those_without_guesses(plain, draft):
    shapes = dataclasses.replace(SHAPES, speculation="lookup" if draft == "lookup" else "draft", speculated_tokens=3)
    drafts = {"lookup": None, "itself": _loaded(TARGET), "another": _loaded(DRAFT)}
    engine = Engine(_loaded(TARGET), shapes, drafts[draft])
    assert _texts(engine, _requests()) == plain
    counts = engine.statistics()
    if draft == "itself":
        assert counts.accepted > 0.95 * counts.proposed - 12  # but what a text's end cuts off
        assert counts.decode_calls < 12
    else:
        assert 0 < counts.accepted < counts.proposed  # so some were rolled back, past the window too


def test_a_guess_that_was_wrong_leaves_no_trace_in_a_ring_that_has_wrapped():
    config = tiny.config("mistral")
    weights = _loaded(config).weights
    tokens = tiny.tokens(config, 2, 30)

    @jax.jit
    def take(tokens_BT, cache):
        real = jnp.ones(tokens_BT.shape, bool)
        return decode.forward(weights, tokens_BT, real, cache, config, EXECUTION)

    slots = num_slots(config, 64, written_at_once=4)
    guessed = straight = empty_cache(config, 2, slots, "float32")
    outputs = []
    for place in range(30):
        _, straight = take(tokens[:, place : place + 1], straight)
        # Three wrong tokens after each right one, taken back; the first row's one at a time less.
        chunk = np.concatenate([tokens[:, place : place + 1], np.full((2, 3), 39, np.int32)], axis=1)
        hidden, guessed = take(chunk, guessed)
        guessed = rewind(guessed, jnp.full((2,), place + 1))
        outputs.append(hidden[:, 0])
    whole, _ = decode.forward(weights, jnp.asarray(tokens), jnp.ones((2, 30), bool), None, config, EXECUTION)
    np.testing.assert_allclose(np.stack(outputs, axis=1), whole, atol=1e-5)
    np.testing.assert_array_equal(guessed.length_B, straight.length_B)
    seen = [np.sort(np.asarray(cache.position_BR))[:, -config.sliding_window :] for cache in (guessed, straight)]
    np.testing.assert_array_equal(*seen)


def test_sampled_tokens_have_the_models_distribution():
    """Pairs of tokens after one prompt, a thousand times, against the model's own probabilities: a chi-square test."""
    config = dataclasses.replace(TARGET, vocab_size=8)
    loaded = _loaded(config)
    shapes = EngineConfig(slots=32, max_length=32, prefill_chunk=16, speculation="draft", speculated_tokens=2)
    engine = Engine(loaded, shapes, _loaded(dataclasses.replace(DRAFT, vocab_size=8)))
    request = Request(prompt=(1, 2, 3, 1, 2), max_new_tokens=3, sampling=SamplingConfig(temperature=1.0))
    count = 1000
    pairs = Counter(
        tuple(ids[1:]) for ids in _texts(engine, (dataclasses.replace(request, index=n) for n in range(count)))
    )
    assert engine.statistics().accepted > 50

    def probabilities(tokens_BT):
        real = np.ones(tokens_BT.shape, bool)
        logits = decode.logits(loaded.weights, tokens_BT, real, config=config, execution=EXECUTION)
        return np.asarray(jax.nn.softmax(logits[:, -1]), np.float64)

    every = np.arange(8, dtype=np.int32)
    prompt = np.array([request.prompt], np.int32)
    first_V = probabilities(prompt)[0]
    after_one = np.concatenate([np.repeat(prompt, 8, axis=0), every[:, None]], axis=1)
    second_VV = first_V[:, None] * probabilities(after_one)
    after_two = np.concatenate([np.repeat(after_one, 8, axis=0), np.tile(every, 8)[:, None]], axis=1)
    third_VVV = second_VV[..., None] * probabilities(after_two).reshape(8, 8, 8)
    expected_VV = count * third_VVV.sum(axis=0)
    observed_VV = np.array([[pairs[a, b] for b in range(8)] for a in range(8)])
    enough = expected_VV >= 5
    others = [expected_VV[~enough].sum(), observed_VV[~enough].sum()]
    expected, observed = np.append(expected_VV[enough], others[0]), np.append(observed_VV[enough], others[1])
    chi_square = np.sum((observed - expected) ** 2 / np.maximum(expected, 1))
    freedom = len(expected) - 1
    # Beyond 4 standard deviations of the chi-square distribution: less than once in ten thousand.
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),  # what followed 1 2
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2]),  # the last time
        ([9, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2], [7, 3, 1]),  # three tokens alike before two
        ([4, 4, 4], [4, -1, -1]),  # as far as the text goes
        ([1, 2, 3], [-1, -1, -1]),
        ([1], [-1, -1, -1]),
    ],
)
def test_lookup(text, expected):
    history = np.full(16, -1, np.int32)
    history[: len(text)] = text
    assert Lookup(3)._of_row(jnp.asarray(history), jnp.int32(len(text))).tolist() == expected


def test_a_draft_of_another_vocabulary_is_refused():
    shapes = dataclasses.replace(SHAPES, speculation="draft")
    with pytest.raises(InputError, match="draft = 8: ids, and the model has 40"):
        Engine(_loaded(TARGET), shapes, _loaded(dataclasses.replace(DRAFT, vocab_size=8)))
