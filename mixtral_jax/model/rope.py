"""Rotary position embedding (Su et al., 2021), half-rotation form: dimension i turns with i + H/2."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """The angles of a batch of positions, computed once for all layers."""

    cos_BTH: jax.Array
    """float32, H/2 wide."""
    sin_BTH: jax.Array
    """float32, H/2 wide."""


def rotation(position_BT: jax.Array, head_dim: int, theta: float) -> Rotation:
    """cos and sin of position * theta ** (-2i / head_dim) for i < head_dim / 2.

    Args:
      position_BT: integers.
    """
    frequency_H = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    # float32: in bfloat16 neighbouring positions beyond 256 would share an angle.
    angle_BTH = position_BT.astype(jnp.float32)[:, :, None] * frequency_H[None, None, :]
    return Rotation(jnp.cos(angle_BTH), jnp.sin(angle_BTH))


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Queries or keys turned by their positions' angles; the arithmetic is float32, the result in x's dtype."""
    cos_BTNH, sin_BTNH = rotation.cos_BTH[:, :, None, :], rotation.sin_BTH[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos_BTNH - second * sin_BTNH, second * cos_BTNH + first * sin_BTNH)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
