"""RMSNorm in numbers and in bfloat16."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mixtral_jax.model.norm import RMSNorm, rms_normalize


def test_by_hand():
    """The mean square of (3, 4) is 12.5; plus an epsilon of 12.5 it is 25."""
    np.testing.assert_allclose(rms_normalize(jnp.array([[3.0, 4.0]]), 0.0), [[3 / 12.5**0.5, 4 / 12.5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(rms_normalize(jnp.array([[3.0, 4.0]]), 12.5), [[0.6, 0.8]], rtol=1e-6)


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(rms_normalize(jnp.zeros((1, 4)), 1e-5), np.zeros((1, 4)))


def test_mean_square_is_float32():
    """Of 1000 ones in bfloat16, which counts to 256."""
    assert rms_normalize(jnp.ones((1, 1000), jnp.bfloat16), 0.0)[0, 0] == 1


def test_cast_comes_before_the_scale():
    x, scale = jnp.array([[1.0, 3.0]], jnp.bfloat16), jnp.array([1.01, 1.7])
    expected = rms_normalize(x.astype(jnp.float32), 1e-5).astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)[None]
    np.testing.assert_array_equal(RMSNorm(1e-5).apply({"params": {"scale": scale}}, x), expected)


def test_starts_at_one():
    params = RMSNorm(1e-5).init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    np.testing.assert_array_equal(nn.unbox(params)["scale"], np.ones(3))


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_norm(self):
        x = jnp.ones((2, 3, 4), jnp.bfloat16)
        y = self.variant(lambda x: rms_normalize(x, 1e-5))(x)
        z = self.variant(lambda x: RMSNorm(1e-5).apply({"params": {"scale": jnp.ones(4)}}, x))(x)
        chex.assert_equal_shape([x, y, z])
        chex.assert_type([y, z], jnp.bfloat16)
