"""Cross-entropy in chunks against float64 and against torch, and the auxiliary losses' coefficients."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from mixtral_jax.config import build
from mixtral_jax.errors import InputError
from mixtral_jax.model.routing import Statistics
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.losses import LossConfig, auxiliary, batch_cross_entropy, chunks_of, cross_entropy

BATCH, LENGTH, DIM, VOCAB = 3, 10, 8, 20


def _inputs():
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.standard_normal((BATCH, LENGTH, DIM)), rng.standard_normal((DIM, VOCAB))
    target = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    weight = rng.choice([0.0, 1.0, 2.0], (BATCH, LENGTH))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(unembedding, jnp.float32), target, jnp.asarray(weight)


def _exact(hidden_BTD, unembedding_DV, target_BT, weight_BT):
    logits = np.float64(hidden_BTD) @ np.float64(unembedding_DV)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(np.take_along_axis(log_probability, target_BT[..., None], -1)[..., 0] * weight_BT).sum()


def test_by_hand():
    """Logits log(1, 2, 5): the second has probability 2/8, so twice its loss is 2 log 4."""
    loss = cross_entropy(
        jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0, 2, 5]])), jnp.array([[1]]), jnp.array([[2.0]]), 4, "float32"
    )
    np.testing.assert_allclose(loss, 2 * np.log(4), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3 * BATCH, LENGTH * BATCH, 1000])
def test_equals_torch(chunk):
    """Value and gradients, times a cotangent; chunks that divide the length and that don't."""
    torch = pytest.importorskip("torch")
    hidden, unembedding, target, weight = _inputs()
    theirs = [
        torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in (hidden, unembedding, weight)
    ]
    logits = (theirs[0] @ theirs[1]).reshape(-1, VOCAB)
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(target).long().ravel(), reduction="none")
    total = (each * theirs[2].ravel()).sum()
    (0.7 * total).backward()

    def ours(hidden, unembedding, weight):
        return 0.7 * cross_entropy(hidden, unembedding, target, weight, chunk, "float32")

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(hidden, unembedding, weight)
    np.testing.assert_allclose(value, 0.7 * total.item(), rtol=1e-6)
    for actual, tensor in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(actual, tensor.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("chunk", [3 * BATCH, 1000])
def test_value_without_a_gradient(chunk):
    loss = cross_entropy(*_inputs(), chunk, "float32")
    np.testing.assert_allclose(loss, _exact(*_inputs()), rtol=1e-6)


def test_a_token_of_weight_zero_counts_for_nothing():
    hidden, unembedding, target, weight = _inputs()
    other = np.where(weight == 0, (target + 1) % VOCAB, target)
    gradient = jax.jit(jax.value_and_grad(lambda h, t: cross_entropy(h, unembedding, t, weight, 4, "float32")))
    chex.assert_trees_all_equal(gradient(hidden, target), gradient(hidden, other))
    np.testing.assert_array_equal(gradient(hidden, target)[1][weight == 0], 0)


def test_huge_logits_do_not_overflow():
    hidden, unembedding, target, weight = _inputs()
    loss, gradient = jax.value_and_grad(cross_entropy)(1e4 * hidden, unembedding, target, weight, 4, "float32")
    chex.assert_tree_all_finite((loss, gradient))


def test_bfloat16_is_close():
    hidden, unembedding, target, weight = _inputs()
    run = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)), static_argnums=(4, 5))
    (loss, gradients), (close, close_gradients) = (
        run(hidden, unembedding, target, weight, 4, dtype) for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(close, loss, rtol=1e-2)
    for actual, expected in zip(close_gradients, gradients, strict=True):
        assert 1e-4 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 2e-2


def test_chunks_by_hand():
    """Rows, tokens of each and of a chunk; then how many chunks, and how many tokens of a row each."""
    assert chunks_of(1, 10, 4) == (3, 4)
    assert chunks_of(2, 10, 16) == (2, 5)  # rather than 8 and 2
    assert chunks_of(3, 10, 1000) == (1, 10)
    assert chunks_of(8, 10, 4) == (10, 1)


def test_memory_is_a_chunks():
    """Logits of 1024 tokens and 4096 words are 16 MiB, those of a chunk of 64 tokens 1, the weights' gradient 0.25."""
    hidden, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1024, 16), (1, 1024)))
    unembedding, target = jax.ShapeDtypeStruct((16, 4096), jnp.float32), jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    gradient = jax.jit(jax.grad(lambda *inputs: cross_entropy(*inputs, 64, "float32"), (0, 1)))
    compiled = gradient.lower(hidden, unembedding, target, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 2**20


def test_auxiliary_is_the_mean_over_layers_and_tokens():
    sums = Statistics(*(jnp.zeros(3) for _ in Statistics._fields))
    sums = sums._replace(balance_loss=jnp.array([1.0, 2.0, 6.0]), z_loss=jnp.array([0.0, 1.0, 2.0]))
    balance, z = auxiliary(sums, jnp.array(10.0))
    np.testing.assert_allclose([balance, z], [0.3, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"balance": -0.1}, "balance = -0.1: zero or more"),
        ({"z": -1}, "z = -1.0: zero or more"),
        ({"chunk": 0}, "chunk = 0: a number of tokens above zero"),
        ({"balanse": 1.0}, "balanse = 1.0: unknown key; did you mean 'balance'?"),
    ],
)
def test_refuses(table, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build(LossConfig, table)


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("float32", "bfloat16")
    def test_cross_entropy(self, dtype):
        hidden, unembedding, target, weight = _inputs()
        inputs = hidden.astype(dtype), unembedding, target, weight
        loss = self.variant(lambda *inputs: cross_entropy(*inputs, 4, dtype))(*inputs)
        on_shards = {"chunk": 4, "product_dtype": dtype, "rules": TRAINING}
        same = self.variant(lambda *inputs: batch_cross_entropy(*inputs, **on_shards))(*inputs)
        chex.assert_shape([loss, same], ())
        chex.assert_type([loss, same], jnp.float32)
        np.testing.assert_allclose(loss, same, rtol=1e-6)
