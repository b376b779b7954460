"""Which operand of a product XLA:CPU packs: the oracle is float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends import packing
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


@pytest.mark.parametrize("inputs", [256, 1024])
def test_rows_that_are_packed(units, inputs):
    rows = range(1, 100)
    bfloat16, float32 = (
        [each for each in rows if packing.packs_rows(each, inputs, dtype)] for dtype in ("bfloat16", "float32")
    )
    few = inputs == 256
    assert float32 == list(range(1, 33 if few else 65))
    assert (
        bfloat16
        == {
            "none": [],
            "AVX512-BF16": [] if few else [*range(1, 17), 32, 64],
            "AMX": list(range(1, 65)),
        }[units]
    )


@pytest.mark.parametrize(
    ("dtype", "rows", "packed"),
    [
        ("float32", 9, "rows"),
        ("float32", 64, "rows"),
        ("float32", 65, "matrix"),
        ("bfloat16", 32, "rows"),
        ("bfloat16", 33, "matrix"),
    ],
)
@pytest.mark.parametrize("units", ["AVX512-BF16"], indirect=True)
def test_the_operand_on_the_right(units, dtype, rows, packed):
    """XLA has it so too once it has compiled the product, and a row is what it is whatever the others are."""
    rng = np.random.default_rng(0)
    x_MK, w_NK = (jnp.asarray(rng.standard_normal((each, 1024)), dtype) for each in (rows, 40))
    compiled = jax.jit(packing.product, compiler_options=OPTIONS).lower(x_MK, w_NK).compile()
    (dot,) = (line for line in compiled.as_text().splitlines() if " dot(" in line)
    shape = (40, rows) if packed == "rows" else (rows, 40)
    assert "[{},{}]".format(*shape) in dot.partition(" dot(")[0]
    whole = compiled(x_MK, w_NK)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(whole, np.asarray(x_MK, np.float64) @ np.asarray(w_NK, np.float64).T, atol=1e-4)
    np.testing.assert_array_equal(compiled(x_MK[::-1], w_NK)[::-1], whole)
    np.testing.assert_array_equal(compiled(x_MK.at[1:].set(jnp.nan), w_NK)[0], whole[0])


@pytest.mark.parametrize(("bits", "dtype", "rows", "dots"), [("int8", "bfloat16", 32, 1), ("int4", "float32", 40, 2)])
@pytest.mark.parametrize("units", ["AVX512-BF16"], indirect=True)
def test_matrices_that_are_made_of_fewer_bits_are_not_packed_either(units, bits, dtype, rows, dots):
    rng = np.random.default_rng(1)
    values, scale = rng.integers(-8, 8, (1024, 40)).astype(bits), np.full((1, 40), 2**-6, np.float32)
    w = Quantized(values, scale if bits == "int8" else np.repeat(scale, 2, axis=0))
    x = jnp.asarray(rng.standard_normal((rows, 1, 1024)), dtype)
    lying = jax.tree.map(jnp.asarray, by_output(w, 1) if bits == "int8" else half_bytes(w, 1))
    multiply = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, dtype=dtype), compiler_options=OPTIONS)
    compiled = multiply.lower(x, lying).compile()
    found = [line.partition(" dot(")[0] for line in compiled.as_text().splitlines() if " dot(" in line]
    assert len(found) == dots
    assert all(f"[40,{rows}]" in each for each in found)
    expected = np.einsum("BTD,DF->BTF", np.asarray(x, np.float64), values.astype(np.float64) * 2**-6)
    np.testing.assert_allclose(compiled(x, lying), expected, atol=1e-4)
