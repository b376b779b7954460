"""What the backward pass is given, and that its gradients are autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.model.recompute import recomputed


def _through(x, y, keys):
    return jnp.exp(jnp.sin(x) * y) + jnp.where(keys["seen"], keys["offset"] * x, 0)


def _arguments():
    x, y = np.random.default_rng(0).standard_normal((2, 4, 8), np.float32)
    return jnp.asarray(x), jnp.asarray(y), {"seen": jnp.arange(8)[None] > 2, "offset": 3}


def _vjp(function):
    x, y, keys = _arguments()
    return jax.vjp(lambda x, y: function(x, y, keys), x, y)


def test_value_and_gradients():
    (ours, back), (expected, autodiff) = _vjp(recomputed(_through)), _vjp(_through)
    np.testing.assert_array_equal(ours, expected)
    for one, other in zip(back(expected), autodiff(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_arguments_alone_are_kept():
    def kept(function):
        return [leaf for leaf in jax.tree.leaves(_vjp(function)[1]) if leaf.shape == (4, 8)]

    assert len(kept(recomputed(_through))) == 2 < len(kept(_through))


def test_a_policy_around_it_changes_nothing():
    def kept(function):
        saveable = jax.checkpoint(function, policy=jax.checkpoint_policies.everything_saveable)
        return [leaf for leaf in jax.tree.leaves(_vjp(saveable)[1]) if leaf.shape == (4, 8)]

    assert len(kept(recomputed(_through))) == 2 < len(kept(_through))
