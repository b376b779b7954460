"""Rotation by hand, by complex numbers, and what it must preserve."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model import rope


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_angles_by_hand():
    """theta = 100, H = 4: frequencies 1 and 100 ** (-2 / 4) = 0.1."""
    cos_BTH, sin_BTH = rope.rotation(jnp.array([[0, 3]]), 4, 100.0)
    np.testing.assert_allclose(cos_BTH, [[[1, 1], [np.cos(3), np.cos(0.3)]]], rtol=1e-6)
    np.testing.assert_allclose(sin_BTH, [[[0, 0], [np.sin(3), np.sin(0.3)]]], rtol=1e-6)


def test_dimension_i_turns_with_i_plus_half():
    """A quarter turn takes (1, 0) to (0, 1): from dimension 0 to dimension 2 of four."""
    quarter = rope.Rotation(jnp.array([[[0.0, 1.0]]]), jnp.array([[[1.0, 0.0]]]))
    x_BTNH = jnp.array([1.0, 5.0, 0.0, 7.0]).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(rope.rotate(x_BTNH, quarter).ravel(), [0.0, 5.0, 1.0, 7.0])


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_is_multiplication_by_complex_numbers(theta):
    head_dim, position_BT = 8, np.array([[0, 1, 7, 31000]])
    x_BTNH = _normal(1, 4, 3, head_dim)
    turned = rope.rotate(x_BTNH, rope.rotation(jnp.asarray(position_BT), head_dim, theta))
    frequency_H = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    z_BTNH = np.asarray(x_BTNH[..., :4], np.float64) + 1j * np.asarray(x_BTNH[..., 4:])
    z_BTNH = z_BTNH * np.exp(1j * position_BT[..., None, None] * frequency_H)
    # An angle of 31000 is exact to about 1e-3 in float32, the others far better.
    expected = np.concatenate([z_BTNH.real, z_BTNH.imag], axis=-1)
    np.testing.assert_allclose(turned[:, :3], expected[:, :3], atol=2e-6)
    np.testing.assert_allclose(turned, expected, atol=1e-2)


def test_scores_depend_on_distance_only():
    q, k = _normal(1, 6, 1, 16), _normal(1, 6, 1, 16, seed=1)

    def scores(shift):
        turn = rope.rotation(jnp.arange(6)[None] + shift, 16, 1e4)
        return jnp.einsum("btnh,bsnh->bts", rope.rotate(q, turn), rope.rotate(k, turn))

    np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)


def test_norms_are_kept():
    x = _normal(2, 5, 3, 8)
    turned = rope.rotate(x, rope.rotation(jnp.arange(10).reshape(2, 5), 8, 1e4))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])


def test_bfloat16_is_rotated_in_float32():
    """At position 1000 bfloat16 angles would be off by a radian; ours are off by the rounding of x and the result."""
    x = _normal(1, 1, 1, 8).astype(jnp.bfloat16)
    turn = rope.rotation(jnp.array([[1000]]), 8, 1e4)
    expected = rope.rotate(x.astype(jnp.float32), turn)
    assert rope.rotate(x, turn).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rope.rotate(x, turn), expected.astype(jnp.bfloat16))


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_rotation_and_rotate(self):
        turn = self.variant(lambda position: rope.rotation(position, 8, 1e4))(jnp.zeros((2, 5), jnp.int32))
        chex.assert_shape(list(turn), (2, 5, 4))
        chex.assert_type(list(turn), jnp.float32)
        x_BTNH = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.bfloat16)
        y_BTNH = self.variant(rope.rotate)(jnp.zeros(x_BTNH.shape, x_BTNH.dtype), turn)
        chex.assert_equal_shape([y_BTNH, x_BTNH])
        chex.assert_type(y_BTNH, jnp.bfloat16)
