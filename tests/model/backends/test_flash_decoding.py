"""The GPU's kernel for a cache, step by step on this machine, against dense float64; and which programs have it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle

from mixtral_jax.config import Execution
from mixtral_jax.model import context_parallel
from mixtral_jax.model.backends import cached, flash_decoding
from mixtral_jax.model.backends.cached import Seen
from mixtral_jax.model.backends.quantized import in_int8
from mixtral_jax.model.context_parallel import attention_to_cache, over_heads
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.rules import DECODING

HEADS = (2, 3, 64)  # K, G, H
SLOTS = 330  # five blocks, and a part of one
kernel = partial(flash_decoding.cached_attention, interpret=True)


def _inputs(queries, batch=2, slots=SLOTS):
    """By head as a cache holds keys and values."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, queries, *HEADS))
    k, v = rng.standard_normal((2, batch, HEADS[0], slots, HEADS[2]))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def _seen(queries, *extents, slots=SLOTS):
    """Half of what each text has filled, in no order, other slots for each query, and its first one."""
    half_BTS = np.random.default_rng(1).random((len(extents), queries, slots)) < 0.5
    half_BTS[:, :, 0] = True
    for own_TS, extent in zip(half_BTS, extents, strict=True):
        own_TS[:, extent:] = False
    return Seen(jnp.asarray(half_BTS), jnp.array(extents))


def _exact(q, k, v, seen):
    return oracle.attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), np.asarray(seen.visible_BTS))


@pytest.mark.parametrize("programs", [1, 12, 256], ids=["one program", "three", "as many as blocks"])
@pytest.mark.parametrize("queries", [1, 7, 50], ids=["one", "a tile not full", "tiles"])
def test_each_text_sees_its_own(monkeypatch, queries, programs):
    """One has filled all slots, the other less than two blocks."""
    monkeypatch.setattr(flash_decoding, "_PROGRAMS", programs)
    q, k, v = _inputs(queries)
    seen = _seen(queries, 70, SLOTS)
    y = jax.jit(partial(kernel, product_dtype="float32"))(q, k, v, seen)
    np.testing.assert_allclose(y, _exact(q, k, v, seen), atol=5e-6)


@pytest.mark.parametrize("extent", [1, 63, 64, 65, 128, 129])
def test_blocks_beyond_the_extent_are_not_read(extent):
    """They hold NaN, which a weight of zero would not hide; a slot of the same block is at most not seen."""
    q, k, v = _inputs(1)
    seen, end = _seen(1, extent, extent), -(-extent // 64) * 64
    assert end < SLOTS
    empty = [x.at[:, :, end:].set(jnp.nan) for x in (k, v)]
    y = kernel(q, *empty, seen, "float32")
    np.testing.assert_allclose(y, _exact(q, k, v, seen), atol=5e-6)


def test_a_cache_smaller_than_a_block():
    q, k, v = _inputs(2, slots=20)
    seen = _seen(2, 20, 5, slots=20)
    np.testing.assert_allclose(kernel(q, k, v, seen, "float32"), _exact(q, k, v, seen), atol=5e-6)


def test_a_cache_in_int8():
    """What it holds is what is attended to."""
    q, k, v = _inputs(3)
    held, seen = [in_int8(x) for x in (k, v)], _seen(3, 100, SLOTS)
    exact = [x.dequantized("float32") for x in held]
    np.testing.assert_allclose(kernel(q, *held, seen, "float32"), _exact(q, *exact, seen), atol=5e-6)


@pytest.mark.parametrize("extent", [0, SLOTS])
def test_who_sees_nothing_gets_numbers(extent):
    q, k, v = _inputs(2)
    seen = Seen(jnp.zeros((2, 2, SLOTS), bool), jnp.full(2, extent))
    assert np.isfinite(kernel(q, k, v, seen, "float32")).all()


def test_bfloat16_is_as_near_to_float32_as_by_xla():
    inputs = [x.astype(jnp.bfloat16) for x in _inputs(3)]
    seen = _seen(3, 70, SLOTS)
    exact = _exact(*[x.astype(jnp.float32) for x in inputs], seen)
    ours = kernel(*inputs, seen, "bfloat16")
    by_xla = cached.cached_attention(*inputs, seen, 128, "bfloat16")
    errors = [np.abs(np.asarray(y) - exact).max() for y in (ours, by_xla)]
    assert errors[0] < max(2 * errors[1], 0.01 * np.abs(exact).max())


@pytest.mark.parametrize("form", ["numbers", "int8"])
def test_heads_over_devices(form):
    """A mesh of four copies of two devices, each of which has one key head."""
    q, k, v = _inputs(2)
    held, seen = [in_int8(x) if form == "int8" else x for x in (k, v)], _seen(2, 70, SLOTS)
    expected = kernel(q, *held, seen, "float32")
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        y = jax.jit(over_heads(partial(kernel, product_dtype="float32"), DECODING))(q, *held, seen)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert y.sharding.spec == DECODING.use(("batch", "length", "kv_heads"))


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "queries", "slots", "programs"),
    [(1, 8, 4, 4096, 32), (1, 8, 4, 1024, 16), (8, 8, 4, 4096, 4), (64, 8, 4, 4096, 1), (1, 8, 2048, 4096, 1)],
)
def test_few_texts_keep_a_gpu_busy(batch, num_kv_heads, queries, slots, programs):
    assert flash_decoding.programs_of(batch, num_kv_heads, queries, slots) == programs


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kept", "taken"),
    [
        (128, "bfloat16", "bfloat16", True),
        (64, "bfloat16", "int8", True),
        (96, "bfloat16", "bfloat16", False),
        (128, "float32", "bfloat16", False),
        (128, "bfloat16", "float32", False),
    ],
    ids=["all is well", "narrow, int8", "head_dim", "dtype", "cache"],
)
def test_what_it_takes(head_dim, dtype, kept, taken):
    assert flash_decoding.suits(head_dim, dtype, kept) is taken


def test_what_it_can_address():
    """Of an int8 cache, or of a mask, less than two GiB; a cache that devices share is smaller."""

    def can(shape, queries, shards):
        kept, mask = (jax.ShapeDtypeStruct(each, jnp.int8) for each in (shape, (shape[0], queries, shape[2])))
        return flash_decoding.can_address(kept, Seen(mask, None), shards)

    assert can((64, 8, 4096, 128), 512, 1)
    assert not can((96, 8, 32768, 128), 1, 1)
    assert can((96, 8, 32768, 128), 1, 8)
    assert not can((160, 8, 32768, 128), 512, 8)


def test_programs_for_gpu_have_it_and_others_do_not(monkeypatch):
    given = *_inputs(1), _seen(1, 70, SLOTS)

    def has_it(attention, platform):
        monkeypatch.setattr(context_parallel, "platform", lambda: platform)
        execution = Execution(product_dtype="bfloat16", attention=attention)
        traced = jax.jit(lambda *given: attention_to_cache(*given, execution, DECODING)).trace(*given)
        return "triton" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert has_it("kernel", "cuda")
    assert not has_it("kernel", "cpu")
    assert not has_it("xla", "cuda")


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_attention(self):
        y = self.variant(partial(kernel, product_dtype="bfloat16"))(*_inputs(2), _seen(2, 70, SLOTS))
        chex.assert_shape(y, (2, 2, *HEADS))
        chex.assert_type(y, jnp.float32)
