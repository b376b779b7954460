"""The mixture with a backward pass of its own, against the one that is left to autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import Dispatch, Execution
from mixtral_jax.model import dispatch as moves
from mixtral_jax.model.experts import Places, Rows, differentiable_mixture, mixture
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.sharding.rules import TRAINING

TOKENS, CHOICES, EXPERTS, DIM, HIDDEN = 24, 2, 4, 8, 12
FLOAT32 = Execution()
TIGHT = Dispatch(capacity_factor=0.75)


def _inputs(seed=0, experts=None):
    rng = np.random.default_rng(seed)
    x, gate = rng.standard_normal((TOKENS, DIM)), rng.uniform(0.1, 1, (TOKENS, CHOICES))
    shapes = (EXPERTS, DIM, HIDDEN), (EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN, DIM)
    weights = SwiGLU(*(jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32) for shape in shapes))
    if experts is None:
        experts = np.argsort(rng.standard_normal((TOKENS, EXPERTS)), axis=1)[:, :CHOICES]
    real = np.arange(TOKENS) % 5 != 3
    return jnp.asarray(x, jnp.float32), jnp.asarray(gate, jnp.float32), weights, jnp.asarray(experts), jnp.asarray(real)


def _form(name, experts, real, execution, rows=5):
    if name == "places":
        slots = moves.capacity_slots(experts[None], real[None], EXPERTS, TIGHT)
        return Places(execution, TRAINING, EXPERTS, shards=1), slots, None
    return Rows(execution, TRAINING, rows), *moves.sorted_slots(experts, real, EXPERTS)


def _value_and_gradients(function, x, gate, weights, form, slots, sizes_E):
    def loss(x, gate, weights):
        y = function(form, x, gate, weights, slots, sizes_E)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, gate, weights)
    return y, *gradients


@pytest.mark.parametrize("name", ["places", "rows"])
@pytest.mark.parametrize("rows", [1, 5, 48])
def test_equals_autodiff(name, rows):
    """Rows that are served one, five or all at a time."""
    x, gate, weights, experts, real = _inputs()
    given = x, gate, weights, *_form(name, experts, real, FLOAT32, rows)
    actual, expected = (_value_and_gradients(function, *given) for function in (mixture, differentiable_mixture))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), actual, expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(actual))


@pytest.mark.parametrize("name", ["places", "rows"])
def test_an_expert_without_tokens_has_exactly_no_gradient(name):
    x, gate, weights, experts, real = _inputs(experts=np.tile([0, 2], (TOKENS, 1)))
    *_, gradient = _value_and_gradients(mixture, x, gate, weights, *_form(name, experts, real, FLOAT32))
    for leaf in gradient:
        assert not np.any(leaf[jnp.array([1, 3])])
        assert np.any(leaf[0])
        assert np.any(leaf[2])


@pytest.mark.parametrize("name", ["places", "rows"])
def test_bfloat16_is_close(name):
    x, gate, weights, experts, real = _inputs()
    execution = Execution(activation_dtype="bfloat16", product_dtype="bfloat16")
    exact = _value_and_gradients(mixture, x, gate, weights, *_form(name, experts, real, FLOAT32))
    close = _value_and_gradients(mixture, x.astype("bfloat16"), gate, weights, *_form(name, experts, real, execution))

    def check(close, exact):
        assert 1e-4 < np.linalg.norm(close - exact) / np.linalg.norm(exact) < 2e-2

    jax.tree.map(check, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), close), exact)


@pytest.mark.parametrize("name", ["places", "rows"])
def test_nothing_between_the_products_is_kept(name):
    """The backward pass starts from the inputs alone: no residual has the hidden width but the weights."""
    x, gate, weights, experts, real = _inputs()
    form, slots, sizes_E = _form(name, experts, real, FLOAT32)
    _, vjp = jax.vjp(lambda x, gate, weights: mixture(form, x, gate, weights, slots, sizes_E), x, gate, weights)
    kept = [leaf.shape for leaf in jax.tree.leaves(vjp) if HIDDEN in leaf.shape]
    assert sorted(kept) == sorted(leaf.shape for leaf in weights)
