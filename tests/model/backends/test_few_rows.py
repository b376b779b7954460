"""Products of a few rows with a matrix that lies by output: the oracle is float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends import few_rows
from mixtral_jax.model.backends.few_rows import OPTIONS, by_output
from mixtral_jax.model.backends.products import einsum, einsums
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.sharding import chips

LOOP = r"reduce_fusion(\.\d+)? = "
"""In a compiled program's text."""


def _operands(x_shape, w_shape, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(x_shape), jnp.float32)
    return x, jnp.asarray(rng.standard_normal(w_shape), dtype)


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["in-order", "reordered"])
@pytest.mark.parametrize("held", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape", "inputs"),
    [
        ("BTD,DF->BTF", (24,), (24, 12), 1),
        ("BTD,DF->BTF", (23,), (23, 9), 1),  # outputs that can't be divided
        ("BTD,DF->BTF", (320,), (320, 10), 1),  # inputs enough for XLA to pack 40 rows in float32
        ("BTD,DF->BTF", (2100,), (2100, 24), 1),  # wide rows
        ("BTD,DNH->BTNH", (24,), (24, 3, 4), 1),
        ("BTNH,NHD->BTD", (6, 4), (6, 4, 5), 2),
    ],
)
def test_equals_float64(spec, x_shape, w_shape, inputs, rows, held, options):
    x, w = _operands((rows, 1, *x_shape), w_shape, held)
    multiply = jax.jit(lambda x, w: einsum(spec, x, w, dtype="float32"), compiler_options=options)
    expected = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    summed = np.prod(w_shape[:inputs])
    np.testing.assert_allclose(multiply(x, by_output(w, inputs)), expected, rtol=1e-6, atol=max(5e-5, 1e-7 * summed))


@pytest.mark.parametrize("held", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 12), (23, 9), (2100, 12)])
def test_several_matrices_are_multiplied_as_each_alone(inputs, outputs, rows, held):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((rows, 1, inputs)), jnp.float32)
    if held == "int8":
        scales = rng.uniform(0.001, 0.02, (3, 1, outputs)).astype(np.float32)
        stored = [Quantized(rng.integers(-127, 128, (inputs, outputs)).astype(np.int8), scale) for scale in scales]
        weights = [w.values.astype(np.float64) * w.scale for w in stored]
    else:
        stored = list(jnp.asarray(rng.standard_normal((3, inputs, outputs)), held))
        weights = [np.asarray(w, np.float64) for w in stored]
    lying = [jax.tree.map(jnp.asarray, by_output(w, 1)) for w in stored]
    multiply = jax.jit(lambda x, ws: einsums("BTD,DF->BTF", x, ws, dtype="float32"), compiler_options=OPTIONS)
    for found, w in zip(multiply(x, lying), weights, strict=True):
        np.testing.assert_allclose(found, np.einsum("BTD,DF->BTF", np.asarray(x, np.float64), w), rtol=1e-6, atol=2e-4)


@pytest.mark.parametrize("options", [None, OPTIONS], ids=["in-order", "reordered"])
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape", "inputs"),
    [("BTD,DF->BTF", (24,), (24, 10), 1), ("BTNH,NHD->BTD", (6, 4), (6, 4, 5), 2)],
)
def test_whole_numbers_have_a_scale_for_each_output(spec, x_shape, w_shape, inputs, rows, options):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((rows, 1, *x_shape)), jnp.float32)
    scale = rng.uniform(0.001, 0.02, [1] * inputs + list(w_shape[inputs:])).astype(np.float32)
    w = Quantized(rng.integers(-127, 128, w_shape).astype(np.int8), scale)
    weights = w.values.astype(np.float64) * scale
    lying = by_output(w, inputs)
    np.testing.assert_allclose(lying.restored(), weights, rtol=1e-6)
    multiply = jax.jit(lambda x, w: einsum(spec, x, w, dtype="float32"), compiler_options=options)
    found = multiply(x, jax.tree.map(jnp.asarray, lying))
    np.testing.assert_allclose(found, np.einsum(spec, np.asarray(x, np.float64), weights), atol=2e-5)


@pytest.mark.parametrize("held", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_operands_are_rounded_as_everywhere(rows, held):
    """In bfloat16, a product is that of a matrix that lies as it is, but for the order of its sums."""
    x, w = _operands((rows, 1, 64), (64, 32), "float32")
    expected = einsum("BTD,DF->BTF", x, w, dtype="bfloat16")
    found = einsum("BTD,DF->BTF", x, by_output(w.astype(held), 1), dtype="bfloat16")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "held"), [(2, "bfloat16"), (5, "bfloat16"), (8, "bfloat16"), (3, "float32"), (20, "float32")]
)
def test_a_row_does_not_depend_on_the_others(rows, held):
    x, w = _operands((20, 1, 192), (192, 40), held)
    multiply = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, dtype="float32"), compiler_options=OPTIONS)
    whole = multiply(x[:rows], by_output(w, 1))
    np.testing.assert_array_equal(multiply(x[:rows][::-1], by_output(w, 1))[::-1], whole)
    alone = multiply(x[:rows].at[1:].set(jnp.nan), by_output(w, 1))
    np.testing.assert_array_equal(alone[0], whole[0])


def test_lies_by_output_and_shows_its_own_shape():
    w = jnp.arange(24.0).reshape(2, 3, 4)
    lying = by_output(w, 2)
    assert (lying.shape, lying.ndim, lying.values.shape) == (w.shape, 3, (4, 2, 3))
    assert lying.as_it_lies("NHD") == "DNH"
    np.testing.assert_array_equal(lying.restored(), w)
    assert [type(leaf) for leaf in jax.tree.leaves(lying)] == [type(w)]


def test_the_matrix_is_read_once_and_in_its_own_bits():
    """One loop takes all rows, and nothing writes the matrix out in float32."""
    x, w = _operands((8, 1, 64), (64, 32), "bfloat16")
    multiply = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w, dtype="float32"), compiler_options=OPTIONS)
    compiled = multiply.lower(x, by_output(w, 1)).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    assert "f32[32,64]" not in entry
    assert len(re.findall(LOOP, entry)) == 1


@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_many_rows_take_the_matrix_as_it_lies(held):
    """No transpose of it is written first."""
    x, w = _operands((5, 20, 64), (64, 4, 8), held)
    multiply = jax.jit(lambda x, w: einsum("BTD,DNH->BTNH", x, w, dtype=held))
    entry = multiply.lower(x, by_output(w, 1)).compile().as_text().split("ENTRY")[1]
    assert "[4,8,64]" in entry
    assert "copy" not in entry


def test_no_rows_and_operands_that_do_not_fit():
    w = by_output(jnp.ones((6, 4)), 1)
    assert einsum("BTD,DF->BTF", jnp.ones((0, 1, 6)), w, dtype="float32").shape == (0, 1, 4)
    with pytest.raises(ValueError, match="does not fit"):
        einsums("BD,DF->BF", jnp.ones((2, 1, 6)), [w, w], dtype="float32")
    unlike = einsums("BTD,DF->BTF", jnp.ones((2, 1, 6)), [w, by_output(jnp.ones((6, 5)), 1)], dtype="float32")
    assert [y.shape for y in unlike] == [(2, 1, 4), (2, 1, 5)]


@pytest.mark.parametrize("rows", [1, 4])
def test_two_matrices_share_a_loop(rows):
    x, w = _operands((rows, 1, 64), (64, 32), "bfloat16")
    multiply = jax.jit(lambda x, *ws: einsums("BTD,DF->BTF", x, ws, dtype="float32"), compiler_options=OPTIONS)
    compiled = multiply.lower(x, by_output(w, 1), by_output(w + 1, 1)).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    assert "f32[32,64]" not in entry
    assert len(re.findall(LOOP, entry)) == 1


def test_what_makes_x_is_made_once():
    """Not again for each output: the loop reads the matrix and one other array."""
    rng = np.random.default_rng(0)
    gate, up = jnp.asarray(rng.standard_normal((2, 4, 1, 64)), jnp.float32)
    w = by_output(jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16), 1)

    def down(gate, up, w):
        return einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, w, dtype="float32")

    compiled = jax.jit(down, compiler_options=OPTIONS).lower(gate, up, w).compile()
    (loop,) = (line for line in compiled.as_text().split("ENTRY")[1].splitlines() if re.search(LOOP, line))
    operands = loop.split(" fusion(")[1].split(")")[0]
    assert operands.count("%") == 2
    infinite = compiled(gate.at[0, 0, 0].set(jnp.inf), up.at[0, 0, 0].set(1).at[1, 0, 0].set(jnp.nan), w)
    assert np.isinf(infinite[0]).all()
    assert np.isnan(infinite[1]).all()
    assert np.isfinite(infinite[2:]).all()


@pytest.mark.parametrize(
    ("rows", "inputs", "held", "sums"),
    [
        (1, 256, "bfloat16", 4),
        (8, 256, "bfloat16", 8),
        (8, 256, "float32", 16),
        (2, 4096, "bfloat16", 16),
        (8, 4096, "bfloat16", 32),
    ],
)
def test_sums_that_run_side_by_side(monkeypatch, rows, inputs, held, sums):
    """Of a matrix that is multiplied by wide rows four parts are read at least, of float32 with AVX-512 two."""
    monkeypatch.setattr(few_rows, "streams_of_float32", lambda: 2)
    x, w = jnp.ones((rows, inputs)), jnp.ones((64, inputs), held)
    jaxpr = jax.make_jaxpr(lambda x, w: few_rows.products(x, [w]))(x, w)
    (loop,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "reduce")
    assert len(loop.outvars) == sums


@pytest.mark.parametrize(("platform", "expected"), [("cpu", True), ("gpu", False)])
def test_are_for_every_cpu(monkeypatch, platform, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert few_rows.are_for_this_host.__wrapped__() == expected


@pytest.mark.parametrize(
    ("amx", "held", "multiplied", "expected"),
    [
        (True, "bfloat16", "bfloat16", True),
        (True, "bfloat16", "float32", False),
        (True, "int8", "bfloat16", False),
        (True, "float32", "float32", False),
        (False, "bfloat16", "bfloat16", False),
    ],
)
def test_what_matrix_units_multiply(monkeypatch, amx, held, multiplied, expected):
    monkeypatch.setattr(chips, "has_amx", lambda: amx)
    assert few_rows.on_matrix_units(held, multiplied) == expected


@pytest.mark.parametrize(
    ("amx", "inputs", "held", "multiplied", "most"),
    [
        (False, 256, "bfloat16", "bfloat16", 8),
        (True, 256, "bfloat16", "bfloat16", 2),
        (False, 256, "int8", "bfloat16", 16),
        (True, 256, "int8", "bfloat16", 16),
        (False, 256, "bfloat16", "float32", 64),
        (False, 24, "float32", "float32", 8),
        (False, 256, "float32", "float32", 8),
        (False, 600, "float32", "float32", 6),
        (False, 4096, "float32", "float32", 4),
    ],
)
def test_how_many_are_few(monkeypatch, amx, inputs, held, multiplied, most):
    """In float32, where they are read from the first cache more."""
    monkeypatch.setattr(chips, "has_amx", lambda: amx)
    held, multiplied = jnp.dtype(held), jnp.dtype(multiplied)
    assert [rows for rows in range(100) if few_rows.are_few(rows, inputs, held, multiplied)] == list(range(1, most + 1))
