"""The ring: by hand, and against a text that forgets nothing, for any chunking, raggedness and number of slots."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle
from oracles import tiny

from mixtral_jax.model import cache as c
from mixtral_jax.model.backends.cached import cached_attention
from mixtral_jax.model.backends.chunked import Keys, self_attention

pytestmark = pytest.mark.usefixtures("blocks_of_three_slots")

K, G, H = 2, 2, 8  # as in tiny.config
W = 4
LENGTH = 3 * W + 2


@partial(jax.jit, static_argnums=(5, 6))
def _advance(cache, real_BT, q, k, v, window, fresh=False):
    """One layer's attention of a chunk to the text so far and itself, and the cache with the chunk in it."""
    view, cache, position_BT = c.view(cache, real_BT, window, fresh)
    layer, keys, values = c.advance(cache.layers[0], k, v, view)
    if view.seen is None:
        y = self_attention(q, Keys(keys, values), None, window, 128, "float32")
    else:
        y = cached_attention(q, keys, values, view.seen, 128, "float32")
    return y, cache._replace(layers=(layer,)), position_BT


def _text(batch, length=LENGTH):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, K, G, H))
    k, v = rng.standard_normal((2, batch, length, K, H))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def _empty(slots, batch=1, dtype="float32"):
    return c.empty_cache(tiny.config("mistral", num_layers=1), batch, slots, dtype)


def _exact(q, k, v, window):
    return oracle.attention(q, k, v, oracle.mask(np.ones(q.shape[:2]), window))


def _slots(window, at_once):
    return c.num_slots(tiny.config("mistral", sliding_window=window), LENGTH, at_once)


@pytest.mark.parametrize(
    ("window", "max_length", "at_once", "slots"),
    [(4, 100, 1, 4), (4, 100, 3, 6), (4, 5, 3, 5), (4, 3, 1, 3), (None, 100, 1, 100), (None, 100, 5, 100)],
)
def test_num_slots(window, max_length, at_once, slots):
    assert c.num_slots(tiny.config("mistral", sliding_window=window), max_length, at_once) == slots


def test_bytes_do_not_depend_on_the_length():
    config = tiny.config("mistral")
    sizes = {
        sum(x.nbytes for x in jax.tree.leaves(c.empty_cache(config, 2, c.num_slots(config, length, 3), "bfloat16")))
        for length in (100, 10_000, 10_000_000)
    }
    assert len(sizes) == 1


def test_the_docstrings_example():
    """Six tokens, R = 4, one at a time: positions 4 5 2 3."""
    q, k, v = _text(1)
    cache = _empty(4)
    for t in range(6):
        _, cache, position = _advance(cache, jnp.ones((1, 1), bool), *(x[:, t : t + 1] for x in (q, k, v)), W)
        assert position.tolist() == [[t]]
    assert cache.position_BR.tolist() == [[4, 5, 2, 3]]
    assert cache.length_B.tolist() == [6]
    np.testing.assert_array_equal(cache.layers[0].k_BKRH, np.swapaxes(k[:, np.array([4, 5, 2, 3])], 1, 2))
    np.testing.assert_array_equal(cache.layers[0].v_BKRH, np.swapaxes(v[:, np.array([4, 5, 2, 3])], 1, 2))


def test_a_chunk_longer_than_the_ring_stores_its_end():
    """Positions 0 to 5 at once, R = 4: slots get 4 5 2 3, and the first two are attended to but not stored."""
    view, cache, _ = c.view(_empty(4), jnp.ones((1, 6), bool), W)
    assert view.slot_BT.tolist() == [[4, 4, 2, 3, 0, 1]]
    assert view.chunk_is_apart
    assert cache.position_BR.tolist() == [[4, 5, 2, 3]]
    np.testing.assert_array_equal(view.seen.visible_BTS[0, :, 6:], False)
    np.testing.assert_array_equal(view.seen.visible_BTS[0, :, :6], oracle.mask(np.ones((1, 6)), W)[0])


def test_the_extent_of_texts_that_do_not_go_on_is_nothing():
    """Rows of 5, 2 and no tokens, of which the longest then ends; R = 6. Beyond R, all slots are filled."""
    cache, extents = _empty(6, batch=3), []
    for counts, chunk in [((5, 2, 0), 5), ((0, 1, 0), 1), ((0, 0, 0), 1), ((1, 1, 1), 1), ((3, 0, 0), 3)]:
        real_BT = jnp.arange(chunk)[None] < jnp.array(counts)[:, None]
        view, cache, _ = c.view(cache, real_BT, None)
        extents.append(view.seen.extent_B.tolist())
    assert extents == [[5, 2, 0], [0, 3, 0], [0, 0, 0], [6, 4, 1], [6, 0, 0]]
    assert cache.length_B.tolist() == [9, 4, 1]


def test_a_chunk_beside_the_ring_comes_before_it():
    """Three tokens after two, R = W = 4: the chunk's three places, and the two of the ring that are filled."""
    _, cache, _ = c.view(_empty(4), jnp.ones((1, 2), bool), W)
    view, _, _ = c.view(cache, jnp.ones((1, 3), bool), W)
    assert view.chunk_is_apart
    assert view.seen.extent_B.tolist() == [5]
    np.testing.assert_array_equal(view.seen.visible_BTS.any(1), [[True, True, True, True, True, False, False]])


@pytest.mark.parametrize(("window", "at_once"), [(1, 1), (W, 1), (W, 3), (LENGTH, 1), (None, 1)])
@pytest.mark.parametrize("chunk", [1, 7, W - 1, W, W + 1, 2 * W])
def test_any_chunking_equals_the_whole(chunk, window, at_once):
    q, k, v = _text(1)
    cache, outputs = _empty(_slots(window, at_once)), []
    for start in range(0, LENGTH, chunk):
        parts = [x[:, start : start + chunk] for x in (q, k, v)]
        y, cache, _ = _advance(cache, jnp.ones(parts[0].shape[:2], bool), *parts, window)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, 1), _exact(q, k, v, window), atol=5e-6)


@pytest.mark.parametrize("window", [W, None])
def test_rows_advance_at_their_own_pace(window):
    """Each round takes up to three tokens of each row, at random none; what is padding must not show."""
    q, k, v = _text(3)
    exact, rng = _exact(q, k, v, window), np.random.default_rng(3)
    cache, done = _empty(_slots(window, 3), batch=3), np.zeros(3, int)
    while done.min() < LENGTH:
        count = np.minimum(rng.integers(0, 4, 3), LENGTH - done)
        real = np.arange(3)[None] < count[:, None]
        index = np.where(real, done[:, None] + np.arange(3)[None], 0)
        chunk = [np.stack([x[row, index[row]] for row in range(3)]) for x in (q, k, v)]
        chunk = [np.where(real[(...,) + (None,) * (x.ndim - 2)], x, 1e3).astype(np.float32) for x in chunk]
        y, cache, position = _advance(cache, jnp.asarray(real), *chunk, window)
        np.testing.assert_array_equal(position, np.where(real, index, -1))
        for row, t in np.argwhere(real):
            np.testing.assert_allclose(y[row, t], exact[row, index[row, t]], atol=5e-6)
        done += count
        np.testing.assert_array_equal(cache.length_B, done)
    chex.assert_tree_all_finite(y)


@pytest.mark.parametrize("window", [W, None])
@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_rejected_drafts_roll_back_after_a_wrap(accepted, window):
    """Nine tokens, then three drafts of which some are right: setting the length back is enough."""
    q, k, v = _text(1)
    cache = _empty(_slots(window, 3))
    for t in range(9):
        _, cache, _ = _advance(cache, jnp.ones((1, 1), bool), *(x[:, t : t + 1] for x in (q, k, v)), window)
    right = np.arange(3) < accepted
    drafts = [jnp.where(right.reshape((1, 3) + (1,) * (x.ndim - 2)), x[:, 9:12], 50.0) for x in (q, k, v)]
    _, cache, _ = _advance(cache, jnp.ones((1, 3), bool), *drafts, window)
    cache = cache._replace(length_B=jnp.array([9 + accepted]))
    for t in range(9 + accepted, LENGTH):
        y, cache, _ = _advance(cache, jnp.ones((1, 1), bool), *(x[:, t : t + 1] for x in (q, k, v)), window)
        np.testing.assert_allclose(y, _exact(q, k, v, window)[:, t : t + 1], atol=5e-6)


@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 3 * W])
def test_a_fresh_cache_gives_the_same(length):
    q, k, v = (x[:, :length] for x in _text(2))
    real = jnp.arange(length)[None] < jnp.array([[length], [max(1, length - 2)]])
    plain, fresh = (_advance(_empty(W, batch=2), real, q, k, v, W, is_fresh) for is_fresh in (False, True))
    np.testing.assert_allclose(plain[0][real], fresh[0][real], atol=5e-6)
    chex.assert_trees_all_equal(plain[1:], fresh[1:])


@pytest.mark.parametrize(("window", "at_once"), [(W, 1), (W, 3), (None, 1)])
@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_in_int8_any_chunking_sees_the_same_rounded_keys_and_values(chunk, window, at_once):
    """That is attention to what a text's keys and values are in 255 steps a token and head, each token's own too."""
    q, k, v = _text(1)
    rounded = [np.rint(x / (s := np.abs(x).max(-1, keepdims=True) / 127)) * s for x in (np.array(k), np.array(v))]
    cache, outputs = _empty(_slots(window, at_once), dtype="int8"), []
    for start in range(0, LENGTH, chunk):
        parts = [x[:, start : start + chunk] for x in (q, k, v)]
        y, cache, _ = _advance(cache, jnp.ones(parts[0].shape[:2], bool), *parts, window, start == 0)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, 1), _exact(q, *rounded, window), atol=5e-6)
    assert 1e-3 < np.abs(np.concatenate(outputs, 1) - _exact(q, k, v, window)).max() < 5e-2


def test_in_int8_a_token_of_zeros_stays_one():
    q, k, v = _text(1, 1)
    _, cache, _ = _advance(_empty(4, dtype="int8"), jnp.ones((1, 1), bool), q, k * 0, v, W)
    assert not np.any(cache.layers[0].k_BKRH.dequantized())
    assert np.abs(cache.layers[0].v_BKRH.values[:, :, 0]).max() == 127


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_bits_are_kept_as_the_numbers_would_be(chunk, monkeypatch):
    """A cache in bfloat16 as CPUs keep it, and as others do: the same to the bit."""
    q, k, v = _text(1)
    bits = _empty(_slots(W, 3), dtype="bfloat16")
    monkeypatch.setattr(c, "platform", lambda: "tpu")
    numbers = _empty(_slots(W, 3), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(bits.layers)} == {jnp.dtype("uint16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(numbers.layers)} == {jnp.dtype("bfloat16")}
    for start in range(0, LENGTH, chunk):
        parts = [x[:, start : start + chunk] for x in (q, k, v)]
        real = jnp.ones(parts[0].shape[:2], bool)
        y, numbers, _ = _advance(numbers, real, *parts, W, start == 0)
        y_bits, bits, _ = _advance(bits, real, *parts, W, start == 0)
        np.testing.assert_array_equal(y_bits, y)
        for own, expected in zip(jax.tree.leaves(bits.layers), jax.tree.leaves(numbers.layers), strict=True):
            np.testing.assert_array_equal(own, np.asarray(expected).view(np.uint16))


@pytest.mark.parametrize(("window", "chunk", "apart"), [(W, 1, False), (W, 3, False), (64, 5, True)])
def test_on_a_cpu_nothing_as_large_as_the_cache_is_made_in_float32(window, chunk, apart):
    """XLA would write all of a cache in bfloat16 anew for each token, and before a loop over blocks for all of them."""
    cache = c.empty_cache(tiny.config("mistral", num_layers=1), 3, 64, "bfloat16")
    new, q = jnp.ones((3, chunk, K, H)), jnp.ones((3, chunk, K, G, H))

    def step(cache, new, q):
        view, cache, _ = c.view(cache, jnp.ones((3, chunk), bool), window)
        assert view.chunk_is_apart == apart
        layer, keys, values = c.advance(cache.layers[0], new, new, view)
        return cache._replace(layers=(layer,)), cached_attention(q, keys, values, view.seen, 128, "bfloat16")

    compiled = jax.jit(step, donate_argnums=0).lower(cache, new, q).compile().as_text()
    assert f"[3,{K},64,{H}]" in compiled
    assert not re.search(rf"f32\[3,{K},6\d,{H}\]", compiled)


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_int8(self):
        """A head's slots lie together; the scales take 4 bytes beside each head's H."""
        cache = self.variant(lambda: c.empty_cache(tiny.config("mixtral"), 3, W, "int8"))()
        k_BKRH, v_BKRH = cache.layers[0]
        chex.assert_shape([k_BKRH.values, v_BKRH.values], (3, K, W, H))
        chex.assert_shape([k_BKRH.scale, v_BKRH.scale], (3, K, W, 1))
        chex.assert_type([k_BKRH.values, k_BKRH.scale], [jnp.int8, jnp.float32])
        new = jnp.ones((3, 5, K, H))
        view, moved, _ = c.view(cache, jnp.ones((3, 5), bool), W)
        advance = self.variant(lambda layer: c.advance(layer, new, new, view))
        stored, keys, values = advance(moved.layers[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(cache.layers[0], stored)
        chex.assert_shape([keys.values, values.values], (3, K, W + 5, H))

    @chex.variants(with_jit=True, without_jit=True)
    def test_cache(self):
        config = tiny.config("mixtral")
        cache = self.variant(lambda: c.empty_cache(config, 3, W, "bfloat16"))()
        assert cache.num_slots == W
        chex.assert_shape(jax.tree.leaves(cache.layers), (3, K, W, H))
        chex.assert_type(jax.tree.leaves(cache.layers), jnp.uint16)  # the bits of them, on a CPU
        chex.assert_shape([cache.position_BR, cache.length_B], [(3, W), (3,)])
        new = jnp.zeros((3, 5, K, H))

        def advance(cache, new):
            view, moved, position = c.view(cache, jnp.ones((3, 5), bool), W)
            stored = c.store(cache.layers[0], new, new, view.slot_BT)
            return view.slot_BT, *view.seen, moved, position, stored, c.advance(cache.layers[0], new, new, view)

        slot, seen, extent, moved, position, stored, (advanced, keys, values) = self.variant(advance)(cache, new)
        chex.assert_shape([slot, position, seen], [(3, 5), (3, 5), (3, 5, W + 5)])
        chex.assert_type([slot, position, seen], [int, int, bool])
        chex.assert_shape(extent, (3,))
        chex.assert_type(extent, jnp.int32)
        chex.assert_shape([keys, values], (3, K, W + 5, H))
        chex.assert_type([keys, values], jnp.uint16)
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, moved)
        chex.assert_trees_all_equal_shapes_and_dtypes(cache.layers[0], stored, advanced)
