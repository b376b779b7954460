"""Products against float64 NumPy, their gradients against autodiff, and their life under JAX's transforms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.model.backends.few_rows import by_output
from mixtral_jax.model.backends.half_bytes import half_bytes
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.backends.quantized import Quantized

SIZES = {"B": 2, "T": 6, "S": 10, "D": 16, "N": 4, "K": 2, "G": 3, "H": 8, "F": 12, "E": 4, "C": 8, "V": 20}
SPECS = (
    "BTD,DNH->BTNH",
    "BTNH,NHD->BTD",
    "BTD,DF->BTF",
    "BTF,FD->BTD",
    "BTD,DV->BTV",
    "BTD,VD->BTV",
    "TD,DV->TV",
    "ECD,EDF->ECF",
    "ECF,EFD->ECD",
    "GECD,EDF->GECF",
    "GECF,EFD->GECD",
    "BTKGH,BSKH->BKGTS",
    "BKGTS,BSKH->BTKGH",
)
# Half a unit in the last place of bfloat16 is 2**-9: an operand's error, relative to the operands' norms.
TOLERANCE = {"bfloat16": 2**-8, "float32": 2**-21}


def _normal(spec_dims: str, seed: int, sizes: dict[str, int] = SIZES) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal([sizes[d] for d in spec_dims])
    return jnp.asarray(values, jnp.float32)


def _operands(spec: str, sizes: dict[str, int] = SIZES) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and a cotangent."""
    x_dims, w_dims, y_dims = re.split(",|->", spec)
    return _normal(x_dims, 0, sizes), _normal(w_dims, 1, sizes), _normal(y_dims, 2, sizes)


def _value_and_gradients(spec, x, w, dy, **kwargs):
    y, vjp = jax.vjp(lambda x, w: einsum(spec, x, w, **kwargs), x, w)
    return y, *vjp(dy.astype(y.dtype))


def _exact(spec, x, w, dy):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    x_dims, w_dims, y_dims = re.split(",|->", spec)
    return (
        np.einsum(spec, x, w),
        np.einsum(f"{y_dims},{w_dims}->{x_dims}", dy, w),
        np.einsum(f"{x_dims},{y_dims}->{w_dims}", x, dy),
    )


def _assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)
    assert error < tolerance, error


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradients(spec, dtype):
    operands = _operands(spec)
    products = jax.jit(lambda x, w, dy: _value_and_gradients(spec, x, w, dy, dtype=dtype))(*operands)
    for actual, expected in zip(products, _exact(spec, *operands), strict=True):
        assert actual.dtype == jnp.float32
        _assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "sizes", [{**SIZES, "C": 7}, {**SIZES, "K": 1}, {**SIZES, "B": 1, "K": 1, "G": 1}, SIZES | {"B": 1, "T": 1, "C": 1}]
)
@pytest.mark.parametrize("spec", ["ECD,EDF->ECF", "BTKGH,BSKH->BKGTS", "BKGTS,BSKH->BTKGH", "BTF,FD->BTD"])
def test_odd_and_single_sizes(spec, sizes):
    """Sizes at which XLA:CPU could fold a transpose into a product that it has no code for."""
    operands = _operands(spec, sizes)
    products = jax.jit(lambda x, w, dy: _value_and_gradients(spec, x, w, dy, dtype=jnp.bfloat16))(*operands)
    for actual, expected in zip(products, _exact(spec, *operands), strict=True):
        _assert_close(actual, expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("spec", SPECS)
def test_float32_gradients_equal_autodiff(spec):
    x, w, dy = _operands(spec)
    _, vjp = jax.vjp(lambda x, w: jnp.einsum(spec, x, w, precision="highest"), x, w)
    for actual, expected in zip(_value_and_gradients(spec, x, w, dy, dtype=jnp.float32)[1:], vjp(dy), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_product_is_exact_for_its_operands():
    """Sums are in float32: 1 + 2**-8 - 1 keeps its small part, and 300 ones give 300 (bfloat16 stops at 256)."""
    x = jnp.array([[1.0, 2**-8, -1.0]])
    assert einsum("TD,DF->TF", x, jnp.ones((3, 1)), dtype=jnp.bfloat16) == 2**-8
    ones = jnp.ones((300, 1))
    assert einsum("TD,DF->TF", ones.T, ones, dtype=jnp.bfloat16) == 300
    _, _, dw = _value_and_gradients("TD,DF->TF", ones, jnp.ones((1, 1)), ones, dtype=jnp.bfloat16)
    assert dw == 300


def test_cotangent_is_cast_to_the_product_dtype():
    # 1 + 2**-9 is halfway between 1 and the next bfloat16 and goes to the even one, 1.
    one = jnp.ones((1, 1))
    _, dx, dw = _value_and_gradients("TD,DF->TF", one, one, one + 2**-9, dtype=jnp.bfloat16)
    assert dx == 1
    assert dw == 1


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("w_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(x_dtype, w_dtype, dtype):
    x, w, dy = _operands("BTD,DF->BTF")
    x, w = x.astype(x_dtype), w.astype(w_dtype)
    y, dx, dw = _value_and_gradients("BTD,DF->BTF", x, w, dy, dtype=dtype)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.dtype(x_dtype), jnp.dtype(w_dtype))
    assert einsum("BTD,DF->BTF", x, w, dtype=dtype, result_dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_operands_of_each_dot_are_of_the_product_dtype(dtype):
    x, w, dy = _operands("ECD,EDF->ECF")
    jaxpr = str(jax.make_jaxpr(lambda *a: _value_and_gradients("ECD,EDF->ECF", *a, dtype=dtype))(x, w, dy))
    dots = re.findall(r":(\w+)\[[\d,]*\] = dot_general", jaxpr)
    assert set(dots) == {"f32"}
    assert jaxpr.count("bf16[") > 0 if dtype == "bfloat16" else "bf16[" not in jaxpr


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"])
def test_scan_and_checkpoint(policy):
    """Three layers of y += w2 (w1 y), scanned and rematerialised, against the plain loop."""
    layers = 3
    w1, w2 = (jnp.stack([_normal(dims, 10 * seed + i) for i in range(layers)]) for seed, dims in ((1, "DF"), (2, "FD")))
    x = _normal("BTD", 0)

    def layer(y, weights):
        h = einsum("BTD,DF->BTF", y, weights[0], dtype=jnp.float32)
        return y + 0.1 * einsum("BTF,FD->BTD", h, weights[1], dtype=jnp.float32), None

    def scanned(x, w1, w2):
        body = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))
        return jnp.sum(jax.lax.scan(body, x, (w1, w2))[0] ** 2)

    def looped(x, w1, w2):
        for i in range(layers):
            x, _ = layer(x, (w1[i], w2[i]))
        return jnp.sum(x**2)

    gradients = jax.jit(jax.grad(scanned, (0, 1, 2)))(x, w1, w2)
    for actual, expected in zip(gradients, jax.grad(looped, (0, 1, 2))(x, w1, w2), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)


SHARDED = (
    ("BTD,DNH->BTNH", P("data"), P(None, "tensor"), P("data", None, "tensor"), 2),
    ("BTNH,NHD->BTD", P("data", None, "tensor"), P("tensor"), P("data"), 2),
    ("ECD,EDF->ECF", P("expert", "data"), P("expert", None, "tensor"), P("expert", "data", "tensor"), 2),
    ("GECD,EDF->GECF", P(None, "expert", "data"), P("expert"), P(None, "expert", "data"), 1),
    ("BTKGH,BSKH->BKGTS", P("data", None, "tensor"), P("data", None, "tensor"), P("data", "tensor"), 0),
    ("BKGTS,BSKH->BTKGH", P("data", "tensor"), P("data", None, "tensor"), P("data", None, "tensor"), 0),
)


@pytest.mark.parametrize(("spec", "x_spec", "w_spec", "y_spec", "all_reduces"), SHARDED)
def test_sharded(mesh, spec, x_spec, w_spec, y_spec, all_reduces):
    """Partial sums are reduced, and nothing else moves."""
    x, w, y = (NamedSharding(mesh, s) for s in (x_spec, w_spec, y_spec))
    operands = tuple(map(jax.device_put, _operands(spec), (x, w, y)))
    step = jax.jit(lambda *a: _value_and_gradients(spec, *a, dtype=jnp.bfloat16), out_shardings=(y, x, w))
    compiled = step.lower(*operands).compile()
    moves = re.findall(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", compiled.as_text())
    assert moves == ["all-reduce"] * all_reduces
    for actual, expected in zip(compiled(*operands), _exact(spec, *operands), strict=True):
        _assert_close(actual, expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh, check_vma):
    """The gradient of a weight that is the same on all devices is summed over them."""

    def loss(x, w):
        return jax.lax.psum(jnp.sum(einsum("BTD,DF->BTF", x, w, dtype=jnp.float32) ** 2), "data")

    x, w, _ = _operands("BTD,DF->BTF")
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma)
    expected = jax.grad(lambda x, w: jnp.sum(jnp.einsum("BTD,DF->BTF", x, w) ** 2), (0, 1))(x, w)
    for actual, plain in zip(jax.jit(jax.grad(mapped, (0, 1)))(x, w), expected, strict=True):
        np.testing.assert_allclose(actual, plain, rtol=1e-4, atol=1e-4)


def _in_bfloat16(w):
    return by_output(w.astype(jnp.bfloat16), 1)


def _in_int8(w):
    return by_output(Quantized((w * 10).astype(np.int8), np.full((1, w.shape[1]), 0.1, np.float32)), 1)


def _in_int4(w):
    return half_bytes(Quantized((w * 2).astype("int4"), np.full((2, w.shape[1]), 0.5, np.float32)), 1)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("rows", [1, 9, 100])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(_in_bfloat16, "float32"), (_in_int8, "bfloat16"), (_in_int8, "float32"), (_in_int4, "bfloat16")],
)
def test_a_program_holds_few_matrices_as_it_multiplies_them(form, dtype, rows, turns):
    """Of eight, which are held in fewer bits, at most three are made at a time, and none before a loop around them."""
    width, layers = 512, 8
    w = np.random.default_rng(0).standard_normal((width, width)).clip(-3, 3).astype(np.float32)
    weights = [jax.tree.map(jnp.asarray, form(w)) for _ in range(layers)]

    def program(x, weights):
        def turn(_, x):
            for w in weights:
                x = jnp.tanh(einsum("TD,DE->TE", x, w, dtype=dtype))
            return x

        return jax.lax.fori_loop(0, turns, turn, x)

    x = jnp.ones((rows, width))
    held = jax.jit(program).lower(x, weights).compile().memory_analysis().temp_size_in_bytes
    assert held < 3 * w.size * jnp.dtype(dtype).itemsize + 8 * x.nbytes


@pytest.mark.parametrize(
    "spec", ["BTD,DF", "BTT,TF->BF", "B...D,DF->B...F", "BTD,DF->BTFX", "BTD,DF->TF", "BTD->BTD", "BD,DF->BF"]
)
def test_rejects(spec):
    x, w, _ = _operands("BTD,DF->BTF")
    with pytest.raises(ValueError, match=re.escape(repr(spec))):
        einsum(spec, x, w, dtype=jnp.float32)
