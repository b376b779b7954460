"""A contraction of two arrays of one dtype, summed in float32, in the form that each platform multiplies fastest.

Dimensions are letters. One that is in both operands and not in the result is summed over.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def contract(x_dims: str, w_dims: str, y_dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One dot_general: float32 result with dimensions `y_dims`."""
    sizes = dict(zip(x_dims + w_dims, x.shape + w.shape, strict=True))
    y_size = math.prod(sizes[d] for d in y_dims)
    x_dims, x = _order_free(x_dims, w_dims, y_dims, x, y_size)
    w_dims, w = _order_free(w_dims, x_dims, y_dims, w, y_size)
    batch = [d for d in y_dims if d in x_dims and d in w_dims]
    # XLA:CPU copies an operand whose summed dimensions are not in this order: let it be the smaller one.
    summed = [d for d in (x_dims if x.size > w.size else w_dims) if d in x_dims and d in w_dims and d not in y_dims]
    y = lax.dot_general(
        x,
        w,
        ((_axes(summed, x_dims), _axes(summed, w_dims)), (_axes(batch, x_dims), _axes(batch, w_dims))),
        # Otherwise TPU and GPU would round float32 operands. For bfloat16 it changes nothing.
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    dot_dims = "".join(batch + [d for d in x_dims if d not in w_dims] + [d for d in w_dims if d not in x_dims])
    return _transpose(y, dot_dims, y_dims)


def _order_free(dims: str, other: str, y_dims: str, operand: jax.Array, y_size: int) -> tuple[str, jax.Array]:
    """Transposes an operand smaller than the result so that its free dimensions come as in the result.

    For attention scores, BTKGH,BSKH->BKGTS, XLA:CPU would else transpose the scores: 2.5 to 8 times slower.
    """
    if operand.size > y_size:
        return dims, operand
    free = [d for d in dims if d not in other]
    in_order = iter(sorted(free, key=y_dims.index))
    to_dims = "".join(next(in_order) if d in free else d for d in dims)
    return to_dims, _transpose(operand, dims, to_dims)


def contract_forward(x_dims: str, w_dims: str, y_dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`contract` for the forward pass. Decoding one sequence, its x is a single row."""

    def alone(x: jax.Array, w: jax.Array) -> jax.Array:
        return contract(x_dims, w_dims, y_dims, x, w)

    def beside_zeros(x: jax.Array, w: jax.Array, rows: int) -> jax.Array:
        x_rows = lax.pad(x[None], jnp.zeros((), x.dtype), [(0, rows, 0), *[(0, 0, 0)] * x.ndim])
        y_rows = contract("_" + x_dims, w_dims, "_" + y_dims, x_rows, w)
        return lax.index_in_dim(y_rows, 0, keepdims=False)

    if math.prod(size for d, size in zip(x_dims, x.shape, strict=True) if d not in w_dims) > 1:
        return alone(x, w)
    # Of a vector and a matrix of up to ten million weights XLA:GPU writes all products to memory, in float32, and then
    # sums them: five times the traffic of a matrix in bfloat16.
    forms: dict[str, Any] = {"cuda": partial(beside_zeros, rows=1), "default": alone}
    if x.dtype == jnp.bfloat16:
        # XLA:CPU runs such a product in slow loops: 2.5 to 20 times slower than with rows of zeros beside the one, with
        # which it is about as fast as in float32.
        forms["cpu"] = partial(beside_zeros, rows=3)
    y: jax.Array = lax.platform_dependent(x, w, **forms)
    return y


def contract_gradient(x_dims: str, w_dims: str, y_dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`contract` for the backward pass, whose products are often summed over leading dimensions (dw over tokens)."""

    def elsewhere(x: jax.Array, w: jax.Array) -> jax.Array:
        return contract(x_dims, w_dims, y_dims, x, w)

    def on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
        return _contract_leading_on_cpu(x_dims, w_dims, y_dims, x, w)

    if x_dims[-1] not in y_dims or w_dims[-1] not in y_dims:
        return elsewhere(x, w)
    # By the platform compiled for, not this host's: TPU programs are compiled ahead of time on CPU hosts.
    y: jax.Array = lax.platform_dependent(x, w, cpu=on_cpu, default=elsewhere)
    return y


def _contract_leading_on_cpu(x_dims: str, w_dims: str, y_dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`contract` of operands that both have free dimensions last.

    XLA:CPU multiplies bfloat16 fast only if the left operand is summed over its last dimension, so one must be copied.
    """
    sizes = dict(zip(x_dims + w_dims, x.shape + w.shape, strict=True))
    if w.size + 2 * math.prod(sizes[d] for d in y_dims) < x.size:
        # x is much the larger: copy w and the float32 result instead.
        (x_dims, x), (w_dims, w) = (w_dims, w), (x_dims, x)
    summed = [d for d in x_dims if d in w_dims and d not in y_dims]
    if len(summed) == 1 and x.dtype == jnp.bfloat16:
        # XLA copies a left operand that is summed over two dimensions. With one it folds the transpose into the
        # product, which then runs in float32, 3 to 4 times slower: so pass the one as two. (A layout constraint does
        # the same, but makes GSPMD gather both operands.)
        x_dims, x = _split_in_two(x_dims, summed[0], x)
        w_dims, w = _split_in_two(w_dims, summed[0], w)
    dot_dims = "".join(
        [d for d in y_dims if d in x_dims and d in w_dims]
        + [d for d in y_dims if d not in w_dims]
        + [d for d in y_dims if d not in x_dims]
    )
    # Without the barrier XLA:CPU folds a transpose of the result into the product, and then has no code for its form
    # ("Unsupported element type for DotThunk").
    y = lax.optimization_barrier(contract(x_dims, w_dims, dot_dims, x, w))
    return _transpose(y, dot_dims, y_dims)


def _split_in_two(dims: str, dim: str, operand: jax.Array) -> tuple[str, jax.Array]:
    """A dimension of even size n as [n / 2, 2], the 2 named "_". The sharding of n stays with the first part."""
    axis = dims.index(dim)
    size = operand.shape[axis]
    if size % 2:
        return dims, operand
    shape = (*operand.shape[:axis], size // 2, 2, *operand.shape[axis + 1 :])
    return dims.replace(dim, dim + "_"), lax.reshape(operand, shape)


def _transpose(operand: jax.Array, dims: str, to_dims: str) -> jax.Array:
    return operand if dims == to_dims else lax.transpose(operand, _axes(to_dims, dims))


def _axes(letters: Sequence[str], dims: str) -> tuple[int, ...]:
    return tuple(dims.index(letter) for letter in letters)
