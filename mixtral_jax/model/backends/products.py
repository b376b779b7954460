"""The one product of the model: operands in the product dtype, sums in float32.

Training keeps float32 master weights and multiplies in bfloat16. Left to itself, autodiff multiplies the float32
cotangent of such a product in float32, on the slow units of every platform. The custom VJP here casts the cotangent
to the product dtype first, so that all three products of a training step (result, dx, dw) take the same operands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from mixtral_jax.model.backends import few_rows, half_bytes, operand_order
from mixtral_jax.model.backends.contraction import contract, contract_forward, contract_gradient
from mixtral_jax.model.backends.few_rows import ByOutput
from mixtral_jax.model.backends.half_bytes import HalfBytes
from mixtral_jax.model.backends.quantized import Quantized

PRODUCT = "product"
"""The name of a product's result, for policies of what a backward pass keeps; not of products that have a dimension in
all three terms, such as scores. By their kind alone, results would be kept before they are rounded, in float32."""


@dataclass(frozen=True)
class _Plan:
    """What is static in a product. `x` and `w` are the letters of the operands, `y` those of the result."""

    x: str
    w: str
    y: str
    dtype: Any
    result_dtype: Any
    x_dtype: Any
    w_dtype: Any


def einsum(
    spec: str,
    x: jax.Array,
    w: jax.Array | Quantized | ByOutput | HalfBytes,
    *,
    dtype: DTypeLike,
    result_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Contracts `x` with `w`, both cast to `dtype`, summing in float32.

    Args:
      spec: Two operands and a result, one letter a dimension, such as "BTD,DNH->BTNH". No letter twice in an operand,
        no ellipsis, and every letter of an operand is in the other operand or in the result.
      x: The left operand, usually activations. An x used by several products is best cast to `dtype` once, by the
        caller: each product saves its cast x for the backward pass.
      w: The right operand, usually weights; those that are quantised, or lie by output, have no gradient.
      dtype: What both operands, and in the backward pass the cotangent, are cast to: bfloat16 or float32. float32
        products are exact to float32 on every platform.
      result_dtype: The dtype of the result, float32 unless given.

    Returns:
      The result, with gradients in the dtypes of `x` and `w`.

    Raises:
      ValueError: `spec` is malformed or does not fit the operands.
    """
    x_dims, w_dims, y_dims = _parse(spec, x, w)
    result_dtype = jnp.float32 if result_dtype is None else result_dtype
    if isinstance(w, Quantized):
        return _quantized_product(x_dims, w_dims, y_dims, x, w, dtype).astype(result_dtype)
    if isinstance(w, ByOutput | HalfBytes):
        (y,) = einsums(spec, x, [w], dtype=dtype, result_dtype=result_dtype)
        return y
    plan = _Plan(x_dims, w_dims, y_dims, jnp.dtype(dtype), jnp.dtype(result_dtype), x.dtype, w.dtype)
    # In shard_map, a weight that is equal on all devices meets tokens that are not. Its gradient is summed over the
    # devices where it becomes varying, which is here: inside a custom VJP nothing would do it.
    varying = _varying_axes(x) | _varying_axes(w)
    return _product(plan, _as_varying(x, varying), _as_varying(w, varying))


def einsums(
    spec: str,
    x: jax.Array,
    weights: Sequence[jax.Array | Quantized | ByOutput | HalfBytes],
    *,
    dtype: DTypeLike,
    result_dtype: DTypeLike | None = None,
) -> list[jax.Array]:
    """`einsum` of x with each of several weights; those that lie by output, alike, may share a loop over few rows."""
    result_dtype = jnp.float32 if result_dtype is None else result_dtype
    forms: dict[type, Callable[..., list[jax.Array]]]
    forms = {ByOutput: _products_by_output, HalfBytes: _products_of_half_bytes}
    together = forms.get(type(weights[0]))
    if together and len({_form_of(w) for w in weights}) == 1:
        found = together(*_parse(spec, x, weights[0]), x.astype(dtype), weights)
        return [y.astype(result_dtype) for y in found]
    return [einsum(spec, x, w, dtype=dtype, result_dtype=result_dtype) for w in weights]


def _form_of(weight: Any) -> Any:
    """What is the same of weights that are alike."""
    leaves, structure = jax.tree.flatten(weight)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def weight_gradient(spec: str, x: jax.Array, dy: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    """`einsum`, float32 and without a gradient, of operands summed over leading dimensions, as a weight's gradient is
    over tokens."""
    return contract_gradient(*_parse(spec, x, dy), x.astype(dtype), dy.astype(dtype))


def _quantized_product(x_dims: str, w_dims: str, y_dims: str, x: jax.Array, w: Quantized, dtype: DTypeLike) -> Any:
    """The float32 product with a quantised right operand, multiplied in `dtype`, which has room for any of its values.

    The scale goes where it makes no copy of w: onto the result, where it differs only along what is not summed over
    (weights by channel, keys); else onto x, where it differs only along what x has (values, a scale a token).
    """
    if w.scales_only(w_dims, y_dims):
        y = contract_forward(x_dims, w_dims, y_dims, x.astype(dtype), w.values.astype(dtype))
        return y * _along(y_dims, w_dims, w.scale)
    if w.scales_only(w_dims, x_dims):
        x = x.astype(jnp.float32) * _along(x_dims, w_dims, w.scale)
        return contract_forward(x_dims, w_dims, y_dims, x.astype(dtype), w.values.astype(dtype))
    return contract_forward(x_dims, w_dims, y_dims, x.astype(dtype), w.dequantized(dtype))


def _products_by_output(
    x_dims: str, w_dims: str, y_dims: str, x: jax.Array, matrices: Sequence[ByOutput]
) -> list[jax.Array]:
    """The float32 products with matrices of one shape and dtype, which may be held in fewer bits than x is."""
    first = matrices[0]
    w_dims = first.as_it_lies(w_dims)
    inputs, outputs = w_dims[-first.inputs :], w_dims[: -first.inputs]
    if x_dims.endswith(inputs) and y_dims == x_dims[: -first.inputs] + outputs:
        x_MK = x.reshape(math.prod(x.shape[: -first.inputs]), math.prod(x.shape[-first.inputs :]))
        found = _by_output(x_MK, [w.values.reshape(-1, x_MK.shape[1]) for w in matrices])
        results = [y_MN.reshape(*x.shape[: -first.inputs], *first.shape[first.inputs :]) for y_MN in found]
    else:
        results = [contract(x_dims, w_dims, y_dims, x, w.values.astype(x.dtype)) for w in matrices]
    return [
        y if w.scale is None else y * _along(y_dims, outputs, w.scale) for y, w in zip(results, matrices, strict=True)
    ]


def _by_output(x_MK: jax.Array, matrices: list[jax.Array]) -> list[jax.Array]:
    """x times the transpose of each w_NK."""
    (rows, inputs), held = x_MK.shape, matrices[0].dtype
    if held.itemsize <= x_MK.dtype.itemsize and few_rows.are_few(rows, inputs, held, x_MK.dtype):
        return few_rows.products(x_MK, matrices)
    # Of two dimensions each, XLA:CPU takes the operands as they lie; of more it writes a matrix's transpose first.
    made = held != x_MK.dtype
    return [operand_order.product(x_MK, _made_beside(x_MK, w_NK), made) for w_NK in matrices]


def _products_of_half_bytes(
    x_dims: str, w_dims: str, y_dims: str, x: jax.Array, matrices: Sequence[HalfBytes]
) -> list[jax.Array]:
    """The float32 products with matrices of one shape in int4."""
    first = matrices[0]
    inputs, outputs = w_dims[: first.inputs], w_dims[first.inputs :]
    if not (x_dims.endswith(inputs) and y_dims == x_dims[: -first.inputs] + outputs):
        return [contract(x_dims, w_dims, y_dims, x, w.restored().astype(x.dtype)) for w in matrices]
    x_MK = x.reshape(math.prod(x.shape[: -first.inputs]), math.prod(x.shape[-first.inputs :]))
    if half_bytes.are_few(x_MK.shape[0], x_MK.dtype):
        found = half_bytes.products(x_MK, matrices)
    else:
        found = [_by_halves(x_MK, w) for w in matrices]
    return [y_MN.reshape(*x.shape[: -first.inputs], *first.shape[first.inputs :]) for y_MN in found]


def _by_halves(x_MK: jax.Array, w: HalfBytes) -> jax.Array:
    """Each half made an array of x's dtype: to put them together first is what takes the time."""
    w, one = _not_before(x_MK, w)
    w = replace(w, scale_NG=w.scale_NG * one)
    x_MJ = jnp.split(x_MK, 2, axis=1)
    halves = [w.half(which).reshape(w.bytes_NJ.shape).astype(x_MK.dtype) for which in (0, 1)]
    first, second = (operand_order.product(x, half, made=True) for x, half in zip(x_MJ, halves, strict=True))
    return first + second


def _made_beside(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """A matrix in x's dtype."""
    if w_NK.dtype == x_MK.dtype:
        return w_NK
    w_NK, one = _not_before(x_MK, w_NK)
    return (w_NK.astype(jnp.float32) * one).astype(x_MK.dtype)


def _not_before(x_MK: jax.Array, w: Any) -> tuple[Any, jax.Array]:
    """w, and a one that is not known before x is, to make numbers of w with.

    Left to itself XLA:CPU makes them of all matrices of a program at its start, before the loops that they are used in:
    memory for the whole model in x's dtype, and up to four times the time, since none is in a cache when it is used.
    """
    x_MK, w = lax.optimization_barrier((x_MK, w))  # for the loops
    bits = lax.bitcast_convert_type(jnp.sum(x_MK[:1, :1]).astype(jnp.float32), jnp.uint32)
    return w, (bits % 2 // 2 + 1).astype(jnp.float32)


def _along(dims: str, w_dims: str, scale: jax.Array) -> jax.Array:
    """The scale of an operand `w_dims`, laid out to multiply an array of the dimensions `dims`."""
    present = [letter for letter in w_dims if letter in dims]
    scale = jnp.squeeze(scale, [axis for axis, letter in enumerate(w_dims) if letter not in dims])
    size = dict(zip(present, scale.shape, strict=True))
    in_order = sorted(range(len(present)), key=lambda axis: dims.index(present[axis]))
    return jnp.transpose(scale, in_order).reshape([size.get(letter, 1) for letter in dims])


def _varying_axes(operand: jax.Array) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(operand).manual_axis_type.varying
    return axes


def _as_varying(operand: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varying_axes(operand)))
    return lax.pcast(operand, missing, to="varying") if missing else operand


def _parse(spec: str, left: jax.Array, right: jax.Array | Quantized | ByOutput | HalfBytes) -> tuple[str, str, str]:
    """The letters of both operands and of the result."""
    operands, _, y = spec.partition("->")
    x, _, w = operands.partition(",")
    for dims in (x, w, y):
        if not dims.isalpha() or len(set(dims)) != len(dims):
            raise ValueError(f"spec {spec!r} must be 'x,w->y' with letters only and none twice in a term, got {dims!r}")
    if set(x) - set(w + y) or set(w) - set(x + y) or set(y) - set(x + w):
        raise ValueError(f"spec {spec!r}: every letter must be in two of its three terms")
    if (len(x), len(w)) != (left.ndim, right.ndim):
        raise ValueError(f"spec {spec!r} does not fit operands of shapes {left.shape} and {right.shape}")
    return x, w, y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: _Plan, x: jax.Array, w: jax.Array) -> jax.Array:
    return _product_fwd(plan, x, w)[0]


def _product_fwd(plan: _Plan, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = x.astype(plan.dtype)
    y = contract_forward(plan.x, plan.w, plan.y, x, w.astype(plan.dtype)).astype(plan.result_dtype)
    if not set(plan.x) & set(plan.w) & set(plan.y):
        y = checkpoint_name(y, PRODUCT)
    # x is saved cast, at half the bytes of float32. w is saved as it came: the master weights are alive anyway, so a
    # bfloat16 copy would add to them (all layers' copies under scan), and casting again in the backward pass is cheap.
    return y, (x, w)


def _product_bwd(plan: _Plan, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    dy = dy.astype(plan.dtype)
    dx = contract_gradient(plan.y, plan.w, plan.x, dy, w.astype(plan.dtype)).astype(plan.x_dtype)
    dw = contract_gradient(plan.x, plan.y, plan.w, x, dy).astype(plan.w_dtype)
    return dx, dw


_product.defvjp(_product_fwd, _product_bwd)
