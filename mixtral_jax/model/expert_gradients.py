"""The derivative of experts' SwiGLUs by hand, where the backward pass computes again what lies between the products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.ragged import grouped_product, grouped_weight_gradient, transposed_product
from mixtral_jax.model.feed_forward import SwiGLU


def pull_one(
    execution: Execution, x_CD: jax.Array, dy_CD: jax.Array, gate_C1: jax.Array, weights: SwiGLU
) -> tuple[jax.Array, jax.Array, SwiGLU]:
    """From the cotangents of one expert's gated results to those of its rows, of their gates, and of its weights.

    Args:
      x_CD: the rows, in the product dtype.
      dy_CD: of the gated results.
      gate_C1: float32.
      weights: in the product dtype.

    Returns:
      Of the rows in their dtype; of gates and weights float32.
    """
    return _pull(execution, x_CD, dy_CD, gate_C1, weights, _product, _transposed, _weight_gradient)


def pull_grouped(
    execution: Execution, x_RD: jax.Array, dy_RD: jax.Array, gate_R1: jax.Array, weights: SwiGLU, sizes_E: jax.Array
) -> tuple[jax.Array, jax.Array, SwiGLU]:
    """What `pull_one` gives, of rows in the order of their experts, sizes_E of each."""

    def product(x_RD: jax.Array, w_EDF: jax.Array, dtype: str) -> jax.Array:
        return grouped_product(x_RD, w_EDF, sizes_E, dtype)

    def transposed(x_RF: jax.Array, w_EDF: jax.Array, dtype: str) -> jax.Array:
        return transposed_product(x_RF, w_EDF, sizes_E, dtype)

    def weight_gradient(x_RD: jax.Array, dy_RF: jax.Array, dtype: str) -> jax.Array:
        return grouped_weight_gradient(x_RD.astype(dtype), dy_RF.astype(dtype), sizes_E)

    return _pull(execution, x_RD, dy_RD, gate_R1, weights, product, transposed, weight_gradient)


_Product: TypeAlias = Callable[[jax.Array, jax.Array, str], jax.Array]


def _pull(
    execution: Execution,
    x_RD: jax.Array,
    dy_RD: jax.Array,
    gate_R1: jax.Array,
    weights: SwiGLU,
    product: _Product,
    transposed: _Product,
    weight_gradient: _Product,
) -> tuple[jax.Array, jax.Array, SwiGLU]:
    """`pull_one`, by products of its own.

    Args:
      product, transposed: of rows with their experts' weights, as they are and transposed, float32.
      weight_gradient: the sum over an expert's rows of the products of two arrays' rows, float32.
    """
    dtype, activation = execution.product_dtype, execution.activation_dtype
    gate_RF = product(x_RD, weights.gate, dtype).astype(activation)
    up_RF = product(x_RD, weights.up, dtype).astype(activation)
    hidden_RF, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_RF, up_RF)
    dhidden_RF = transposed(dy_RD, weights.down, dtype)
    # down is linear: the result's product with its cotangent is had without the result.
    dgate_R1 = jnp.sum(hidden_RF.astype(jnp.float32) * dhidden_RF, axis=1, keepdims=True)
    dgate_RF, dup_RF = pull((dhidden_RF * gate_R1).astype(activation))
    dx_RD = transposed(dgate_RF, weights.gate, dtype)
    dx_RD += transposed(dup_RF, weights.up, dtype)
    dweights = SwiGLU(
        gate=weight_gradient(x_RD, dgate_RF, dtype),
        up=weight_gradient(x_RD, dup_RF, dtype),
        down=weight_gradient(hidden_RF, dy_RD * gate_R1, dtype),
    )
    return dx_RD.astype(x_RD.dtype), dgate_R1, dweights


def _product(x_CD: jax.Array, w_DF: jax.Array, dtype: str) -> jax.Array:
    return einsum("CD,DF->CF", x_CD, w_DF, dtype=dtype)


def _transposed(x_CF: jax.Array, w_DF: jax.Array, dtype: str) -> jax.Array:
    return _product(x_CF, jnp.swapaxes(w_DF, 0, 1), dtype)


def _weight_gradient(x_CD: jax.Array, dy_CF: jax.Array, dtype: str) -> jax.Array:
    return einsum("CD,CF->DF", x_CD, dy_CF, dtype=dtype)
