"""The grouped product against a loop over experts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from oracles import mixture
from oracles.compiler import needs_compiler

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import ragged
from mixtral_jax.model.backends.ragged import grouped_product, grouped_swiglu, grouped_weight_gradient
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.topology import topology

ROWS, DIM, HIDDEN, EXPERTS = 12, 5, 7, 4
SIZES = ([3, 3, 3, 3], [0, 5, 0, 7], [12, 0, 0, 0], [2, 0, 4, 1], [0, 0, 0, 0])


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _parts(sizes):
    """Each expert and its rows."""
    ends = np.cumsum(sizes)
    return [(expert, slice(end - size, end)) for expert, (end, size) in enumerate(zip(ends, sizes, strict=True))]


def _exact(x, w, dy, sizes):
    """The result and the gradients of x and w; zeros in rows beyond the last expert's, which mean nothing."""
    exact = [np.zeros(a.shape) for a in (dy, x, w)]
    for expert, rows in _parts(sizes):
        exact[0][rows] = np.float64(x[rows]) @ np.float64(w[expert])
        exact[1][rows] = np.float64(dy[rows]) @ np.float64(w[expert]).T
        exact[2][expert] = np.float64(x[rows]).T @ np.float64(dy[rows])
    return exact


def _check(actual, exact, sizes, tolerance):
    rows = sum(sizes)
    actual = actual[0][:rows], actual[1][:rows], actual[2]
    for ours, expected in zip(actual, (exact[0][:rows], exact[1][:rows], exact[2]), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, atol=tolerance * max(1, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_values_and_gradients(sizes, dtype, tolerance):
    x, w, dy = _normal(ROWS, DIM), _normal(EXPERTS, DIM, HIDDEN, seed=1), _normal(ROWS, HIDDEN, seed=2)
    y, vjp = jax.vjp(lambda x, w: grouped_product(x, w, jnp.array(sizes), dtype), x, w)
    _check((y, *vjp(dy)), _exact(x, w, dy, sizes), sizes, tolerance)


@pytest.mark.parametrize("sizes", [[300, 0, 5, 600], [1, 511, 257, 100]], ids=str)
def test_experts_with_several_blocks_of_rows(sizes):
    x, w, dy = _normal(1000, DIM), _normal(EXPERTS, DIM, HIDDEN, seed=1), _normal(1000, HIDDEN, seed=2)
    y, vjp = jax.vjp(lambda x, w: grouped_product(x, w, jnp.array(sizes), "float32"), x, w)
    _check((y, *vjp(dy)), _exact(x, w, dy, sizes), sizes, 2e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_form_for_other_platforms(sizes):
    """XLA's own grouped product, which CPU can run but does not choose."""
    x, w, dy = _normal(ROWS, DIM), _normal(EXPERTS, DIM, HIDDEN, seed=1), _normal(ROWS, HIDDEN, seed=2)
    counts = jnp.array(sizes)
    y = ragged._ragged_dot(x, w, counts, "float32")
    d_x = ragged._ragged_dot(dy, jnp.swapaxes(w, 1, 2), counts, "float32")
    d_w = ragged._ragged_weight_gradient(x, dy, counts)
    _check((y, d_x, d_w), _exact(x, w, dy, sizes), sizes, 1e-6)


def test_an_expert_without_rows_has_exactly_no_gradient():
    x, w = _normal(ROWS, DIM), _normal(EXPERTS, DIM, HIDDEN, seed=1)
    gradient = jax.grad(lambda w: jnp.sum(grouped_product(x, w, jnp.array([5, 0, 7, 0]), "float32") ** 2))(w)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_array_equal(gradient[3], 0)
    assert np.all(gradient[0] != 0)


@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_swiglu(sizes):
    x = _normal(ROWS, DIM)
    shapes = ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    weights = SwiGLU(*(_normal(EXPERTS, *shape, seed=seed) for seed, shape in enumerate(shapes, 1)))
    expected = np.zeros(x.shape)
    for expert, rows in _parts(sizes):
        expected[rows] = mixture.feed_forward(np.float64(x[rows]), *(np.float64(each[expert]) for each in weights))
    y_MD = grouped_swiglu(x, weights, jnp.array(sizes), Execution())
    np.testing.assert_allclose(y_MD[: sum(sizes)], expected[: sum(sizes)], atol=2e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_float32_is_float32_where_units_would_round_it(platform):
    x, w, dy = _normal(ROWS, DIM), _normal(EXPERTS, DIM, HIDDEN, seed=1), _normal(ROWS, HIDDEN, seed=2)

    def step(x, w):
        y, vjp = jax.vjp(lambda x, w: grouped_product(x, w, jnp.array(SIZES[0]), "float32"), x, w)
        return y, vjp(dy)

    products = [
        line
        for line in jax.jit(step).trace(x, w).lower(lowering_platforms=(platform,)).as_text().splitlines()
        if "ragged_dot" in line or "dot_general" in line
    ]
    assert len(products) >= 3
    assert all("HIGHEST" in line for line in products)


@needs_compiler
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2"])
def test_a_loop_over_an_experts_rows_compiles_for_tpu(name):
    """As in the backward pass of a dropless step: one expert at a time, so many of its rows at a time."""
    rows, block, dim, hidden = 1024, 256, 256, 512

    def gradient(x_MD, dy_MF, size):
        def add(i, sum_EDF):
            x_RD, dy_RF = (jax.lax.dynamic_slice_in_dim(each, i * block, block) for each in (x_MD, dy_MF))
            return sum_EDF + grouped_weight_gradient(x_RD, dy_RF, (size - i * block)[None])

        return jax.lax.fori_loop(0, -(-size // block), add, jnp.zeros((1, dim, hidden)))

    there = SingleDeviceSharding(devices(topology(name))[0])
    inputs = ((rows, dim), jnp.bfloat16), ((rows, hidden), jnp.bfloat16), ((), jnp.int32)
    lowered = jax.jit(gradient).lower(*(jax.ShapeDtypeStruct(*each, sharding=there) for each in inputs))
    compiled = compile_ahead(lowered)
    # All rows are multiplied once, and no expert's twice: the loop's body counts as one round.
    assert compiled.cost_analysis()["flops"] < 1.1 * 2 * block * dim * hidden


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_products(self):
        x, sizes = jnp.ones((ROWS, DIM)), jnp.array(SIZES[0])
        enter, leave = jnp.ones((EXPERTS, DIM, HIDDEN)), jnp.ones((EXPERTS, HIDDEN, DIM))
        y = self.variant(lambda *inputs: grouped_product(*inputs, "bfloat16"))(x, enter, sizes)
        chex.assert_shape(y, (ROWS, HIDDEN))
        chex.assert_type(y, jnp.float32)
        execution = Execution(activation_dtype="bfloat16")
        z = self.variant(lambda *inputs: grouped_swiglu(*inputs, execution))(x, SwiGLU(enter, enter, leave), sizes)
        chex.assert_shape(z, (ROWS, DIM))
        chex.assert_type(z, jnp.bfloat16)


@pytest.mark.parametrize("old", [False, True])
def test_an_old_gpu_has_no_kernels(monkeypatch, old):
    monkeypatch.setattr(ragged, "computes_on_old_gpu", lambda: old)
    x_MD, w_EDF, sizes_E = jnp.ones((256, 128)), jnp.ones((2, 128, 256)), jnp.array([100, 156])
    program = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(grouped_product(x, w, sizes_E, "bfloat16")), (0, 1)))
    assert str(program(x_MD, w_EDF)).count("pallas_call[") == (0 if old else 3)
