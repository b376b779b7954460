"""Sampling worked out by hand, and against transformers' logits processors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixtral_jax.errors import InputError
from mixtral_jax.inference.sampling import EVERY_TOKEN, SamplingConfig, choose, greedy, keep_likely, penalise, sample

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], np.float32))


def _kept(**settings):
    values = SamplingConfig(temperature=1.0, **settings).values
    return np.isfinite(np.asarray(keep_likely(jnp.asarray(LOGITS), values)))


def test_greedy_takes_the_lowest_id_of_equals():
    np.testing.assert_array_equal(greedy(jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])), [1, 0])


@pytest.mark.parametrize("vocabulary", [1, 33, 64, 32000])
def test_greedy_is_argmax_whatever_the_vocabulary(vocabulary):
    """With few different values, so that most rows have equals in several places."""
    logits_BV = np.random.default_rng(0).integers(-3, 3, (16, vocabulary)).astype(np.float32)
    logits_BV[0] = -np.inf
    np.testing.assert_array_equal(jax.jit(greedy)(logits_BV), logits_BV.argmax(axis=1))


def test_greedy_of_a_row_without_numbers_is_a_token():
    assert 0 <= int(greedy(jnp.full((1, 4), jnp.nan))[0]) < 4


def test_top_k():
    np.testing.assert_array_equal(_kept(top_k=2), [[1, 1, 0, 0], [0, 0, 1, 1]])
    assert _kept(top_k=9).all()


def test_top_p_keeps_the_token_that_reaches_p():
    np.testing.assert_array_equal(_kept(top_p=0.7), [[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(_kept(top_p=0.4)[0], [1, 0, 0, 0])  # the likeliest always stays


def test_min_p():
    np.testing.assert_array_equal(_kept(min_p=0.25), [[1, 1, 1, 0], [0, 1, 1, 1]])  # 0.25 x 0.5 = 0.125


def test_penalise():
    penalised = penalise(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), jnp.float32(2))
    np.testing.assert_array_equal(penalised, [[1.0, -4.0, 2.0]])


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 12, "top_p": 0.8, "min_p": 0.05}],
    ids=lambda settings: "-".join(settings),
)
def test_filters_equal_transformers(settings):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 50)).astype(np.float32) * 2
    seen = rng.integers(0, 50, (6, 9))
    config = SamplingConfig(temperature=0.7, repetition_penalty=1.4, **settings)
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, seen, True, axis=1)
    ours = penalise(jnp.asarray(logits), jnp.asarray(mask), config.values.repetition_penalty) / 0.7
    ours = keep_likely(ours, config.values)
    processors = [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.7)]
    processors += [TopKLogitsWarper(config.top_k)] if config.top_k else []
    processors += [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    processors += [MinPLogitsWarper(config.min_p)] if config.min_p else []
    theirs = torch.from_numpy(logits)
    for process in processors:
        theirs = process(torch.from_numpy(seen), theirs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
    kept = np.isfinite(theirs.numpy())
    np.testing.assert_allclose(np.asarray(ours)[kept], theirs.numpy()[kept], rtol=1e-5)


def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=2.0, top_k=3)
    keys = jax.random.split(jax.random.key(0), 8000)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (8000, 4))
    drawn = np.asarray(sample(logits, keys, None, config.form, config.values))
    roots = np.sqrt([0.5, 0.3, 0.15])  # temperature 2 is a square root
    expected = np.append(roots / roots.sum(), 0.0)
    share = np.bincount(drawn, minlength=4) / 8000
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 8000)
    assert share[3] == 0


def test_other_numbers_of_a_form_do_not_compile_anew():
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(sample, n=1), static_argnums=3)
    keys = jax.random.split(jax.random.key(0), 2)
    for temperature, top_p in ((0.5, 0.9), (1.0, 0.4)):
        config = SamplingConfig(temperature=temperature, top_p=top_p)
        chex.assert_shape(traced(jnp.asarray(LOGITS), keys, None, config.form, config.values), (2,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -5),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_refuses(key, value):
    with pytest.raises(InputError, match=f"{key} = {value}"):
        SamplingConfig(**{key: value})


PLAIN, PENALISED = SamplingConfig(), SamplingConfig(repetition_penalty=3.0)
DRAWN, FILTERED = SamplingConfig(temperature=0.7), SamplingConfig(temperature=1.3, top_k=5, min_p=0.1)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "rows", [(PLAIN, PLAIN), (PLAIN, PENALISED), (PLAIN, DRAWN), (DRAWN, FILTERED), (FILTERED, PENALISED)]
)
def test_choose_gives_each_row_its_own_sample(rows, masks):
    """With other rows' numbers beside it, and with a mask over the second row, or words of bits that allow all."""
    rng = np.random.default_rng(0)
    logits_BV = jnp.asarray(rng.standard_normal((2, 40)), jnp.float32) * 2
    seen_BV = jnp.asarray(rng.random((2, 40)) < 0.5)
    key_B = jax.vmap(jax.random.key)(jnp.arange(2))
    values = jax.tree.map(lambda *own: jnp.stack(own)[:, None], *(row.values for row in rows))
    allowed_BW = np.full((2, 2), EVERY_TOKEN)
    if masks:
        allowed_BW[1] = 1 << 7, 1 << 3  # tokens 7 and 35
    found_B = jax.jit(choose)(logits_BV, key_B, seen_BV, values, allowed_BW)
    masked_BV = logits_BV.at[1].set(jnp.where(jnp.isin(jnp.arange(40), jnp.array([7, 35])), logits_BV[1], -jnp.inf))
    for row, own in enumerate(rows):
        one = slice(row, row + 1)
        logits = (masked_BV if masks else logits_BV)[one]
        assert found_B[row] == sample(logits, key_B[one], seen_BV[one], own.form, own.values)[0]
    if not masks:
        np.testing.assert_array_equal(jax.jit(choose)(logits_BV, key_B, seen_BV, values), found_B)
