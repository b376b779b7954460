"""Chunked attention against dense float64, at every edge of the window, of the chunks and of the segments."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle

from mixtral_jax.model.backends import chunked
from mixtral_jax.model.backends.chunked import Keys, attend, goes_by_blocks, self_attention
from mixtral_jax.model.masks import visible

HEADS = (2, 3, 8)  # K, G, H
W = 6


def _inputs(length, batch=2):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, *HEADS))
    k, v = rng.standard_normal((2, batch, length, HEADS[0], HEADS[2]))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, rng.standard_normal(q.shape))]


def _check(length, window, chunk, segment_BT=None):
    """Value and gradients in float32."""
    q, k, v, cotangent = _inputs(length)

    @jax.jit
    def value_and_gradients(q, k, v, cotangent):
        y, vjp = jax.vjp(
            lambda q, k, v: self_attention(q, Keys(k, v, segment_BT), segment_BT, window, chunk, "float32"), q, k, v
        )
        return y, *vjp(cotangent)

    seen = oracle.mask(np.ones((len(q), length)) if segment_BT is None else segment_BT, window)
    expected = oracle.attention(q, k, v, seen), *oracle.attention_gradients(q, k, v, seen, cotangent)
    for actual, exact in zip(value_and_gradients(q, k, v, cotangent), expected, strict=True):
        np.testing.assert_allclose(actual, exact, atol=5e-6)


@pytest.mark.parametrize("window", [W - 1, W, W + 1, None])
@pytest.mark.parametrize("length", [W - 1, W, W + 1, 3 * W])
def test_unrolled_with_chunks_of_4(length, window):
    _check(length, window, chunk=4)


@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W, 100])
def test_any_chunk(chunk):
    _check(2 * W, W, chunk)


@pytest.fixture(params=[1, 3, 4, None], ids=lambda keys: f"{keys} keys at once" if keys else "all keys")
def looped(request, monkeypatch):
    """The forms of many chunks: over blocks of their keys, and over all that a span's widest sees."""
    by_blocks = request.param is not None
    monkeypatch.setattr(chunked, "KEYS_AT_ONCE", request.param)
    monkeypatch.setattr(
        chunked, "goes_by_blocks", lambda length, num_places, window, chunk, name: by_blocks and length > 16 * chunk
    )
    return by_blocks


LONG = [*((37, window) for window in (1, W - 1, W, W + 1, 36, 37, 100, None)), (34, W), (34, None)]


@pytest.mark.parametrize(("length", "window"), LONG)
def test_looped_over_more_than_16_chunks_of_2(looped, length, window):
    _check(length, window, chunk=2)


@pytest.mark.parametrize(("window", "chunk"), [(3, 1), (W, 2), (None, 2)])
def test_segments_of_a_long_row(looped, window, chunk):
    segment_BT = np.array([[1] * 7 + [2] * 13 + [3] * 18, [4] * 30 + [0] * 8], np.int32)
    _check(38, window, chunk, segment_BT)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("window", [W, None])
def test_queries_after_other_keys(looped, window, known):
    """The last 34 of 40, told so when compiling or only when running; of the places before them two hold nothing."""
    before, absent, length = 6, 2, 40
    q, k, v, cotangent = _inputs(length)
    queries = slice(before, None)

    @jax.jit
    def value_and_gradients(q, k, v, cotangent, first):
        keys = partial(Keys, first_query=before if known else first, absent=absent)
        y, vjp = jax.vjp(lambda q, k, v: self_attention(q, keys(k, v), None, window, 2, "float32"), q, k, v)
        return y, *vjp(cotangent)

    seen = oracle.mask(np.ones((len(q), length)), window)
    seen[..., :absent] = False
    seen[:, :before] = True  # of queries that there are not
    cotangent = cotangent.at[:, :before].set(0)
    expected = [oracle.attention(q, k, v, seen), *oracle.attention_gradients(q, k, v, seen, cotangent)]
    found = value_and_gradients(q[:, queries], k, v, cotangent[:, queries], before)
    for actual, exact in zip(found, [expected[0][:, queries], expected[1][:, queries], *expected[2:]], strict=True):
        np.testing.assert_allclose(actual, exact, atol=5e-6)


def test_queries_that_see_nothing_beside_many_that_do(looped):
    """The first nine, of 37."""
    absent, length = 9, 37
    q, k, v, cotangent = _inputs(length)
    v += 10  # so that nothing at all is no mean
    y, vjp = jax.vjp(lambda q, k, v: self_attention(q, Keys(k, v, absent=absent), None, None, 2, "float32"), q, k, v)
    gradients = vjp(cotangent)
    low, high = (extreme(v, axis=1)[:, None, :, None] for extreme in (np.min, np.max))
    np.testing.assert_array_equal((low <= y[:, :absent]) & (y[:, :absent] <= high), True)
    seen = oracle.mask(np.ones((2, length)), None)
    seen[..., :absent] = False
    seen[:, :absent] = True  # whose cotangent is none
    cotangent = cotangent.at[:, :absent].set(0)
    np.testing.assert_allclose(y[:, absent:], oracle.attention(q, k, v, seen)[:, absent:], atol=2e-5)
    for actual, exact in zip(gradients, oracle.attention_gradients(q, k, v, seen, cotangent), strict=True):
        np.testing.assert_allclose(actual, exact, atol=5e-5)


def test_long_sequences_are_looped_over(looped):
    """The tests above would show nothing if they took the same path."""

    def loops(length):
        q, k, v, cotangent = _inputs(length)

        def pull(q, k, v, cotangent):
            return jax.vjp(lambda q, k, v: self_attention(q, Keys(k, v), None, None, 2, "float32"), q, k, v)[1](
                cotangent
            )

        jaxpr = str(jax.make_jaxpr(pull)(q, k, v, cotangent))
        return jaxpr.count("scan["), jaxpr.count("while[")

    # By blocks 32 queries are in a loop of known length, whose chunks' blocks, and those of the query that is left, are
    # not; else 30 are in three, and one chunk is alone. Backward as many as forward.
    assert loops(32) == (0, 0)
    assert loops(33) == ((2, 4) if looped else (6, 0))


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("window", [3, None])
def test_segments_and_padding(window, chunk):
    segment_BT = np.array(
        [[1] * 5 + [2] + [3] * 11 + [4] * 3, [1] * 2 + [2] * 12 + [0] * 6],
        np.int32,
    )
    _check(20, window, chunk, segment_BT)


@pytest.mark.parametrize(("length", "window"), [(1, None), (1, 1), (9, 1)])
def test_the_smallest(length, window):
    _check(length, window, chunk=4)


def test_a_query_that_sees_nothing_is_finite_and_has_no_gradient():
    """Its own place holds nothing, nor do those before it."""
    q, k, v, cotangent = _inputs(5)
    y, vjp = jax.vjp(lambda q, k, v: self_attention(q, Keys(k, v, absent=2), None, None, 3, "float32"), q, k, v)
    d_q, *others = vjp(cotangent)
    chex.assert_tree_all_finite((y, d_q, others))
    np.testing.assert_array_equal(d_q[:, :2], 0)
    np.testing.assert_allclose(y[0, 0], jnp.broadcast_to(jnp.mean(v[0, :3], 0)[:, None], y[0, 0].shape), atol=1e-6)


def _check_large_scores(length):
    q, k, v, _ = _inputs(length)
    seen = oracle.mask(np.ones((2, length)), None)
    y = self_attention(1000 * q, Keys(k, v), None, None, 2, "float32")
    np.testing.assert_allclose(y, oracle.attention(1000 * q, k, v, seen), atol=1e-3)


def test_large_scores_do_not_overflow():
    _check_large_scores(8)


def test_large_scores_of_a_long_row_do_not_overflow(looped):
    _check_large_scores(37)


def _check_bfloat16_products(length):
    q, k, v, _ = _inputs(length)
    exact = oracle.attention(q, k, v, oracle.mask(np.ones((2, length)), W))
    y = self_attention(q, Keys(k, v), None, W, 2, "bfloat16")
    assert y.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 1e-2


def test_bfloat16_products_are_close():
    _check_bfloat16_products(12)


def test_bfloat16_products_of_a_long_row_are_close(looped):
    _check_bfloat16_products(37)


def test_chunks_are_taken_one_after_another():
    """Each is held back until the one before it is done, and so backward: a TPU's compiler takes what is free of order
    at once, and with it the scores of all chunks."""
    q, k, v, cotangent = _inputs(16)

    def gradients(q, k, v, cotangent):
        return jax.vjp(lambda *qkv: self_attention(qkv[0], Keys(*qkv[1:]), None, None, 4, "float32"), q, k, v)[1](
            cotangent
        )

    jaxpr = str(jax.make_jaxpr(gradients)(q, k, v, cotangent))
    queries, keys, one = (rf"\w+:f32\[2,16,{rest}\] " for rest in ("2,3,8", "2,8", "2,3"))
    forward = queries + one.rstrip() + " = optimization_barrier"  # queries of which some are results
    backward = queries * 2 + (keys * 2).rstrip() + " = optimization_barrier"
    assert (len(re.findall(forward, jaxpr)), len(re.findall(backward, jaxpr))) == (4, 4)


@pytest.mark.parametrize(
    ("name", "window", "most"), [("cpu", 1024, 0.02), ("cpu", None, 0.02), ("cuda", 1024, 0.1), ("cuda", None, 0.25)]
)
def test_memory_of_a_training_step_is_far_below_dense(monkeypatch, name, window, most):
    """T x T scores in float32 are 268 MB here; a chunk has 128 of their 8192 rows, and a block 384 of their columns."""
    monkeypatch.setattr(chunked, "platform", lambda: name)
    length = 8192

    def dense(q, k, v):
        return attend(q, k, v, visible(jnp.arange(length), jnp.arange(length), window)[None], "float32").attention()

    def in_chunks(q, k, v):
        return self_attention(q, Keys(k, v), None, window, 128, "float32")

    def temporary_bytes(form):
        shapes = [jax.ShapeDtypeStruct((1, length, *dims, 8), jnp.float32) for dims in ((1, 1), (1,), (1,))]
        gradients = jax.jit(jax.grad(lambda *qkv: jnp.sum(form(*qkv) ** 2), (0, 1, 2)))
        return gradients.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(in_chunks) < most * temporary_bytes(dense)


@pytest.mark.parametrize(
    ("length", "num_places", "window", "chunk", "name", "expected"),
    [
        (4096, 4096, None, 128, "cpu", True),
        (4096, 4096, 1024, 128, "cpu", True),
        (4096, 4096, 1023, 128, "cpu", False),  # less than three blocks of keys
        (4096, 4096, 1025, 128, "cpu", False),  # a fourth with one key
        (4096, 4096, 1215, 128, "cpu", False),
        (4096, 4096, 1216, 128, "cpu", True),  # four blocks, of which seven eighths are filled
        (8192, 8192, 896, 256, "cpu", True),
        (2048, 2048, None, 128, "cpu", False),  # sixteen chunks
        (2048, 8192, None, 128, "cpu", False),
        (2176, 8704, None, 128, "cpu", True),
        (2176, 1000, None, 128, "cpu", False),
        (4096, 4096, None, 127, "cpu", False),
        (4096, 4096, None, 128, "cuda", False),
        (4096, 4096, None, 128, "tpu", False),
    ],
)
def test_where_keys_are_taken_by_blocks(length, num_places, window, chunk, name, expected):
    assert goes_by_blocks(length, num_places, window, chunk, name) is expected


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_attention(self):
        q, k, v, _ = _inputs(8)
        seen_BTS = jnp.ones((2, 8, 8), bool)
        outputs = [
            self.variant(lambda q, k, v: self_attention(q, Keys(k, v), None, W, 4, "bfloat16"))(q, k, v),
            self.variant(lambda *inputs: attend(*inputs, "bfloat16").attention())(q, k, v, seen_BTS),
        ]
        chex.assert_shape(outputs, (2, 8, *HEADS))
        chex.assert_type(outputs, jnp.float32)
