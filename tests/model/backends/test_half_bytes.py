"""Products with a matrix in int4 that lies by output: the oracle is float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends.few_rows import OPTIONS
from mixtral_jax.model.backends.half_bytes import half_bytes
from mixtral_jax.model.backends.products import einsum, einsums
from mixtral_jax.model.backends.quantized import Quantized


def _quantized(shape, groups, inputs, seed=0):
    """A matrix in int4, and the same in float64."""
    rng = np.random.default_rng(seed)
    scales = tuple(groups if axis == inputs - 1 else size for axis, size in enumerate(shape))
    scale = rng.integers(16, 32, scales) * np.float32(2**-11)  # as `quantize` has them: weights exact in bfloat16
    values = rng.integers(-8, 8, shape).astype("int4")
    whole = np.repeat(scale.astype(np.float64), shape[inputs - 1] // groups, axis=inputs - 1)
    return Quantized(values, scale), values.astype(np.float64) * whole


def _on_device(w):
    return jax.tree.map(jnp.asarray, w)


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["in-order", "reordered"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 32, 40])
@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape", "groups", "inputs"),
    [
        ("BTD,DF->BTF", (64,), (64, 12), 2, 1),
        ("BTD,DF->BTF", (54,), (54, 7), 6, 1),  # groups of 9 inputs; outputs that can't be divided
        ("BTD,DF->BTF", (192,), (192, 1), 6, 1),
        ("BTD,DNH->BTNH", (128,), (128, 3, 4), 4, 1),
        ("BTNH,NHD->BTD", (6, 16), (6, 16, 5), 1, 2),
        ("BTNH,NHD->BTD", (3, 64), (3, 64, 8), 2, 2),
    ],
)
def test_equals_float64(spec, x_shape, w_shape, groups, inputs, rows, options):
    stored, weights = _quantized(w_shape, groups, inputs)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 1, *x_shape)), jnp.float32)
    lying = half_bytes(stored, inputs)
    assert (lying.shape, lying.ndim, lying.bytes_NJ.nbytes) == (w_shape, len(w_shape), weights.size // 2)
    np.testing.assert_array_equal(lying.restored(), weights)
    multiply = jax.jit(lambda x, w: einsum(spec, x, w, dtype="float32"), compiler_options=options)
    expected = np.einsum(spec, np.asarray(x, np.float64), weights)
    np.testing.assert_allclose(multiply(x, _on_device(lying)), expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_matrices_are_multiplied_as_each_alone(count, rows):
    pairs = [_quantized((64, 12), 2, 1, seed) for seed in range(count)]
    x = jnp.asarray(np.random.default_rng(2).standard_normal((rows, 1, 64)), jnp.float32)
    lying = [_on_device(half_bytes(stored, 1)) for stored, _ in pairs]
    multiply = jax.jit(lambda x, ws: einsums("BTD,DF->BTF", x, ws, dtype="float32"), compiler_options=OPTIONS)
    for found, (_, weights) in zip(multiply(x, lying), pairs, strict=True):
        expected = np.einsum("BTD,DF->BTF", np.asarray(x, np.float64), weights)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=5e-6)


def test_matrices_of_different_shapes_and_other_forms():
    (one, first), (other, second) = _quantized((64, 12), 2, 1), _quantized((64, 5), 2, 1)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 1, 64)), jnp.float32)
    lying = [_on_device(half_bytes(w, 1)) for w in (one, other)]
    found = einsums("BTD,DF->BTF", x, [*lying, _on_device(one)], dtype="float32")
    for y, weights in zip(found, (first, second, first), strict=True):
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ weights, rtol=1e-6, atol=5e-6)
    # Inputs that are not the last of x.
    turned = einsum("DB,DF->BF", x[:, 0].T, lying[0], dtype="float32")
    np.testing.assert_allclose(turned, np.asarray(x[:, 0], np.float64) @ first, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_operands_are_rounded_as_everywhere(rows):
    """In bfloat16 x is, and the weights are exact: however many rows there are, the product is the same."""
    stored, weights = _quantized((64, 32), 2, 1)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((rows, 1, 64)), jnp.float32)
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64)
    found = einsum("BTD,DF->BTF", x, _on_device(half_bytes(stored, 1)), dtype="bfloat16")
    np.testing.assert_allclose(found, rounded @ weights, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_a_row_does_not_depend_on_the_others(rows):
    stored, _ = _quantized((192, 40), 6, 1)
    w = _on_device(half_bytes(stored, 1))
    x = jnp.asarray(np.random.default_rng(5).standard_normal((rows, 1, 192)), jnp.float32)
    multiply = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, dtype="float32"), compiler_options=OPTIONS)
    whole = multiply(x, w)
    alone = multiply(x.at[1:].set(jnp.nan), w)
    np.testing.assert_array_equal(alone[0], whole[0])


def test_a_group_in_both_halves_has_no_such_form():
    assert half_bytes(_quantized((96, 4), 3, 1)[0], 1) is None


@pytest.mark.parametrize("rows", [1, 4])
def test_two_matrices_share_a_loop_and_nothing_writes_them_out(rows):
    stored, _ = _quantized((128, 32), 4, 1)
    w = _on_device(half_bytes(stored, 1))
    x = jnp.ones((rows, 1, 128), jnp.float32)
    multiply = jax.jit(lambda x, *ws: einsums("BTD,DF->BTF", x, ws, dtype="float32"), compiler_options=OPTIONS)
    entry = multiply.lower(x, w, w).compile().as_text().split("ENTRY")[1]
    # 32 outputs and 128 inputs; the rest are x, scales and results.
    largest = max(math.prod(map(int, dims.split(","))) for dims in re.findall(r" = f32\[([\d,]+)\]", entry))
    assert largest <= 4 * 128
    assert len(re.findall(r"reduce_fusion(\.\d+)? = ", entry)) == 1


def test_what_makes_x_is_made_once():
    """Not again for each output: the loop reads the matrix, its scales and one other array."""
    stored, _ = _quantized((64, 32), 2, 1)
    gate, up = jnp.asarray(np.random.default_rng(6).standard_normal((2, 4, 1, 64)), jnp.float32)

    def down(gate, up, w):
        return einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, w, dtype="float32")

    compiled = jax.jit(down, compiler_options=OPTIONS).lower(gate, up, _on_device(half_bytes(stored, 1))).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    (loop,) = (line for line in entry.splitlines() if re.search(r"reduce_fusion(\.\d+)? = ", line))
    assert loop.split(" fusion(")[1].split(")")[0].count("%") == 3
