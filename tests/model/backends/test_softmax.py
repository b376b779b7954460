"""Attention to keys some after others against that to all at once, in float64."""

import numpy as np
import pytest

from mixtral_jax.model.backends.softmax import Part, nothing, softmax, together

QUERIES, KEYS, DIM = 3, 12, 4


def _part(scores, visible, values):
    weight, peak, total = softmax(scores, visible)
    return Part(weight @ values, peak, total)


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize("scale", [1, 1000])
def test_two_parts_are_the_whole(at, scale):
    """One query sees keys of the second alone, one of the first alone."""
    rng = np.random.default_rng(0)
    scores, values = scale * rng.standard_normal((QUERIES, KEYS)), rng.standard_normal((KEYS, DIM))
    visible = rng.random((QUERIES, KEYS)) < 0.7
    visible[0, :at] = visible[1, at:] = False
    visible[:, 0], visible[:, -1] = [False, True, True], [True, False, True]
    seen = np.where(visible, scores, -np.inf)
    weight = np.exp(seen - seen.max(1, keepdims=True))
    exact = weight @ values / weight.sum(1, keepdims=True)
    scores, values = scores.astype(np.float32), values.astype(np.float32)
    parts = [_part(scores[:, each], visible[:, each], values[each]) for each in (slice(at), slice(at, None))]
    for one, other in (parts, parts[::-1]):
        np.testing.assert_allclose(together(one, other).attention(), exact, atol=1e-3 if scale > 1 else 1e-6)


def test_nothing_beside_a_part_is_the_part():
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((QUERIES, KEYS), np.float32), rng.standard_normal((KEYS, DIM), np.float32)
    part = _part(scores, scores > 0, values)
    for found in (together(nothing(part.mixed), part), together(part, nothing(part.mixed))):
        for actual, exact in zip(found, part, strict=True):
            np.testing.assert_array_equal(actual, exact)


def test_a_query_that_sees_nothing_has_the_mean_of_all_values():
    values = np.random.default_rng(0).standard_normal((KEYS, DIM), np.float32)
    unseen = np.zeros((QUERIES, KEYS), bool)
    parts = [_part(np.ones((QUERIES, len(of))), unseen[:, : len(of)], of) for of in (values[:5], values[5:])]
    exact = np.broadcast_to(values.mean(0), (QUERIES, DIM))
    np.testing.assert_allclose(together(*parts).attention(), exact, atol=1e-6)
