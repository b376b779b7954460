"""The grouped product for XLA: rows sorted by expert, each multiplied with its own expert's weight."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.feed_forward import SwiGLU

_WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> jax.Array:
    """Row by row, x times the weight of the row's expert; operands in dtype, sums and result in float32.

    Args:
      x_MD: rows in expert order.
      sizes_E: int32, rows of each expert; rows beyond their sum give zeros.
      dtype: of the operands, and of the cotangent in the backward pass.

    Returns:
      float32 [M, F].
    """
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    y_MF = jax.lax.ragged_dot(
        x_MD.astype(dtype), w_EDF.astype(dtype), sizes_E, precision=precision, preferred_element_type=jnp.float32
    )
    return y_MF


def _forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> tuple[jax.Array, tuple]:
    return grouped_product(x_MD, w_EDF, sizes_E, dtype), (x_MD, w_EDF, sizes_E)


def _backward(dtype: str, saved: tuple, gradient_MF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MD, w_EDF, sizes_E = saved
    gradient_MD = grouped_product(gradient_MF, jnp.swapaxes(w_EDF, 1, 2), sizes_E, dtype)
    gradient_EDF = jax.lax.ragged_dot_general(
        x_MD.astype(dtype),
        gradient_MF.astype(dtype),
        sizes_E,
        _WEIGHT_GRADIENT,
        precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )
    return gradient_MD.astype(x_MD.dtype), gradient_EDF.astype(w_EDF.dtype), None


grouped_product.defvjp(_forward, _backward)


def grouped_swiglu(x_MD: jax.Array, weights: SwiGLU, sizes_E: jax.Array, execution: Execution) -> jax.Array:
    """The feed-forward of each row by its own expert, in the activation dtype; zeros past the last expert's rows."""
    product = partial(grouped_product, sizes_E=sizes_E, dtype=execution.product_dtype)
    gate_MF = product(x_MD, weights.gate).astype(execution.activation_dtype)
    up_MF = product(x_MD, weights.up).astype(execution.activation_dtype)
    return product(jax.nn.silu(gate_MF) * up_MF, weights.down).astype(execution.activation_dtype)
