"""Which operand of a product is on the right: the oracle is float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends import operand_order
from mixtral_jax.model.backends.few_rows import OPTIONS, by_output
from mixtral_jax.model.backends.half_bytes import half_bytes
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.sharding import chips

UNITS = {"none": (False, False), "AVX512-BF16": (False, True), "AMX": (True, True)}


@pytest.fixture(params=UNITS)
def units(request, monkeypatch):
    """A CPU with such units for bfloat16."""
    amx, bfloat16 = UNITS[request.param]
    monkeypatch.setattr(chips, "has_amx", lambda: amx)
    monkeypatch.setattr(chips, "multiplies_bfloat16", lambda platform: bfloat16)
    return request.param


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("inputs", [256, 1024, 1536])
def test_how_many_rows_are_on_the_right(units, inputs, made):
    """A matrix that is made of another stays there with AMX."""
    few = inputs == 256
    expected = {
        "none": [],
        "AVX512-BF16": {256: [], 1024: [*range(1, 17), 32, 64], 1536: [*range(1, 49), 64]}[inputs],
        "AMX": [] if made else list(range(1, 65)),
    }

    def found(dtype):
        return [rows for rows in range(100) if operand_order.has_rows_right(rows, inputs, dtype, made)]

    assert found("bfloat16") == expected[units]
    assert found("float32") == list(range(1, 33 if few else 65))


@pytest.mark.parametrize(
    ("units", "dtype", "inputs", "rows", "right"),
    [
        ("none", "float32", 1024, 9, "rows"),
        ("none", "float32", 1024, 64, "rows"),
        ("none", "float32", 1024, 65, "matrix"),
        ("none", "bfloat16", 1024, 32, "matrix"),
        ("AVX512-BF16", "bfloat16", 1024, 9, "rows"),
        ("AVX512-BF16", "bfloat16", 1024, 32, "rows"),
        ("AVX512-BF16", "bfloat16", 1024, 33, "matrix"),
        ("AVX512-BF16", "bfloat16", 1536, 33, "rows"),
        ("AMX", "bfloat16", 192, 3, "rows"),
        ("AMX", "bfloat16", 192, 20, "rows"),
        ("AMX", "bfloat16", 192, 65, "matrix"),
    ],
    indirect=["units"],
)
def test_the_operand_on_the_right(units, dtype, inputs, rows, right):
    """So it is once XLA has compiled the product; and a row is what it is whatever the others are."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, 1, inputs), (inputs, 40)))
    # Another function each time: traces are kept, and don't know which units there are.
    multiply = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, dtype=dtype), compiler_options=OPTIONS)
    compiled = multiply.lower(x, by_output(w, 1)).compile()
    assert _shapes_of_products(compiled) == [f"[40,{rows}]" if right == "rows" else f"[{rows},40]"]
    whole = compiled(x, by_output(w, 1))
    expected = np.einsum("BTD,DF->BTF", np.asarray(x, np.float64), np.asarray(w, np.float64))
    np.testing.assert_allclose(whole, expected, atol=5e-7 * inputs)  # sums of so many, of about one each
    np.testing.assert_array_equal(compiled(x.at[1:].set(jnp.nan), by_output(w, 1))[0], whole[0])


def _shapes_of_products(compiled):
    return re.findall(r" = f32(\[[0-9,]+\])\S* dot\(", compiled.as_text())


@pytest.mark.parametrize(("bits", "dtype", "rows", "dots"), [("int8", "bfloat16", 32, 1), ("int4", "float32", 48, 2)])
@pytest.mark.parametrize("units", ["AVX512-BF16"], indirect=True)
def test_rows_are_on_the_right_of_matrices_made_of_fewer_bits(units, bits, dtype, rows, dots):
    rng = np.random.default_rng(1)
    values, scale = rng.integers(-8, 8, (1024, 40)).astype(bits), np.full((1, 40), 2**-6, np.float32)
    w = Quantized(values, scale if bits == "int8" else np.repeat(scale, 2, axis=0))
    x = jnp.asarray(rng.standard_normal((rows, 1, 1024)), dtype)
    lying = jax.tree.map(jnp.asarray, by_output(w, 1) if bits == "int8" else half_bytes(w, 1))
    multiply = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, dtype=dtype), compiler_options=OPTIONS)
    compiled = multiply.lower(x, lying).compile()
    assert _shapes_of_products(compiled) == [f"[40,{rows}]"] * dots
    expected = np.einsum("BTD,DF->BTF", np.asarray(x, np.float64), values.astype(np.float64) * 2**-6)
    np.testing.assert_allclose(compiled(x, lying), expected, atol=1e-4)
