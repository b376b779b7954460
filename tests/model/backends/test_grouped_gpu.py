"""The GPU's kernels, step by step on this machine, against float64; and which programs have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends import grouped_gpu
from mixtral_jax.model.backends.ragged import grouped_product, transposed_product

ROWS, DIM, HIDDEN, EXPERTS = 600, 128, 256, 4
SIZES = ([150, 150, 150, 150], [300, 0, 5, 295], [1, 130, 0, 300], [600, 0, 0, 0], [0, 0, 0, 600], [0, 0, 0, 0])


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def _parts(sizes):
    """Each expert and its rows."""
    ends = np.cumsum(sizes)
    return [(expert, slice(end - size, end)) for expert, (end, size) in enumerate(zip(ends, sizes, strict=True))]


def _rows(width, sizes, seed=0):
    """Rows of which those that are no expert's are no numbers."""
    return _normal(ROWS, width, seed=seed).at[sum(sizes) :].set(jnp.nan)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes, transposed):
    x, w = _rows(DIM, sizes), _normal(EXPERTS, DIM, HIDDEN, seed=1)
    given = jnp.swapaxes(w, 1, 2) if transposed else w
    y = grouped_gpu.product(x, given, jnp.asarray(sizes), transposed, interpret=True)
    for expert, rows in _parts(sizes):
        np.testing.assert_allclose(y[rows], np.float64(x[rows]) @ np.float64(w[expert]), atol=1e-3)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weight_gradients(sizes):
    x, dy = _rows(DIM, sizes), _rows(HIDDEN, sizes, seed=2)
    gradient = grouped_gpu.weight_gradient(x, dy, jnp.asarray(sizes), interpret=True)
    for expert, rows in _parts(sizes):
        np.testing.assert_allclose(gradient[expert], np.float64(x[rows]).T @ np.float64(dy[rows]), atol=1e-3)


def test_sizes_beyond_the_rows_reach_no_further():
    x, dy, w = _normal(ROWS, DIM), _normal(ROWS, HIDDEN, seed=2), _normal(1, DIM, HIDDEN, seed=1)
    sizes = jnp.asarray([ROWS + 300])
    _, row, end = grouped_gpu.tiles(sizes, 16, ROWS)
    assert (row <= ROWS).all()
    assert (end <= ROWS).all()
    y = grouped_gpu.product(x, w, sizes, interpret=True)
    np.testing.assert_allclose(y, np.float64(x) @ np.float64(w[0]), atol=1e-3)
    gradient = grouped_gpu.weight_gradient(x, dy, sizes, interpret=True)
    np.testing.assert_allclose(gradient[0], np.float64(x).T @ np.float64(dy), atol=1e-3)


def test_each_tile_of_a_result_is_computed_once():
    for down, across in ((8, 3), (16, 2)):
        places = [grouped_gpu.tile_of(program, 8, across) for program in range(down * across)]
        assert sorted(places) == [(tile, column) for tile in range(down) for column in range(across)]


@pytest.mark.parametrize(
    ("dtype", "widths", "taken"),
    [("bfloat16", (128, 256), True), ("float32", (128, 256), False), ("bfloat16", (128, 192), False)],
    ids=["all is well", "dtype", "width"],
)
def test_what_it_takes(dtype, widths, taken):
    assert grouped_gpu.suits(dtype, *widths) is taken


def test_programs_for_gpu_have_them_and_no_product_with_every_expert():
    x, w, sizes = _normal(ROWS, DIM), _normal(EXPERTS, DIM, HIDDEN), jnp.asarray(SIZES[0])

    def step(x, w):
        y, vjp = jax.vjp(lambda x, w: grouped_product(x, w, sizes, "bfloat16"), x, w)
        return vjp(y), transposed_product(y, w, sizes, "bfloat16")

    text = jax.jit(step).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("grouped_product", "grouped_weight_gradient"):
        assert name in text
    assert "stablehlo.dot_general" not in text
    assert "chlo.ragged_dot" not in text
