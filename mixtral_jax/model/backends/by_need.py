"""Experts for inference: each expert's weights are arrays of their own, and only those that some token chose are read.

Few tokens go through each chosen expert together, all of them: the weights are what costs. Many are sorted by expert.
Nothing here is differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends.ragged import grouped_swiglu
from mixtral_jax.model.dispatch import combine, sorted_slots, spread
from mixtral_jax.model.feed_forward import SwiGLU, swiglu

_FEW = 32


def by_need(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
) -> jax.Array:
    """Each token through its chosen experts, the gates' sum of their results: float32 [N, D].

    Args:
      expert_NA: int32, the chosen experts.
      gate_NA: float32.
      mask_N: bool; tokens that are not real get zeros, and no expert is read for them.
    """
    if x_ND.shape[0] <= _FEW:
        return _all_rows(x_ND, expert_NA, gate_NA, mask_N, experts, execution)
    slots, sizes_E = sorted_slots(expert_NA, mask_N, len(experts))
    return combine(grouped_swiglu(spread(x_ND, slots), experts, sizes_E, execution), gate_NA, slots)


def _all_rows(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
) -> jax.Array:
    # A row that did not choose the expert adds exactly zero, so no row depends on another's choices.
    gate_NE = jnp.sum(jax.nn.one_hot(expert_NA, len(experts)) * gate_NA[..., None], axis=1) * mask_N[:, None]
    wanted_E = jnp.any(gate_NE > 0, axis=0)
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    for index, weights in enumerate(experts):

        def add(y_ND: jax.Array, gate_N: jax.Array, weights: SwiGLU = weights) -> jax.Array:
            return y_ND + swiglu(x_ND[None], weights, execution)[0].astype(jnp.float32) * gate_N[:, None]

        y_ND = jax.lax.cond(wanted_E[index], add, lambda y_ND, _: y_ND, y_ND, gate_NE[:, index])
    return y_ND
