"""The grouped product: rows sorted by expert, each multiplied with its own expert's weight.

XLA has it as `ragged_dot`, which on CPU and GPU multiplies every row with every expert's weight. On CPU each expert's
rows are taken a block at a time instead, in a loop that is as long as the expert has rows; on GPU kernels do it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import grouped_gpu
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.sharding.chips import computes_on_old_gpu

_BLOCK = 256
_WEIGHT_GRADIENT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> jax.Array:
    """Row by row, x times the weight of the row's expert; operands in dtype, sums and result in float32.

    Args:
      x_MD: rows in expert order.
      sizes_E: int32, rows of each expert, M together at most. What stands in rows beyond their sum means nothing.
      dtype: of the operands, and of the cotangent in the backward pass.

    Returns:
      float32 [M, F].
    """
    return _product(x_MD, w_EDF, sizes_E, dtype, transposed=False)


def transposed_product(x_MF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> jax.Array:
    """`grouped_product` with each weight transposed, float32 [M, D]; not for autodiff."""
    return _product(x_MF, w_EDF, sizes_E, dtype, transposed=True)


def _forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> tuple[jax.Array, tuple]:
    like_x = jnp.zeros((0,), x_MD.dtype)  # an array, since a dtype can't be saved
    x_MD = x_MD.astype(dtype)
    return grouped_product(x_MD, w_EDF, sizes_E, dtype), (x_MD, w_EDF, sizes_E, like_x)


def _backward(dtype: str, saved: tuple, gradient_MF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MD, w_EDF, sizes_E, like_x = saved
    gradient_MF = gradient_MF.astype(dtype)
    gradient_MD = transposed_product(gradient_MF, w_EDF, sizes_E, dtype)
    gradient_EDF = grouped_weight_gradient(x_MD, gradient_MF, sizes_E)
    return gradient_MD.astype(like_x.dtype), gradient_EDF.astype(w_EDF.dtype), None


grouped_product.defvjp(_forward, _backward)


def grouped_weight_gradient(x_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """For each expert the sum over its rows of x times the gradient: float32 [E, D, F].

    Args:
      x_MD, gradient_MF: rows in expert order, in the dtype of the product.
      sizes_E: int32, rows of each expert.
    """
    forms: dict[str, Any] = {"cpu": _weight_gradient_in_blocks, "default": _ragged_weight_gradient}
    if grouped_gpu.suits(x_MD.dtype, x_MD.shape[1], gradient_MF.shape[1]) and not computes_on_old_gpu():
        forms["cuda"] = grouped_gpu.weight_gradient
    gradient_EDF: jax.Array = jax.lax.platform_dependent(x_MD, gradient_MF, sizes_E, **forms)
    return gradient_EDF


def _product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str, transposed: bool) -> jax.Array:
    def on_gpu(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return grouped_gpu.product(x_MD.astype(dtype), w_EDF.astype(dtype), sizes_E, transposed)

    def by(form: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, w, sizes: form(x, jnp.swapaxes(w, 1, 2) if transposed else w, sizes, dtype)

    forms = {"cpu": by(_product_in_blocks), "default": by(_ragged_dot)}
    if grouped_gpu.suits(dtype, *w_EDF.shape[1:]) and not computes_on_old_gpu():
        forms["cuda"] = on_gpu
    y_MF: jax.Array = jax.lax.platform_dependent(x_MD, w_EDF, sizes_E, **forms)
    return y_MF


def _precision(dtype: str | jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _ragged_dot(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> jax.Array:
    operands = x_MD.astype(dtype), w_EDF.astype(dtype)
    return jax.lax.ragged_dot(*operands, sizes_E, precision=_precision(dtype), preferred_element_type=jnp.float32)


def _ragged_weight_gradient(x_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(
        x_MD,
        gradient_MF,
        _from_memory(sizes_E),
        _WEIGHT_GRADIENT,
        precision=_precision(x_MD.dtype),
        preferred_element_type=jnp.float32,
    )


def _from_memory(sizes_E: jax.Array) -> jax.Array:
    """The sizes; a single one as a part of two, since libtpu fails for v6e on one that a loop computed as a scalar."""
    if sizes_E.shape[0] > 1:
        return sizes_E
    return jax.lax.optimization_barrier(jnp.concatenate([sizes_E, jnp.zeros_like(sizes_E)]))[:1]


def _product_in_blocks(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, dtype: str) -> jax.Array:
    """An expert's last block runs on into rows of the next one, which then writes them again."""
    num_rows, block = x_MD.shape[0], min(_BLOCK, x_MD.shape[0])
    x_MD = jnp.pad(x_MD.astype(dtype), [(0, block), (0, 0)])
    y_MF = jnp.zeros((num_rows + block, w_EDF.shape[2]), jnp.float32)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    for expert in range(sizes_E.shape[0]):
        own_DF = w_EDF[expert].astype(dtype)

        def multiply(row: jax.Array, y_MF: jax.Array, w_DF: jax.Array = own_DF) -> jax.Array:
            y_block = einsum("MD,DF->MF", jax.lax.dynamic_slice_in_dim(x_MD, row, block), w_DF, dtype=dtype)
            return jax.lax.dynamic_update_slice_in_dim(y_MF, y_block, row, axis=0)

        y_MF = _for_blocks(starts_E[expert], sizes_E[expert], block, multiply, y_MF)
    return y_MF[:num_rows]


def _weight_gradient_in_blocks(x_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    block = min(_BLOCK, x_MD.shape[0])
    x_MD = jnp.pad(x_MD, [(0, block), (0, 0)])
    gradient_MF = jnp.pad(gradient_MF, [(0, block), (0, 0)])
    ends_E = jnp.cumsum(sizes_E)
    gradients = []
    for expert in range(sizes_E.shape[0]):

        def add(row: jax.Array, sum_DF: jax.Array, end: jax.Array = ends_E[expert]) -> jax.Array:
            own_R1 = (row + jnp.arange(block) < end)[:, None]
            x_RD = jnp.where(own_R1, jax.lax.dynamic_slice_in_dim(x_MD, row, block), 0)
            gradient_RF = jax.lax.dynamic_slice_in_dim(gradient_MF, row, block)
            return sum_DF + einsum("RD,RF->DF", x_RD, gradient_RF, dtype=x_MD.dtype)

        zeros_DF = jnp.zeros((x_MD.shape[1], gradient_MF.shape[1]), jnp.float32)
        start = ends_E[expert] - sizes_E[expert]
        gradients.append(_for_blocks(start, sizes_E[expert], block, add, zeros_DF))
    return jnp.stack(gradients)


def _for_blocks(
    start: jax.Array,
    size: jax.Array,
    block: int,
    step: Callable[[jax.Array, jax.Array], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    """step(first row, carry) for each block of an expert's rows; none for an expert without."""
    return jax.lax.fori_loop(0, -(-size // block), lambda i, carry: step(start + i * block, carry), carry)


def grouped_swiglu(x_MD: jax.Array, weights: SwiGLU, sizes_E: jax.Array, execution: Execution) -> jax.Array:
    """The feed-forward of each row by its own expert, in the activation dtype.

    Args:
      x_MD: rows in expert order, as `grouped_product` takes them.
      weights: of all experts.
      sizes_E: int32, rows of each expert.
    """
    product = partial(grouped_product, sizes_E=sizes_E, dtype=execution.product_dtype)
    gate_MF = product(x_MD, weights.gate).astype(execution.activation_dtype)
    up_MF = product(x_MD, weights.up).astype(execution.activation_dtype)
    return product(jax.nn.silu(gate_MF) * up_MF, weights.down).astype(execution.activation_dtype)
