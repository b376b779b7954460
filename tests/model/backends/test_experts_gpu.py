"""The GPU's kernel for experts of inference, step by step on this machine, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import by_need as anywhere
from mixtral_jax.model.backends import experts_gpu
from mixtral_jax.model.backends.grouped_gpu import Tiles, tiles
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.partition import over_parts

EXPERTS, DIM, HIDDEN = 4, 64, 256
EXECUTION = Execution(product_dtype="bfloat16")
by_need = jax.jit(partial(experts_gpu.by_need, execution=EXECUTION, interpret=True))


def _experts(form="bfloat16", count=EXPERTS):
    """Stacked, and dequantised in float64."""
    rng = np.random.default_rng(0)

    def matrix(*shape):
        numbers = jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32)
        if form == "bfloat16":
            return numbers.astype(jnp.bfloat16)
        scale = jnp.max(jnp.abs(numbers), axis=1, keepdims=True) / (127 if form == "int8" else 448)
        values = numbers / scale
        return Quantized(
            jnp.rint(values).astype(jnp.int8) if form == "int8" else values.astype(jnp.float8_e4m3fn), scale
        )

    stack = SwiGLU(*(matrix(count, *shape) for shape in ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))))
    exact = [np.float64(w.dequantized() if isinstance(w, Quantized) else w) for w in stack]
    return stack, exact


def _choices(tokens, experts=EXPERTS):
    rng = np.random.default_rng(1)
    x = np.float32(jnp.asarray(rng.standard_normal((tokens, DIM)), jnp.bfloat16))
    expert = np.array([rng.permutation(experts)[:2] for _ in range(tokens)], np.int32)
    return x, expert, rng.dirichlet([1, 1], tokens).astype(np.float32), rng.random(tokens) > 0.2


def _dense(x, expert, gate, mask, exact):
    y = np.zeros(x.shape)
    for n in np.flatnonzero(mask):
        for a, g in zip(expert[n], gate[n], strict=True):
            enter = x[n] @ exact[0][a]
            y[n] += g * ((enter / (1 + np.exp(-enter)) * (x[n] @ exact[1][a])) @ exact[2][a])
    return y


def _check(given, stack, exact):
    """What lies between the products is rounded to bfloat16."""
    expected = _dense(*given, exact)
    np.testing.assert_allclose(by_need(*given, stack), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("programs", [1, 512], ids=["whole", "in parts"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40, 300])
def test_equals_the_dense_form(monkeypatch, tokens, programs):
    """Four steps along the hidden width, and one along the other."""
    monkeypatch.setattr(experts_gpu, "_PROGRAMS", programs)
    by_need.clear_cache()
    _check(_choices(tokens), *_experts())


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_a_stack_where_there_is_no_kernel(tokens):
    """As on this machine."""
    given, (stack, exact) = _choices(tokens), _experts()
    expected = _dense(*given, exact)
    y = jax.jit(partial(anywhere.by_need, execution=EXECUTION))(*given, stack)
    np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_eight_bits(tokens, form):
    """As exact as the matrices are in these bits."""
    _check(_choices(tokens), *_experts(form))


@pytest.mark.parametrize(("programs", "parts"), [(1, 1), (8, 2), (16, 4)])
@pytest.mark.parametrize("backwards", [False, True])
def test_products_of_tiles_in_any_order(monkeypatch, backwards, programs, parts):
    """Two tiles of the first expert, none of the second, two of the third; eight steps, which programs share. A tile
    writes no rows of the next one's expert, which may have been written before."""
    monkeypatch.setattr(experts_gpu, "_PROGRAMS", programs)
    assert experts_gpu._parts(4, 8) == parts
    rng, sizes = np.random.default_rng(0), [20, 0, 25]
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((45, 512), (3, 512, 64)))
    where = tiles(jnp.asarray(sizes), 4, 45, 16)
    where = Tiles(*(each[::-1] for each in where)) if backwards else where
    y = experts_gpu.product(x, w, where, 16, "float32", interpret=True)
    expert = np.repeat([0, 2], [20, 25])
    np.testing.assert_allclose(y, np.einsum("md,mdf->mf", np.float64(x), np.float64(w)[expert]), atol=1e-3)


def test_more_tiles_than_programs_take_together():
    """Ten, an expert's each, and two more experts without."""
    x, expert, gate, _ = _choices(5, experts=12)
    expert[:] = np.random.default_rng(2).permutation(12)[:10].reshape(5, 2)
    _check((x, expert, gate, np.full(5, True)), *_experts(count=12))


def test_a_token_that_is_not_real():
    x, expert, gate, _ = _choices(1)
    y = by_need(x, expert, gate, np.array([False]), _experts()[0])
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("tokens", [20, 300])
def test_all_choose_the_same_experts(tokens):
    """More rows than a tile has, and none for the others."""
    x, expert, gate, mask = _choices(tokens)
    expert[:] = [2, 0]
    _check((x, expert, gate, mask), *_experts())


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_an_expert_that_no_real_token_chose_is_not_read(tokens):
    """Its weights are NaN, and so would be whatever had touched them."""
    x, expert, gate, mask = _choices(tokens)
    mask[(expert == 3).any(axis=1)] = False
    stack, exact = _experts()
    _check((x, expert, gate, mask), jax.tree.map(lambda w: w.at[3].set(jnp.nan), stack), exact)


def test_the_hidden_width_over_devices():
    """Each of two has two steps of it."""
    given, (stack, exact) = _choices(8), _experts()
    layouts = SwiGLU(*[PartitionSpec(None, None, ("tensor",))] * 2, PartitionSpec(None, ("tensor",)))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])):
        y = jax.jit(over_parts(by_need, layouts, ("tensor",)))(*given, stack)
    expected = _dense(*given, exact)
    np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


def test_every_number_of_fp8():
    bits = jnp.arange(256, dtype=jnp.uint8)
    numbers = np.float32(jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn))
    is_number = ~np.isnan(numbers)
    assert is_number.sum() == 254
    np.testing.assert_array_equal(np.float32(experts_gpu._numbers(bits, jnp.bfloat16))[is_number], numbers[is_number])


@pytest.mark.parametrize(
    ("dtype", "held", "widths", "taken"),
    [
        ("bfloat16", "bfloat16", (64, 192), True),
        ("bfloat16", "int8", (64, 192), True),
        ("bfloat16", "fp8", (64, 192), True),
        ("bfloat16", "int4", (64, 192), False),
        ("float32", "float32", (64, 192), False),
        ("bfloat16", "float32", (64, 192), False),
        ("bfloat16", "bfloat16", (64, 96), False),
        ("bfloat16", "int8", (1 << 14, 1 << 14), False),
    ],
)
def test_what_it_takes(dtype, held, widths, taken):
    assert experts_gpu.suits(dtype, held, 8, widths) is taken


def test_programs_for_gpu_have_it_and_no_branches():
    """Nor loops: the GPU would wait for the host."""
    for tokens in (1, 8, 300):
        stack, _ = _experts()
        form = partial(experts_gpu.by_need, execution=EXECUTION)
        text = jax.jit(form).trace(*_choices(tokens), stack).lower(lowering_platforms=("cuda",)).as_text()
        assert "chosen_experts" in text
        assert not any(f"stablehlo.{each}" in text for each in ("case", "if", "while", "dot_general"))
