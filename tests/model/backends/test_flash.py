"""The GPU's kernels, step by step on this machine, against the chunked form; and which programs have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import chunked, flash
from mixtral_jax.model.backends.chunked import Keys
from mixtral_jax.model.context_parallel import attention
from mixtral_jax.model.masks import visible
from mixtral_jax.sharding.rules import TRAINING

LENGTH, HEADS = 256, (2, 2, 64)  # K, G, H


def _inputs(places=LENGTH, batch=1, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, LENGTH, *HEADS))
    k, v = rng.standard_normal((2, batch, places, HEADS[0], HEADS[2]))
    return [jnp.asarray(x, dtype) for x in (q, k, v, rng.standard_normal(q.shape))]


def _values(form, q, k, v, cotangent):
    y, vjp = jax.vjp(form, q, k, v)
    return y, *vjp(cotangent)


def _check(window, segment_BT=None, batch=1, first_query=0, **absent):
    """Value and gradients, in float32, of both forms."""
    first = int(first_query)
    inputs = _inputs(LENGTH + first, batch)
    segment_BS = None if segment_BT is None else jnp.pad(segment_BT, ((0, 0), (first, 0)), mode="edge")

    def keys(k, v):
        return Keys(k, v, segment_BS, first_query, **absent)

    def kernel(q, k, v):
        return flash.self_attention(q, keys(k, v), segment_BT, window, "float32", interpret=True)

    def plain(q, k, v):
        return chunked.self_attention(q, keys(k, v), segment_BT, window, 128, "float32")

    actual = jax.jit(lambda *inputs: _values(kernel, *inputs))(*inputs)
    for ours, expected in zip(actual, _values(plain, *inputs), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("window", [1, 63, 64, 129, None])
def test_equals_the_chunked_form(window):
    _check(window)


def test_segments_differ_between_rows():
    _check(100, jnp.asarray([[1] * 100 + [2] * 30 + [3] * 100 + [0] * 26, [1] * 256]), batch=2)


@pytest.mark.parametrize("absent", [0, 60])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_halo_of_any_size(packed, absent):
    segment_BT = jnp.asarray([[1] * 100 + [2] * 156]) if packed else None
    _check(61, segment_BT, first_query=60, absent=jnp.asarray(absent))


def test_a_shard_that_learns_its_place_when_it_runs():
    _check(None, jnp.asarray([[1] * 30 + [2] * 226]), first_query=jnp.asarray(256))


@pytest.mark.parametrize("window", [5, None])
def test_one_number_a_query_says_what_it_sees(window):
    segment_BT = jnp.asarray([[1] * 9 + [2] + [3] * 4 + [0] * 2, [4] * 16])
    place = jnp.arange(16)
    keys = Keys(jnp.zeros((2, 16, 1, 8)), jnp.zeros((2, 16, 1, 8)), segment_BT)
    first_BT = flash.first_seen((2, 16), keys, segment_BT, window)
    seen_BTS = (place[None, None] >= first_BT[..., None]) & (place[None] <= place[:, None])[None]
    expected = visible(place[None], place[None], window, segment_BT, segment_BT)
    np.testing.assert_array_equal(seen_BTS, expected)


def test_bfloat16_is_as_near_to_float32_as_the_chunked_form():
    inputs = _inputs(dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in inputs]

    def kernel(q, k, v):
        return flash.self_attention(q, Keys(k, v), None, 100, "bfloat16", interpret=True)

    def chunks(q, k, v, dtype="bfloat16"):
        return chunked.self_attention(q, Keys(k, v), None, 100, 128, dtype)

    expected = _values(lambda q, k, v: chunks(q, k, v, "float32"), *exact)
    by_kernel = _values(kernel, *inputs[:3], exact[3])
    by_chunks = _values(chunks, *inputs[:3], exact[3])
    for ours, theirs, right in zip(by_kernel, by_chunks, expected, strict=True):
        errors = [np.abs(np.float32(x) - np.float32(right)).max() for x in (ours, theirs)]
        assert errors[0] < max(2 * errors[1], 0.02 * np.abs(right).max())


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "taken"),
    [
        (256, 128, "bfloat16", True),
        (256, 64, "bfloat16", True),
        (200, 128, "bfloat16", False),
        (256, 96, "bfloat16", False),
        (256, 128, "float32", False),
    ],
    ids=["all is well", "narrow", "length", "head_dim", "dtype"],
)
def test_what_it_takes(length, head_dim, dtype, taken):
    assert flash.suits(length, head_dim, dtype) is taken


def test_programs_for_gpu_have_it_and_others_do_not():
    q, k, v, _ = _inputs()

    def has_it(kernel, platform):
        execution = Execution(product_dtype="bfloat16", attention=kernel)
        traced = jax.jit(lambda q, k, v: attention(q, k, v, None, 100, execution, TRAINING)).trace(q, k, v)
        return "triton" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert has_it("kernel", "cuda")
    assert not has_it("kernel", "cpu")
    assert not has_it("xla", "cuda")
