"""Experts for inference: each expert's weights are arrays of their own, and only those that some token chose are read.
On NVIDIA GPUs a kernel does that, of a stack, see `experts_gpu`; the rest of this is for where there is none.

One token goes to the experts that it chose, and no other is asked. Few go through each chosen expert together, all of
them, since the weights are what costs. Many are sorted by expert and taken a block at a time; and so are few on a CPU,
where rows cost as well, unless one block has room for all of them. Nothing here is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends import experts_gpu
from mixtral_jax.model.backends.few_rows import ByOutput, is_wide, on_matrix_units
from mixtral_jax.model.backends.half_bytes import HalfBytes
from mixtral_jax.model.dispatch import combine, sorted_slots, spread
from mixtral_jax.model.feed_forward import SwiGLU, swiglu

_FEW = 32
_FEW_INPUTS = 512
"""Of matrices that units read fast enough to do so for two rows at a time."""
_LARGE = 1 << 20
"""Numbers of a float32 matrix that small blocks read too often: they are as fast with 1024 x 1024, slower with more."""
_SMALLEST_BLOCK, _LARGEST_BLOCK, _STEP = 32, 512, 16


def by_need(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...] | SwiGLU,
    execution: Execution,
) -> jax.Array:
    """Each token through its chosen experts, the gates' sum of their results: float32 [N, D].

    Args:
      expert_NA: int32, the chosen experts.
      gate_NA: float32.
      mask_N: bool; tokens that are not real get zeros, and no expert is read for them.
      experts: each one's weights; or all in a stack, for the kernel of GPUs.
    """
    if isinstance(experts, SwiGLU):
        return _of_a_stack(x_ND, expert_NA, gate_NA, mask_N, experts, execution)
    if x_ND.shape[0] == 1:
        return one_row(x_ND, expert_NA, gate_NA, mask_N, experts, execution)
    inputs = x_ND, expert_NA, gate_NA, mask_N
    if x_ND.shape[0] > _FEW:
        block = _balanced(expert_NA.size, len(experts))
        anywhere = partial(sorted_rows, experts=experts, execution=execution, block=block)
    else:
        anywhere = partial(all_rows, experts=experts, execution=execution)
    on_cpu = block_on_cpu(expert_NA.size, experts, execution)
    # Where one block has room for all tokens, sorting would save nothing.
    if on_cpu is None or x_ND.shape[0] <= min(on_cpu, _FEW):
        return anywhere(*inputs)
    in_blocks = partial(sorted_rows, experts=experts, execution=execution, block=on_cpu)
    y_ND: jax.Array = jax.lax.platform_dependent(*inputs, cpu=in_blocks, default=anywhere)
    return y_ND


def _of_a_stack(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    stack: SwiGLU,
    execution: Execution,
) -> jax.Array:
    """`by_need` by the kernel; elsewhere than on the GPUs that it is for, the experts are taken apart."""

    def apart(x_ND: jax.Array, expert_NA: jax.Array, gate_NA: jax.Array, mask_N: jax.Array, stack: SwiGLU) -> jax.Array:
        experts = tuple(jax.tree.map(itemgetter(index), stack) for index in range(stack.gate.shape[0]))
        return by_need(x_ND, expert_NA, gate_NA, mask_N, experts, execution)

    kernel = partial(experts_gpu.by_need, execution=execution)
    inputs = x_ND, expert_NA, gate_NA, mask_N, stack
    y_ND: jax.Array = jax.lax.platform_dependent(*inputs, cuda=kernel, default=apart)
    return y_ND


def block_on_cpu(choices: int, experts: tuple[SwiGLU, ...], execution: Execution) -> int | None:
    """Rows that an expert takes at a time on a CPU, of so many choices in all; None where it does as elsewhere.

    By measurement, see docs/cost-growth.md. `few_rows` is at its best with three, or four that don't lie in the first
    cache; with large matrices in float32 only up to four choices an expert; and `half_bytes` with four. On matrix
    units, small blocks are only for up to two choices an expert. A float32 matrix that lies as it is XLA:CPU reads for
    one row three times as fast as for several. Of other kinds nothing of the sort is known.
    """
    gate = experts[0].gate
    if isinstance(gate, ByOutput) and on_matrix_units(gate.values.dtype, execution.product_dtype):
        block, most = 2 if gate.shape[0] <= _FEW_INPUTS else 4, 2
    elif isinstance(gate, ByOutput):
        block = 4 if is_wide(4, gate.shape[0]) else 3
        most = 4 if gate.values.dtype == jnp.float32 and gate.values.size >= _LARGE else 16
    elif isinstance(gate, HalfBytes):
        block, most = 4, 16
    elif all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(experts)):
        block, most = 1, 4
    else:
        return None
    if choices <= most * len(experts):
        return block
    # Of choices at random, two standard deviations more than is balanced, so that few experts need a second block.
    balanced = choices / len(experts)
    return min(choices, _LARGEST_BLOCK, math.ceil((balanced + 2 * math.sqrt(balanced)) / _STEP) * _STEP)


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
    # A row that did not choose the expert adds exactly zero, whatever that made of it: no row depends on another's.
    gate_NE = _gates(expert_NA, gate_NA, mask_N, len(experts))
    wanted_E = jnp.any(gate_NE > 0, axis=0)

    def contribute(gate_N: jax.Array, weights: SwiGLU) -> jax.Array:
        y_ND = swiglu(x_ND[None], weights, execution)[0].astype(jnp.float32)
        return jnp.where(gate_N[:, None] > 0, y_ND * gate_N[:, None], 0.0)

    def nothing(gate_N: jax.Array, weights: SwiGLU) -> jax.Array:
        return jnp.zeros(x_ND.shape, jnp.float32)

    # Added up at the end: the experts don't wait for each other.
    parts = [
        jax.lax.cond(wanted_E[index], contribute, nothing, gate_NE[:, index], weights)
        for index, weights in enumerate(experts)
    ]
    return sum(parts[1:], parts[0])


def sorted_rows(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: tuple[SwiGLU, ...],
    execution: Execution,
    block: int,
) -> jax.Array:
    """`by_need` with tokens sorted by expert, each expert taking its own, so many at a time."""
    slots, sizes_E = sorted_slots(expert_NA, mask_N, len(experts))
    return combine(_in_blocks(spread(x_ND, slots), sizes_E, experts, execution, block), gate_NA, slots)


def _gates(expert_NA: jax.Array, gate_NA: jax.Array, mask_N: jax.Array, experts: int) -> jax.Array:
    """Each token's gate of each expert, [N, E]: zero where it did not choose the expert or is not real."""
    return jnp.sum(jax.nn.one_hot(expert_NA, experts) * gate_NA[..., None], axis=1) * mask_N[:, None]


def _balanced(choices: int, experts: int) -> int:
    """What an expert takes of so many choices if they are balanced, as a power of two within bounds, so that its last
    block is not mostly empty: 512 over 8 experts are taken by 64."""
    balanced = 1 << (max(1, choices // experts) - 1).bit_length()
    return min(choices, _LARGEST_BLOCK, max(_SMALLEST_BLOCK, balanced))


def _in_blocks(
    x_MD: jax.Array, sizes_E: jax.Array, experts: tuple[SwiGLU, ...], execution: Execution, block: int
) -> jax.Array:
    """Rows in expert order, each through its expert, [M, D]; what stands in rows beyond the sizes' sum means nothing.

    A loop is as long as its expert has blocks. Results take the place of their rows; of a last block, which runs on
    into rows of the next expert, those alone that are this one's. A compiler is free to make an array of zeros for them
    for all layers before the first of them begins.
    """
    num_rows = x_MD.shape[0]
    rows_MD = jnp.pad(x_MD.astype(jnp.promote_types(x_MD.dtype, execution.activation_dtype)), [(0, block), (0, 0)])
    ends_E = jnp.cumsum(sizes_E)
    for index, weights in enumerate(experts):

        def step(i: jax.Array, rows_MD: jax.Array, index: int = index, weights: SwiGLU = weights) -> jax.Array:
            row = ends_E[index] - sizes_E[index] + i * block
            x_BD = jax.lax.dynamic_slice_in_dim(rows_MD, row, block)
            y_BD = swiglu(x_BD[None], weights, execution)[0].astype(rows_MD.dtype)
            own_B1 = (row + jnp.arange(block) < ends_E[index])[:, None]
            return jax.lax.dynamic_update_slice_in_dim(rows_MD, jnp.where(own_B1, y_BD, x_BD), row, axis=0)

        rows_MD = jax.lax.fori_loop(0, -(-sizes_E[index] // block), step, rows_MD)
    return rows_MD[:num_rows]
