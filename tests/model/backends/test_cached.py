"""Attention to a cache against dense float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle

from mixtral_jax.model.backends import cached
from mixtral_jax.model.backends.cached import cached_attention
from mixtral_jax.model.masks import visible

HEADS = (2, 3, 8)  # K, G, H
W = 6


def _inputs(queries, slots):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, queries, *HEADS))
    k, v = rng.standard_normal((2, 2, slots, HEADS[0], HEADS[2]))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def _by_head(*arrays):
    """As a cache holds keys and values."""
    return [jnp.swapaxes(x_BSKH, 1, 2) for x_BSKH in arrays]


@pytest.mark.parametrize(("chunk", "most_scores"), [(3, 1 << 28), (100, 1 << 28), (100, 4 * 2 * 6 * 12), (100, 1)])
def test_cached_attention_goes_by_its_mask(monkeypatch, chunk, most_scores):
    """Ten queries over twelve slots in no order; all at once, or fewer at a time than the last ones are."""
    monkeypatch.setattr(cached, "MOST_SCORES", most_scores)
    q, k, v = _inputs(10, 12)
    position_S = np.random.default_rng(2).permutation(12)
    seen_BTS = visible(jnp.arange(2, 12), jnp.asarray(position_S), W)[None].repeat(2, 0)
    expected = [[oracle.sees(query, key, W) for key in position_S] for query in range(2, 12)]
    y = cached_attention(q, *_by_head(k, v), seen_BTS, chunk, "float32")
    np.testing.assert_allclose(y, oracle.attention(q, k, v, np.array([expected] * 2)), atol=5e-6)


def test_many_chunks_are_a_loop():
    """As many as are no longer unrolled, and one that is not whole."""
    q, k, v = _inputs(37, 37)
    seen_BTS = visible(jnp.arange(37), jnp.arange(37), W)[None].repeat(2, 0)
    y = cached_attention(q, *_by_head(k, v), seen_BTS, 2, "float32")
    np.testing.assert_allclose(y, oracle.attention(q, k, v, oracle.mask(np.ones((2, 37)), W)), atol=5e-6)
    jaxpr = jax.make_jaxpr(lambda *given: cached_attention(*given, 2, "float32"))(q, *_by_head(k, v), seen_BTS)
    assert "scan[" in str(jaxpr)


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_attention(self):
        q, k, v = _inputs(8, 8)
        seen_BTS = jnp.ones((2, 8, 8), bool)
        y = self.variant(lambda *inputs: cached_attention(*inputs, 4, "bfloat16"))(q, *_by_head(k, v), seen_BTS)
        chex.assert_shape(y, (2, 8, *HEADS))
        chex.assert_type(y, jnp.float32)
