"""Matrices in eight or four bits: whole numbers and the scales that make weights of them.

int8 has a scale for each output channel, the same for all that is summed over, so a product takes the whole numbers
and scales its result. int4 has a scale for each group of a channel's inputs, and is made weights of before the product.
Both have no offset: weight = value * scale, with values from -127 to 127, or from -8 to 7. fp8 is as int8, but its
values are floats of eight bits (e4m3fn, up to 448), which lie closer near zero and farther apart else.

A cache in int8 has a scale for each token and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
@dataclass(frozen=True)
class Quantized:
    """A matrix, or any weight; on the host or on a device."""

    values: Any
    """An array of jax, or while it is on the host of numpy: int8, int4 or float8_e4m3fn, in the weight's own shape."""
    scale: Any
    """float32, likewise; a dimension that is summed over is 1, or the number of groups along it."""

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def scales_only(self, dims: str, others: str) -> bool:
        """Whether the scale differs only along those of its dimensions `dims` that are also among the others."""
        return all(
            size == 1 or (letter in others and size == whole)
            for letter, size, whole in zip(dims, self.scale.shape, self.shape, strict=True)
        )

    def dequantized(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The weight, multiplied out in float32."""
        scale = self.scale
        for axis, (size, groups) in enumerate(zip(self.shape, scale.shape, strict=True)):
            if groups not in (1, size):
                scale = jnp.repeat(scale, size // groups, axis=axis)
        return (self.values.astype(jnp.float32) * scale).astype(dtype)


def in_int8(x: jax.Array) -> Quantized:
    """Any array in int8, a scale for each run along its last dimension; the largest number of a run becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    # A run of zeros has the scale 0, and any value does.
    return Quantized(jnp.rint(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)
