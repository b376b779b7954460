"""Experts for inference: each expert's weights are arrays of their own, and only those that some token chose are read.

One token goes to the experts that it chose, and no other is asked. Few go through each chosen expert together, all of
them, since the weights are what costs; on a CPU, where rows cost as well, an expert takes its own. Many are sorted by
expert and taken a block at a time. Nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends.few_rows import ByOutput
from mixtral_jax.model.dispatch import combine, sorted_slots, spread
from mixtral_jax.model.feed_forward import SwiGLU, swiglu

_FEW, _FEW_BY_OUTPUT = 32, 64
_GROUP = 4
"""Rows of its own that an expert takes at a time where matrices lie by output. Of eight texts that choose two of eight
experts, it has two."""
_SMALLEST_BLOCK, _SMALLEST_ON_CPU, _LARGEST_BLOCK = 32, 8, 512
"""Rows that an expert takes at a time where tokens are sorted. On a CPU, rows of nothing cost as much as any."""


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
    if x_ND.shape[0] == 1:
        return one_row(x_ND, expert_NA, gate_NA, mask_N, experts, execution)
    together, apart, sorted_by_expert = (
        partial(form, experts=experts, execution=execution) for form in (all_rows, own_rows, sorted_rows)
    )
    inputs = x_ND, expert_NA, gate_NA, mask_N
    lies_by_output = isinstance(experts[0].gate, ByOutput)
    if x_ND.shape[0] > (_FEW_BY_OUTPUT if lies_by_output else _FEW):
        on_cpu, elsewhere = (partial(sorted_by_expert, smallest=each) for each in (_SMALLEST_ON_CPU, _SMALLEST_BLOCK))
    elif lies_by_output:
        return apart(*inputs, size=min(_GROUP, x_ND.shape[0]))
    elif expert_NA.size <= 2 * len(experts) and _is_fast_by_row(experts):
        on_cpu, elsewhere = partial(apart, size=1), together
    else:
        return together(*inputs)
    y_ND: jax.Array = jax.lax.platform_dependent(*inputs, cpu=on_cpu, default=elsewhere)
    return y_ND


def _is_fast_by_row(experts: tuple[SwiGLU, ...]) -> bool:
    """XLA:CPU reads a float32 matrix for a vector three times as fast as for eight rows; no other kind."""
    return all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(experts))


def one_row(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
) -> jax.Array:
    """`by_need` of one token: a branch for each of its choices, where `all_rows` has a condition for each expert."""

    def through(weights: SwiGLU) -> Callable[[], jax.Array]:
        return lambda: swiglu(x_ND[None], weights, execution)[0].astype(jnp.float32)

    branches = [*map(through, experts), lambda: jnp.zeros(x_ND.shape, jnp.float32)]
    expert_NA = jnp.where(mask_N[:, None], expert_NA, len(experts))
    parts = [
        jax.lax.switch(expert_NA[0, choice], branches) * gate_NA[0, choice] for choice in range(expert_NA.shape[1])
    ]
    return sum(parts[1:], parts[0])


def all_rows(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
) -> jax.Array:
    """`by_need` with all tokens going through each chosen expert together."""
    # A row that did not choose the expert adds exactly zero, so no row depends on another's choices.
    gate_NE = _gates(expert_NA, gate_NA, mask_N, len(experts))
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


def own_rows(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
    size: int,
) -> jax.Array:
    """`by_need` with each chosen expert taking its own tokens, so many at a time, while it is in the cache.

    Of three tokens that chose the experts 0 1, 1 2 and 1 0, expert 1 has the rows 0 1 2 and, if it takes four at once,
    a row of zeros, which stands after the last.
    """
    num_rows = x_ND.shape[0]
    gate_NA = gate_NA * mask_N[:, None]
    chosen_EN = _gates(expert_NA, gate_NA, mask_N, len(experts)).T > 0
    count_E = jnp.sum(chosen_EN, axis=1)
    # Each expert's rows come first, in order; the rest of its list, and the group beyond the list, is the row of zeros.
    row_EM = jnp.sort(jnp.where(chosen_EN, jnp.arange(num_rows)[None], num_rows), axis=1)
    row_EM = jnp.pad(row_EM, [(0, 0), (0, size)], constant_values=num_rows)
    x_ND = jnp.pad(x_ND, [(0, 1), (0, 0)])

    def through(row_M: jax.Array, count: jax.Array, weights: SwiGLU) -> jax.Array:
        def step(number: jax.Array, y_MD: jax.Array) -> jax.Array:
            row_R = jax.lax.dynamic_slice_in_dim(row_M, number * size, size)
            y_RD = swiglu(x_ND[row_R][None], weights, execution)[0].astype(jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(y_MD, y_RD, number * size, axis=0)

        return jax.lax.fori_loop(0, -(-count // size), step, jnp.zeros((row_M.size, x_ND.shape[1]), jnp.float32))

    # Put together at the end: the experts don't wait for each other.
    y_EMD = jnp.stack([through(*each) for each in zip(row_EM, count_E, experts, strict=True)])
    place_EN = jnp.maximum(jnp.cumsum(chosen_EN, axis=1) - 1, 0)
    y_NAD = y_EMD[expert_NA, place_EN[expert_NA, jnp.arange(num_rows)[:, None]]]
    return jnp.sum(y_NAD * gate_NA[..., None], axis=1)


def sorted_rows(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
    smallest: int,
) -> jax.Array:
    """`by_need` with tokens sorted by expert, each expert taking its own, by blocks of so many or more."""
    slots, sizes_E = sorted_slots(expert_NA, mask_N, len(experts))
    x_MD = spread(x_ND, slots)
    block = _block(x_MD.shape[0], len(experts), smallest)
    return combine(_in_blocks(x_MD, sizes_E, experts, execution, block), gate_NA, slots)


def _gates(expert_NA: jax.Array, gate_NA: jax.Array, mask_N: jax.Array, experts: int) -> jax.Array:
    """Each token's gate of each expert, [N, E]: zero where it did not choose the expert or is not real."""
    return jnp.sum(jax.nn.one_hot(expert_NA, experts) * gate_NA[..., None], axis=1) * mask_N[:, None]


def _block(rows: int, experts: int, smallest: int) -> int:
    """What an expert takes of so many rows if they are balanced, as a power of two within bounds, so that its last
    block is not mostly empty: 512 rows over 8 experts are taken by 64."""
    balanced = 1 << (max(1, rows // experts) - 1).bit_length()
    return min(rows, _LARGEST_BLOCK, max(smallest, balanced))


def _in_blocks(
    x_MD: jax.Array, sizes_E: jax.Array, experts: tuple[SwiGLU, ...], execution: Execution, block: int
) -> jax.Array:
    """Rows in expert order, each through its expert, [M, D]; what stands in rows beyond the sizes' sum means nothing.

    A loop is as long as its expert has blocks. The last one runs on into rows of the next expert, which then writes
    them again.
    """
    num_rows = x_MD.shape[0]
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
