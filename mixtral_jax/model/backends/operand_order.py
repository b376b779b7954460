"""XLA:CPU's own product of rows with a matrix that lies by output.

It packs the right operand before it multiplies. With the matrix there that takes longer than to multiply few rows; with
the rows there, the product's transpose is what comes out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from mixtral_jax.model.backends.contraction import contract
from mixtral_jax.sharding import chips

_MOST = 64
"""Rows. Of prompts of 512 tokens what comes after loses more, by reading the transpose, than the product wins."""
_MANY_INPUTS, _VERY_MANY_INPUTS = 1024, 1536
"""In bfloat16. Of fewer than many that is so with few rows too, of fewer than very many with some numbers of rows."""


def product(x_MK: jax.Array, w_NK: jax.Array, made: bool = False) -> jax.Array:
    """x times the transpose of w, of one dtype: float32 [M, N].

    Args:
      made: whether w is made of fewer bits in the same program.
    """
    rows, inputs = x_MK.shape
    if not has_rows_right(rows, inputs, x_MK.dtype, made):
        return contract("mk", "nk", "mn", x_MK, w_NK)
    # Without the barrier XLA makes the other product of it again.
    return lax.optimization_barrier(contract("nk", "mk", "nm", w_NK, x_MK)).T


def has_rows_right(rows: int, inputs: int, dtype: DTypeLike, made: bool) -> bool:
    """Whether the rows are on the right: by measurement, see docs/few-rows.md."""
    if not 0 < rows <= _MOST:
        return False
    if jnp.dtype(dtype) != jnp.bfloat16:
        # To write the product's transpose costs as much as is won where the matrix has few inputs.
        return inputs >= 8 * rows
    if chips.has_amx():
        return not made  # which was not measured there
    # XLA has kernels for 16 and 32 rows. Numbers between are slow with the matrix on the right too, if it is large.
    fitting = rows <= 16 or rows % 32 == 0 or (rows <= 48 and inputs >= _VERY_MANY_INPUTS)
    return chips.multiplies_bfloat16("cpu") and inputs >= _MANY_INPUTS and fitting
