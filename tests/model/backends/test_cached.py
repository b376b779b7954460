"""Attention to a cache against dense float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle

from mixtral_jax.model.backends import cached, few_rows
from mixtral_jax.model.backends.bits import bits, numbers
from mixtral_jax.model.backends.cached import Seen, cached_attention
from mixtral_jax.model.backends.quantized import in_int8
from mixtral_jax.model.masks import visible

pytestmark = pytest.mark.usefixtures("optimised_programs")  # which no bit may depend on either
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


def _all(visible_BTS):
    return Seen(visible_BTS, jnp.full(2, visible_BTS.shape[2]))


@pytest.fixture
def blocks_of_four(monkeypatch):
    monkeypatch.setitem(cached.SLOTS_AT_ONCE, "cpu", 4)


@pytest.mark.parametrize(("chunk", "most_scores"), [(3, 1 << 28), (100, 1 << 28), (100, 4 * 2 * 6 * 12), (100, 1)])
def test_cached_attention_goes_by_its_mask(monkeypatch, chunk, most_scores):
    """Ten queries over twelve slots in no order; all at once, or fewer at a time than the last ones are."""
    monkeypatch.setattr(cached, "MOST_SCORES", most_scores)
    q, k, v = _inputs(10, 12)
    position_S = np.random.default_rng(2).permutation(12)
    seen_BTS = visible(jnp.arange(2, 12), jnp.asarray(position_S), W)[None].repeat(2, 0)
    expected = [[oracle.sees(query, key, W) for key in position_S] for query in range(2, 12)]
    y = cached_attention(q, *_by_head(k, v), _all(seen_BTS), chunk, "float32")
    np.testing.assert_allclose(y, oracle.attention(q, k, v, np.array([expected] * 2)), atol=5e-6)


def test_many_chunks_are_a_loop():
    """As many as are no longer unrolled, and one that is not whole."""
    q, k, v = _inputs(37, 37)
    seen_BTS = visible(jnp.arange(37), jnp.arange(37), W)[None].repeat(2, 0)
    y = cached_attention(q, *_by_head(k, v), _all(seen_BTS), 2, "float32")
    np.testing.assert_allclose(y, oracle.attention(q, k, v, oracle.mask(np.ones((2, 37)), W)), atol=5e-6)
    jaxpr = jax.make_jaxpr(lambda *given: cached_attention(*given, 2, "float32"))(q, *_by_head(k, v), _all(seen_BTS))
    assert "scan[" in str(jaxpr)


def _some(queries, slots, filled):
    """Queries over a cache of which the first slots are filled, in no order; and who sees whom, bool [T, S]."""
    order = np.random.default_rng(3).permutation(filled)
    position_S = jnp.asarray([*order, *[-1] * (slots - filled)])
    return visible(jnp.arange(filled - queries, filled), position_S, W)


@pytest.mark.parametrize("slots", [12, 14])
@pytest.mark.parametrize("filled", [3, 4, 5, 8, 11, 12])
def test_blocks_equal_the_whole(blocks_of_four, slots, filled):
    """Of 14 slots the last block is moved back, over some that were seen."""
    q, k, v = _inputs(3, slots)
    seen_TS = _some(3, slots, filled)
    y = cached_attention(q, *_by_head(k, v), Seen(seen_TS[None].repeat(2, 0), jnp.full(2, filled)), 2, "float32")
    np.testing.assert_allclose(y, oracle.attention(q, k, v, np.array([seen_TS] * 2)), atol=5e-6)


@pytest.mark.parametrize("options", [None, few_rows.OPTIONS], ids=["", "reordered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_depends_on_how_far_others_have_come(blocks_of_four, dtype, options):
    """A text of five tokens beside one of five, and beside one that fills the cache."""
    q, k, v = _inputs(1, 16)
    own_TS, long_TS = _some(1, 16, 5), _some(1, 16, 16)
    attend = partial(cached_attention, q, *_by_head(k, v), chunk=2, product_dtype=dtype)
    call = jax.jit(attend, compiler_options=options)
    alone = call(Seen(jnp.stack([own_TS, own_TS]), jnp.array([5, 5])))
    beside = call(Seen(jnp.stack([own_TS, long_TS]), jnp.array([5, 16])))
    np.testing.assert_array_equal(alone[0], beside[0])
    assert not np.array_equal(alone[1], beside[1])


def test_blocks_beyond_what_is_seen_are_not_looked_at(blocks_of_four):
    """They hold NaN, which a weight of zero would not hide."""
    q, k, v = _inputs(2, 16)
    seen_TS = _some(2, 16, 7)
    k, v = (x.at[:, 8:].set(jnp.nan) for x in (k, v))
    y = cached_attention(q, *_by_head(k, v), Seen(seen_TS[None].repeat(2, 0), jnp.full(2, 7)), 2, "float32")
    expected = oracle.attention(q, k[:, :8], v[:, :8], np.array([seen_TS[:, :8]] * 2))
    np.testing.assert_allclose(y, expected, atol=5e-6)


@pytest.mark.parametrize("extent", [0, 16])
def test_who_sees_nothing_gets_numbers(blocks_of_four, extent):
    q, k, v = _inputs(2, 16)
    y = cached_attention(q, *_by_head(k, v), Seen(jnp.zeros((2, 2, 16), bool), jnp.full(2, extent)), 2, "float32")
    assert np.isfinite(y).all()


@pytest.mark.parametrize("form", ["bits", "int8"])
def test_blocks_of_a_cache_in_fewer_bits(blocks_of_four, form):
    """What a cache holds is what is attended to."""
    q, k, v = _inputs(3, 12)
    seen_TS = _some(3, 12, 7)
    held = [bits(x) if form == "bits" else in_int8(x) for x in _by_head(k, v)]
    exact = [jnp.swapaxes(numbers(x) if form == "bits" else x.dequantized("float32"), 1, 2) for x in held]
    y = cached_attention(q, *held, Seen(seen_TS[None].repeat(2, 0), jnp.full(2, 7)), 2, "float32")
    np.testing.assert_allclose(y, oracle.attention(q, *exact, np.array([seen_TS] * 2)), atol=5e-6)


def test_a_gpu_without_the_kernel_looks_at_all_slots_at_once():
    """By jax's name, and by that of a plan."""
    assert cached.slots_at_once(4096, "gpu") == cached.slots_at_once(4096, "cuda") == 4096
    assert cached.slots_at_once(4096, "tpu") == 1024
    assert cached.slots_at_once(100, "tpu") == 100


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_attention(self):
        q, k, v = _inputs(8, 8)
        seen_BTS = jnp.ones((2, 8, 8), bool)
        y = self.variant(lambda *inputs: cached_attention(*inputs, 4, "bfloat16"))(q, *_by_head(k, v), _all(seen_BTS))
        chex.assert_shape(y, (2, 8, *HEADS))
        chex.assert_type(y, jnp.float32)
