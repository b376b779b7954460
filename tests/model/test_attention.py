"""The attention layer against float64: projections, rotation, grouping of heads, the product back, and the cache."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from oracles import attention as oracle
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.model import cache as caches
from mixtral_jax.model.attention import Attention, Context
from mixtral_jax.model.rope import rotation
from mixtral_jax.sharding.rules import TRAINING

CONFIG = tiny.config("mistral")
BATCH, LENGTH = 2, 14


def _params():
    return jax.tree.map(lambda x: jnp.asarray(x[0]), tiny.params(CONFIG)["layers"]["attention"])


def _x():
    return jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH, CONFIG.dim)), jnp.float32)


def _context(position_BT, segment_BT=None, view=None):
    turn = rotation(position_BT, CONFIG.head_dim, CONFIG.rope_theta)
    return Context(turn, jnp.ones(position_BT.shape, bool), segment_BT, view)


def _positions():
    return jnp.arange(LENGTH)[None].repeat(BATCH, 0)


def _layer(config=CONFIG, **execution):
    return Attention(config, Execution(**execution), TRAINING)


def _rotated(x_BTNH):
    """By complex numbers in float64."""
    half = CONFIG.head_dim // 2
    frequency_H = CONFIG.rope_theta ** (-np.arange(half) / half)
    turn_THN = np.exp(1j * np.arange(LENGTH)[:, None] * frequency_H)[None, :, None]
    z_BTNH = (x_BTNH[..., :half] + 1j * x_BTNH[..., half:]) * turn_THN
    return np.concatenate([z_BTNH.real, z_BTNH.imag], -1)


def _exact(segment_BT, window):
    """Query head n looks at the key head n // G."""
    params, x = jax.tree.map(np.float64, _params()), np.float64(_x())
    q, k, v = (np.einsum("btd,dnh->btnh", x, params[name]) for name in ("query", "key", "value"))
    q, k, seen = _rotated(q), _rotated(k), oracle.mask(segment_BT, window)
    heads = []
    for n in range(CONFIG.num_heads):
        own = slice(n // CONFIG.queries_per_kv_head, n // CONFIG.queries_per_kv_head + 1)
        heads.append(oracle.attention(q[:, :, None, n : n + 1], k[:, :, own], v[:, :, own], seen)[:, :, 0, 0])
    return np.einsum("nbth,nhd->btd", np.array(heads), params["output"])


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("chunk", [4, 128])
def test_equals_float64(window, chunk):
    layer = _layer(tiny.config("mistral", sliding_window=window), attention_chunk=chunk)
    y, cache = jax.jit(layer.apply)({"params": _params()}, _x(), _context(_positions()))
    np.testing.assert_allclose(y, _exact(np.ones((BATCH, LENGTH)), window), atol=1e-5)
    assert cache is None


def test_segments_equal_float64():
    """Rotation by places in the row, since only distances count."""
    segment = np.array([[1] * 6 + [2] * 8, [1] * 3 + [2] * 9 + [0] * 2], np.int32)
    y, _ = _layer().apply({"params": _params()}, _x(), _context(_positions(), jnp.asarray(segment)))
    np.testing.assert_allclose(y, _exact(segment, CONFIG.sliding_window), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5])
def test_with_a_cache(chunk):
    config = tiny.config("mistral", num_layers=1)
    cache, outputs = caches.empty_cache(config, BATCH, CONFIG.sliding_window, "float32"), []

    @jax.jit
    def advance(cache, x):
        view, cache, position = caches.view(cache, jnp.ones(x.shape[:2], bool), CONFIG.sliding_window)
        y, layer = _layer(config).apply({"params": _params()}, x, _context(position, view=view), cache.layers[0])
        return y, cache._replace(layers=(layer,))

    for start in range(0, LENGTH, chunk):
        y, cache = advance(cache, _x()[:, start : start + chunk])
        outputs.append(y)
    exact = _exact(np.ones((BATCH, LENGTH)), CONFIG.sliding_window)
    np.testing.assert_allclose(np.concatenate(outputs, 1), exact, atol=1e-5)


def test_bfloat16_is_close():
    layer = _layer(activation_dtype="bfloat16", product_dtype="bfloat16")
    y, _ = layer.apply({"params": _params()}, _x().astype(jnp.bfloat16), _context(_positions()))
    exact = _exact(np.ones((BATCH, LENGTH)), CONFIG.sliding_window)
    assert 1e-4 < np.linalg.norm(np.float64(y) - exact) / np.linalg.norm(exact) < 2e-2


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(("float32", 1), ("bfloat16", 4))
    def test_attention(self, dtype, kv_heads):
        config = tiny.config("mistral", num_kv_heads=kv_heads)
        params = jax.tree.map(lambda x: x[0], tiny.params(config)["layers"]["attention"])
        layer = _layer(config, activation_dtype=dtype)
        x, context = _x().astype(dtype), _context(_positions())
        y, _ = self.variant(layer.apply)({"params": params}, x, context)
        chex.assert_equal_shape([x, y])
        chex.assert_type(y, dtype)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x, context)
        shapes = {name: leaf.value.shape for name, leaf in variables["params"].items()}
        assert shapes == {
            "query": (16, 4, 8),
            "key": (16, kv_heads, 8),
            "value": (16, kv_heads, 8),
            "output": (4, 8, 16),
        }
