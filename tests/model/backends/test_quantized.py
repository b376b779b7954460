"""Products with quantised weights, against products with what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.quantized import Quantized, in_int8

SIZES = {"B": 2, "T": 3, "D": 8, "N": 4, "H": 6, "F": 10, "E": 3, "C": 5, "K": 2, "G": 3, "S": 7}
SPECS = ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "ECD,EDF->ECF", "BTD,DF->FBT"]


def _weight(letters, result, groups, dtype=jnp.int8):
    """Whole numbers, and scales that differ in every place that they may."""
    rng = np.random.default_rng(0)
    shape = [SIZES[letter] for letter in letters]
    summed = [axis for axis, letter in enumerate(letters) if letter not in result]
    scale = [1 if axis in summed else size for axis, size in enumerate(shape)]
    if groups > 1:
        scale[summed[-1]] = groups
    values = jnp.asarray(rng.integers(-7, 8, shape), dtype)
    return Quantized(values, jnp.asarray(rng.uniform(0.5, 1.5, scale), jnp.float32))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_a_product_is_that_of_the_dequantised_weight(spec, groups, dtype, error):
    operands, result = spec.split("->")
    x_letters, w_letters = operands.split(",")
    w = _weight(w_letters, result, groups)
    x = jnp.asarray(np.random.default_rng(1).standard_normal([SIZES[each] for each in x_letters]), jnp.float32)
    x = x.astype(dtype).astype(jnp.float32)
    expected = jnp.einsum(spec, x, w.dequantized())
    found = jax.jit(lambda x, w: einsum(spec, x, w, dtype=dtype))(x, w)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=error * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("spec", "kept"), [("BTKGH,BSKH->BKGTS", "BSK"), ("BKGTS,BSKH->BTKGH", "BSK"), ("ECD,EDF->ECF", "ED")]
)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_a_scale_of_a_token_goes_onto_scores_or_onto_their_weights(spec, kept, dtype, error):
    x_letters, w_letters = spec.split("->")[0].split(",")
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-127, 128, [SIZES[each] for each in w_letters]), jnp.int8)
    scale = rng.uniform(0.01, 1.5, [SIZES[each] if each in kept else 1 for each in w_letters])
    w = Quantized(values, jnp.asarray(scale, jnp.float32))
    x = jnp.asarray(rng.standard_normal([SIZES[each] for each in x_letters]), dtype).astype(jnp.float32)
    product = jax.jit(lambda x, w: einsum(spec, x, w, dtype=dtype))
    expected = jnp.einsum(spec, x, w.dequantized())
    np.testing.assert_allclose(product(x, w), expected, atol=error * float(jnp.abs(expected).max()))
    # No array of the whole numbers' shape is multiplied by anything before the product.
    jaxpr = str(jax.make_jaxpr(lambda x, w: einsum(spec, x, w, dtype=dtype))(x, w))
    shape = ",".join(str(size) for size in values.shape)
    assert not [line for line in jaxpr.splitlines() if f"[{shape}] = mul" in line]


def test_in_int8_by_hand():
    found = in_int8(jnp.array([[0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]]))
    np.testing.assert_array_equal(found.values, [[0, 0, 0], [-127, 2, 0]])  # 1.5 to the even 2, 0.5 to 0
    np.testing.assert_array_equal(found.scale, [[0.0], [2.0]])


def test_int8_by_channel_takes_whole_numbers_as_they_are():
    """So bfloat16 rounds x alone: whole numbers up to 127 are exact in it, weights would not be."""
    w = Quantized(jnp.array([[127], [-125]], jnp.int8), jnp.array([[1 / 3]], jnp.float32))
    found = einsum("BTD,DF->BTF", jnp.ones((1, 1, 2)), w, dtype="bfloat16")
    assert float(found[0, 0, 0]) == pytest.approx(2 / 3, rel=1e-6)


def test_dequantized_by_hand():
    values = jnp.array([[1, 2], [3, 4], [5, 6], [7, -7]], jnp.int4)
    scale = jnp.array([[10.0, 1.0], [100.0, 2.0]], jnp.float32)  # of the first two rows, and of the others
    expected = [[10, 2], [30, 4], [500, 12], [700, -14]]
    np.testing.assert_array_equal(Quantized(values, scale).dequantized(), expected)
