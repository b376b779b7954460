"""Attention over a sequence that is split over eight devices, against one device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mixtral_jax.config import Execution
from mixtral_jax.model import context_parallel
from mixtral_jax.model.backends import chunked
from mixtral_jax.model.context_parallel import attention, halo_pieces
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.rules import TRAINING

SHARDS, LENGTH = 8, 64
OWN = LENGTH // SHARDS
HEADS = (2, 2, 8)  # K, G, H
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
"""Of collectives."""


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, context=SHARDS))


def _inputs(length=LENGTH, batch=2):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, *HEADS))
    k, v = rng.standard_normal((2, batch, length, HEADS[0], HEADS[2]))
    return [jnp.asarray(each, jnp.float32) for each in (q, k, v)]


def _segments():
    """Documents that begin and end within shards and across them; padding at the end of one row."""
    segment = np.ones((2, LENGTH), np.int32)
    segment[:, 20:] = 2
    segment[0, 37:] = 3
    segment[1, 50:] = 0
    return jnp.asarray(segment)


def _value_and_gradients(window, segment, chunk, q, k, v, kernel="xla"):
    execution = Execution(attention_chunk=chunk, attention=kernel)
    y, vjp = jax.vjp(lambda *qkv: attention(*qkv, segment, window, execution, TRAINING), q, k, v)
    return y, *vjp(jnp.sin(y))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [1, 2, OWN, OWN + 1, OWN + 2, 2 * OWN + 1, 60, LENGTH, 100, None])
def test_equals_one_device(mesh, window, packed):
    segment, chunk = _segments() if packed else None, 3 if window == OWN else 128
    run = jax.jit(partial(_value_and_gradients, window, segment, chunk))
    expected = run(*_inputs())
    with jax.set_mesh(mesh):
        actual = jax.jit(partial(_value_and_gradients, window, segment, chunk))(*_inputs())
    for ours, plain in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize("window", [9, None])
@pytest.mark.parametrize("sizes", [{"context": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_shards_that_take_their_keys_by_blocks(monkeypatch, sizes, window):
    """Each as many as it sees, so that nothing may be sent within that loop: some would wait for ever."""
    monkeypatch.setattr(chunked, "KEYS_AT_ONCE", 4)
    monkeypatch.setattr(chunked, "FEWEST_BLOCKS", 1)
    monkeypatch.setattr(chunked, "FEWEST_QUERIES", 2)
    inputs = _inputs(34 * sizes.get("context", 1), batch=sizes.get("fsdp", 1))
    run = partial(_value_and_gradients, window, None, 2)
    expected = jax.jit(run)(*inputs)
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    layout = NamedSharding(mesh, TRAINING.use(("batch", "length", "kv_heads")))
    with jax.set_mesh(mesh):
        inputs = jax.device_put(inputs, layout)
        program = jax.jit(run).lower(*inputs).compile()
        actual = program(*inputs)
    for ours, plain in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)
    text = program.as_text()
    bodies = [
        re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
        for name in re.findall(r"body=%?([\w.-]+)", text)
    ]
    assert any(" while(" in body for body in bodies)  # of chunks, and in it of blocks
    assert not any(re.search(KINDS, body) for body in bodies)


def _collectives(mesh, window, length):
    """The kind, and elements, of each collective of forward and backward pass."""
    layout = NamedSharding(mesh, TRAINING.use(("batch", "length")))
    with jax.set_mesh(mesh):
        given = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for x in _inputs(length, batch=1))
        program = jax.jit(partial(_value_and_gradients, window, None, 16)).lower(*given).compile().as_text()
    found = re.findall(rf"= \w+\[([\d,]+)\]\S* ({KINDS})(?:-start)?\(", program)
    return [(kind, int(np.prod([int(size) for size in shape.split(",")]))) for shape, kind in found]


def test_what_is_sent_does_not_grow_with_the_length(mesh):
    window = 9
    short, long = (_collectives(mesh, window, length) for length in (LENGTH, 4 * LENGTH))
    assert {kind for kind, _ in short} == {"collective-permute"}
    assert short == long
    # Keys and values there, and their gradients back: W - 1 tokens each.
    assert sum(size for _, size in short) == 4 * (window - 1) * HEADS[0] * HEADS[2]
    assert {kind for kind, _ in _collectives(mesh, None, LENGTH)} >= {"all-gather"}


def test_at_32k_tokens_too(mesh):
    """Eight shards of 4,096 tokens, W = 1,024."""
    window, length = 1024, 32768
    assert _collectives(mesh, window, length) == _collectives(mesh, window, length // 2)
    q, k, v = (x[:, :, :1] for x in _inputs(length, batch=1))
    run = partial(_value_and_gradients, window, None, 512)
    expected = jax.jit(run)(q, k, v)
    with jax.set_mesh(mesh):
        actual = jax.jit(run)(q, k, v)
    for ours, plain in zip(actual, expected, strict=True):
        assert np.linalg.norm(ours - plain) < 1e-5 * np.linalg.norm(plain)


@pytest.mark.parametrize(
    ("halo", "length", "pieces"),
    [(6, 4, [(2, 2), (1, 4)]), (4, 4, [(1, 4)]), (1, 4, [(1, 1)]), (0, 4, []), (99, 4, [(3, 4), (2, 4), (1, 4)])],
)
def test_halo_pieces(halo, length, pieces):
    assert halo_pieces(halo, length, num_shards=4) == pieces


@pytest.mark.parametrize("old", [False, True])
def test_an_old_gpu_has_no_kernels(monkeypatch, old):
    monkeypatch.setattr(context_parallel, "computes_on_old_gpu", lambda: old)
    q_BTKGH, k_BTKH = jnp.ones((1, 256, 1, 2, 128)), jnp.ones((1, 256, 1, 128))
    execution = Execution(product_dtype="bfloat16")
    program = jax.make_jaxpr(lambda q, k: attention(q, k, k, None, 64, execution, TRAINING))
    assert str(program(q_BTKGH, k_BTKH)).count("pallas_call[") == (0 if old else 2)
