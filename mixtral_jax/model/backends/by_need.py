"""Experts for inference: each expert's weights are arrays of their own, and only those that some token chose are read.

Few tokens go through each chosen expert together, all of them: the weights are what costs. Many are sorted by expert
and taken a block at a time. Nothing here is differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.dispatch import combine, sorted_slots, spread
from mixtral_jax.model.feed_forward import SwiGLU, swiglu

_FEW = 32
_BLOCK = 512


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
    return combine(_in_blocks(spread(x_ND, slots), sizes_E, experts, execution), gate_NA, slots)


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

    def contribute(gate_N: jax.Array, weights: SwiGLU) -> jax.Array:
        return swiglu(x_ND[None], weights, execution)[0].astype(jnp.float32) * gate_N[:, None]

    def nothing(gate_N: jax.Array, weights: SwiGLU) -> jax.Array:
        return jnp.zeros(x_ND.shape, jnp.float32)

    # Added up at the end: the experts don't wait for each other.
    parts = [
        jax.lax.cond(wanted_E[index], contribute, nothing, gate_NE[:, index], weights)
        for index, weights in enumerate(experts)
    ]
    return sum(parts[1:], parts[0])


def _in_blocks(x_MD: jax.Array, sizes_E: jax.Array, experts: tuple[SwiGLU, ...], execution: Execution) -> jax.Array:
    """Rows in expert order, each through its expert, [M, D]; what stands in rows beyond the sizes' sum means nothing.

    A loop is as long as its expert has blocks. The last one runs on into rows of the next expert, which then writes
    them again.
    """
    num_rows, block = x_MD.shape[0], min(_BLOCK, x_MD.shape[0])
    x_MD = jnp.pad(x_MD, [(0, block), (0, 0)])
    y_MD = jnp.zeros(x_MD.shape, execution.activation_dtype)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    for index, weights in enumerate(experts):

        def step(
            i: jax.Array, y_MD: jax.Array, start: jax.Array = starts_E[index], weights: SwiGLU = weights
        ) -> jax.Array:
            row = start + i * block
            y_BD = swiglu(jax.lax.dynamic_slice_in_dim(x_MD, row, block)[None], weights, execution)[0]
            return jax.lax.dynamic_update_slice_in_dim(y_MD, y_BD, row, axis=0)

        y_MD = jax.lax.fori_loop(0, -(-sizes_E[index] // block), step, y_MD)
    return y_MD[:num_rows]
