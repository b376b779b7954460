"""Products of a few rows with a matrix, on a CPU without units for bfloat16.

There the matrix is what costs, and XLA:CPU packs it before it multiplies more rows than one: decoding waits for that.
Here the sums of all rows run through it side by side, in one loop that reads it once, as it lies: in bfloat16 at half
the bytes, in int8 at a quarter. So it has to lie output by output, and XLA has to vectorise a sum, which it does only
where it may reorder one: in programs compiled with OPTIONS. In others the same loop takes four times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.sharding.chips import multiplies_bfloat16

OPTIONS = {"xla_cpu_enable_fast_math": True}
"""The compiler's. Infinities, NaN, divisions and functions stay as they are: XLA has a flag for each."""

MOST_ROWS = 8
"""For which `product` is the faster one."""


@cache
def are_for_this_host() -> bool:
    """Whether the default device is such a CPU."""
    return jax.default_backend() == "cpu" and not multiplies_bfloat16("cpu")


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("inputs",))
@dataclass(frozen=True)
class ByOutput:
    """A matrix that lies output by output, though its own shape has the inputs first; on the host or on a device."""

    values: Any
    """An array of jax, or while it is on the host of numpy: the outputs' dimensions, then the inputs'."""
    inputs: int
    """How many of its own dimensions, the first, are summed over."""
    scale: Any = None
    """float32, the outputs' dimensions: what whole numbers are multiplied by; None where values are weights."""

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[-self.inputs :] + self.values.shape[: -self.inputs]

    def as_it_lies(self, dims: str) -> str:
        """The letters of its own dimensions, in the order of those of `values`."""
        return dims[self.inputs :] + dims[: self.inputs]

    def restored(self) -> Any:
        """The array in its own shape; float32 where it has a scale."""
        outputs = self.ndim - self.inputs
        values = self.values.transpose(*range(outputs, self.ndim), *range(outputs))
        return values if self.scale is None else values.astype(jnp.float32) * self.scale[(None,) * self.inputs]


def by_output(weight: Any, inputs: int) -> ByOutput:
    """A matrix whose first dimensions, so many, are its inputs; if Quantized, with a scale for each output."""
    values, scale = (weight.values, weight.scale) if isinstance(weight, Quantized) else (weight, None)
    lying = values.transpose(*range(inputs, values.ndim), *range(inputs))
    return ByOutput(lying, inputs, None if scale is None else scale.reshape(values.shape[inputs:]))


def product(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """x times the transpose of w, float32 [M, N]. Sums are in float32, and a row's don't depend on the other rows."""
    # The barrier keeps what makes x from being done again for each output, and the cast of w from being done once for
    # all turns of a loop around it, which would write it and read it at twice the bytes.
    x_MK, w_NK = lax.optimization_barrier((x_MK.astype(jnp.float32), w_NK))
    w_NK = w_NK.astype(jnp.float32)
    rows, inputs = x_MK.shape
    if rows == 1 and inputs % 2 == 0:
        # Two sums again, of half a row each: XLA would take one for a product and make a slow one of it.
        halves = [slice(inputs // 2), slice(inputs // 2, inputs)]
        return jnp.sum(_side_by_side([(x_MK[0, half], w_NK[:, half]) for half in halves]), axis=0, keepdims=True)
    return _side_by_side([(x_K, w_NK) for x_K in x_MK])


def _side_by_side(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The product of each x_K with its w_NK, [pairs, N]: one reduction of them all, which XLA makes one loop of."""
    terms = [x_K[None] * w_NK for x_K, w_NK in pairs]
    zeros = [jnp.zeros((), jnp.float32)] * len(terms)

    def add(totals: list[jax.Array], terms: list[jax.Array]) -> list[jax.Array]:
        return [total + term for total, term in zip(totals, terms, strict=True)]

    return jnp.stack(lax.reduce(terms, zeros, add, (1,)))
