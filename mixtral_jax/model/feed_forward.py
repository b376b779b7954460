"""The SwiGLU feed-forward (Shazeer, 2020): down(silu(gate x) * up x)."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import linen as nn

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.model.backends.products import einsum, einsums
from mixtral_jax.model.parameters import weight
from mixtral_jax.model.recompute import recomputed
from mixtral_jax.sharding.rules import Rules


class SwiGLU(NamedTuple):
    """The three weights; [D, F], [D, F] and [F, D], or with experts [E, ...] in front."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def swiglu(x: jax.Array, weights: SwiGLU, execution: Execution) -> jax.Array:
    """The feed-forward of x [B, T, D], or of each expert's slots x [E, C, D]; in the activation dtype."""
    enter, leave = ("ECD,EDF->ECF", "ECF,EFD->ECD") if weights.gate.ndim == 3 else ("BTD,DF->BTF", "BTF,FD->BTD")
    x = x.astype(execution.product_dtype)
    dtypes = {"dtype": execution.product_dtype, "result_dtype": execution.activation_dtype}
    gate, up = einsums(enter, x, (weights.gate, weights.up), **dtypes)
    return einsum(leave, _gated(gate, up), weights.down, **dtypes)


@recomputed
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Left to autodiff, six arrays of this width would be kept for the backward pass, where three are."""
    return jax.nn.silu(gate) * up


class FeedForward(nn.Module):
    """A dense model's feed-forward."""

    config: ModelConfig
    execution: Execution
    rules: Rules

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dim, hidden = self.config.dim, self.config.hidden_dim
        dtype = self.execution.product_dtype
        weights = SwiGLU(
            gate=weight(self, "gate", (dim, hidden), ("embed", "hidden"), self.rules, dtype),
            up=weight(self, "up", (dim, hidden), ("embed", "hidden"), self.rules, dtype),
            down=weight(self, "down", (hidden, dim), ("hidden", "embed"), self.rules, dtype),
        )
        return swiglu(x_BTD, weights, self.execution)
