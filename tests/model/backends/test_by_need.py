"""Experts by need: the dense oracle's function, and no expert read that nobody chose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import Execution
from mixtral_jax.model.backends.by_need import by_need
from mixtral_jax.model.feed_forward import SwiGLU

EXPERTS, DIM, HIDDEN = 4, 8, 12


def _experts(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    return tuple(SwiGLU(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)) for _ in range(EXPERTS))


def _dense(x, expert, gate, mask, experts):
    y = np.zeros(x.shape)
    for n in np.flatnonzero(mask):
        for a, g in zip(expert[n], gate[n], strict=True):
            w = [np.asarray(each, np.float64) for each in experts[a]]
            enter = x[n] @ w[0]
            y[n] += g * ((enter / (1 + np.exp(-enter)) * (x[n] @ w[1])) @ w[2])
    return y


def _choices(tokens, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, DIM)).astype(np.float32)
    expert = np.array([rng.permutation(EXPERTS)[:2] for _ in range(tokens)], np.int32)
    gate = rng.dirichlet([1, 1], tokens).astype(np.float32)
    return x, expert, gate, rng.random(tokens) > 0.2


@pytest.mark.parametrize("tokens", [1, 8, 32, 33, 700])
def test_equals_the_dense_form(tokens):
    x, expert, gate, mask = _choices(tokens)
    y = jax.jit(by_need, static_argnums=5)(x, expert, gate, mask, _experts(), Execution())
    np.testing.assert_allclose(y, _dense(x, expert, gate, mask, _experts()), atol=2e-4)


@pytest.mark.parametrize("tokens", [8, 300])
def test_an_expert_that_no_real_token_chose_is_not_read(tokens):
    """Its weights are NaN, and so would be whatever had touched them."""
    x, expert, gate, mask = _choices(tokens)
    mask[(expert == 3).any(axis=1)] = False
    experts = _experts()
    poisoned = (*experts[:3], jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), experts[3]))
    y = jax.jit(by_need, static_argnums=5)(x, expert, gate, mask, poisoned, Execution())
    np.testing.assert_allclose(y, _dense(x, expert, gate, mask, experts), atol=2e-4)
