"""The TPU's kernel, step by step on this machine, against the chunked form; and which programs have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import chunked, splash
from mixtral_jax.model.backends.chunked import Keys
from mixtral_jax.model.context_parallel import attention
from mixtral_jax.sharding.rules import TRAINING

LENGTH, HEADS = 256, (1, 2, 128)  # K, G, H


def _inputs(length=LENGTH, places=None, batch=1):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, *HEADS))
    k, v = rng.standard_normal((2, batch, places or length, HEADS[0], HEADS[2]))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, rng.standard_normal(q.shape))]


def _check(window, segment_BT=None, **places):
    """Value and gradients, in float32, of both forms."""
    first = places.get("first_query", 0)
    q, k, v, cotangent = _inputs(places=LENGTH + first)
    segment_BS = None if segment_BT is None else jnp.pad(segment_BT, ((0, 0), (first, 0)), mode="edge")

    def values(form):
        y, vjp = jax.vjp(lambda q, k, v: form(q, Keys(k, v, segment_BS, **places)), q, k, v)
        return y, *vjp(cotangent)

    actual = jax.jit(
        lambda: values(lambda q, keys: splash.self_attention(q, keys, segment_BT, window, "float32", interpret=True))
    )()
    expected = values(lambda q, keys: chunked.self_attention(q, keys, segment_BT, window, 128, "float32"))
    for ours, plain in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize("window", [1, 127, 128, 129, None])
def test_equals_the_chunked_form(window):
    _check(window)


def test_segments():
    segment_BT = jnp.asarray([[1] * 100 + [2] * 30 + [3] * 100 + [0] * 26])
    _check(100, segment_BT)


@pytest.mark.parametrize("absent", [0, 60])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_halo_of_any_size(packed, absent):
    """W - 1 places before the first query are no multiple of a register's, and a first shard has none of them."""
    segment_BT = jnp.asarray([[1] * 100 + [2] * 156]) if packed else None
    _check(61, segment_BT, first_query=60, absent=jnp.asarray(absent))


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "taken"),
    [
        (256, 128, "bfloat16", True),
        (200, 128, "bfloat16", False),
        (256, 64, "bfloat16", False),
        (256, 128, "float32", False),
    ],
    ids=["all is well", "length", "head_dim", "dtype"],
)
def test_what_it_takes(length, head_dim, dtype, taken):
    assert splash.suits(length, head_dim, dtype) is taken


def test_programs_for_tpu_have_it_and_others_do_not():
    q, k, v, _ = _inputs()

    def has_it(kernel, platform):
        execution = Execution(product_dtype="bfloat16", attention=kernel)
        traced = jax.jit(lambda q, k, v: attention(q, k, v, None, 100, execution, TRAINING)).trace(q, k, v)
        return "tpu_custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert has_it("kernel", "tpu")
    assert not has_it("kernel", "cpu")
    assert not has_it("xla", "tpu")
