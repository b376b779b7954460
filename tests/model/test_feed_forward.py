"""SwiGLU against float64, dense and by experts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from oracles import mixture, tiny

from mixtral_jax.config import Execution
from mixtral_jax.model.feed_forward import FeedForward, SwiGLU, swiglu
from mixtral_jax.sharding.rules import TRAINING


def _weights(*experts):
    rng = np.random.default_rng(0)
    shapes = ((6, 10), (6, 10), (10, 6))
    return SwiGLU(*(jnp.asarray(rng.standard_normal((*experts, *shape)), jnp.float32) for shape in shapes))


def _expected(x, weights):
    return mixture.feed_forward(*(np.asarray(each, np.float64) for each in (x, *weights)))


def test_by_hand():
    """gate 2, up 3, down 5: silu(2) * 3 * 5."""
    weights = SwiGLU(*(jnp.full((1, 1), value) for value in (2.0, 3.0, 5.0)))
    np.testing.assert_allclose(swiglu(jnp.ones((1, 1, 1)), weights, Execution())[0, 0, 0], 2 / (1 + np.exp(-2)) * 15)


def test_dense():
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 6)), jnp.float32)
    np.testing.assert_allclose(swiglu(x_BTD, _weights(), Execution()), _expected(x_BTD, _weights()), atol=2e-5)


def test_each_expert_has_its_own_weights():
    x_ECD, weights = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3, 6)), jnp.float32), _weights(4)
    y_ECD = swiglu(x_ECD, weights, Execution())
    for expert in range(4):
        own = SwiGLU(*(w[expert] for w in weights))
        np.testing.assert_allclose(y_ECD[expert], _expected(x_ECD[expert], own), atol=2e-5)


def test_bfloat16_products_are_close():
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 6)), jnp.float32)
    exact, execution = _expected(x_BTD, _weights()), Execution(product_dtype="bfloat16")
    y_BTD = swiglu(x_BTD, _weights(), execution)
    assert y_BTD.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(y_BTD - exact) / np.linalg.norm(exact) < 1e-2


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(experts=((), (4,)), dtype=("float32", "bfloat16"))
    def test_swiglu(self, experts, dtype):
        x = jnp.zeros((4, 3, 6))
        y = self.variant(lambda x, w: swiglu(x, w, Execution(activation_dtype=dtype)))(x, _weights(*experts))
        chex.assert_shape(y, (4, 3, 6))
        chex.assert_type(y, dtype)

    @chex.variants(with_jit=True, without_jit=True)
    def test_module(self):
        config = tiny.config("mistral")
        layer = FeedForward(config, Execution(), TRAINING)
        x_BTD = jnp.zeros((2, 3, config.dim))
        y_BTD, variables = self.variant(layer.init_with_output)(jax.random.key(0), x_BTD)
        chex.assert_equal_shape([y_BTD, x_BTD])
        shapes = {name: leaf.value.shape for name, leaf in variables["params"].items()}
        assert shapes == {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
