"""Experts for inference on GPUs: rows in the order of their experts, and a Triton kernel that reads the experts that
have some.

Around a branch or a loop for each expert the GPU would wait for the host to be told which way to go: twice a layer for
one text, once an expert for several. Here it is a program of the kernel that finds its expert, or that there is nothing
to do. Rows lie in tiles as those of `grouped_gpu`. Where tiles are too few to keep a GPU busy, several programs share
what is summed over, and their parts are added afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixtral_jax.config import Execution
from mixtral_jax.model.backends.grouped_gpu import Tiles, tile_of, tiles
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.dispatch import Slots, combine, sorted_slots, spread
from mixtral_jax.model.feed_forward import SwiGLU

UNIT = 64
"""Of which widths are multiples: a step along what is summed over."""
_FEWEST_ROWS, _MOST_ROWS = 16, 128  # of a tile of a result; one of most rows is as wide, if it can
_PROGRAMS = 512  # about four for each of a large GPU's multiprocessors
_TOGETHER = 8  # tiles one below the other that programs take after one another, so that they share what they read


def suits(product_dtype: str, held: str, num_experts: int, widths: Sequence[int]) -> bool:
    """Whether the kernel takes these: products in bfloat16, of matrices held in it, in int8 or in fp8."""
    # Triton counts the elements of an array in 32 bits, unless it has more than four GiB.
    fits = all(width % UNIT == 0 for width in widths) and num_experts * math.prod(widths) < 1 << 31
    return product_dtype == "bfloat16" and held in ("bfloat16", "int8", "fp8") and fits


def by_need(
    x_ND: jax.Array,
    expert_NA: jax.Array,
    gate_NA: jax.Array,
    mask_N: jax.Array,
    experts: SwiGLU,
    execution: Execution,
    interpret: bool = False,
) -> jax.Array:
    """What `by_need.by_need` gives.

    Args:
      experts: stacked, [E, D, F] and [E, F, D], of a form that `suits`.
      interpret: run it step by step on any platform, which is slow, for tests.
    """
    num_experts = experts.gate.shape[0]
    rows = _rows_of_a_tile(expert_NA.size, num_experts)
    slots, where = _plan(expert_NA, mask_N, num_experts, rows)
    through = partial(product, where=where, rows=rows, result_dtype=execution.activation_dtype, interpret=interpret)
    x_MD = spread(x_ND.astype(execution.product_dtype), slots)
    between_MF = jax.nn.silu(through(x_MD, experts.gate)) * through(x_MD, experts.up)
    return combine(through(between_MF.astype(execution.product_dtype), experts.down), gate_NA, slots)


def _rows_of_a_tile(choices: int, num_experts: int) -> int:
    """Twice what an expert takes of so many choices if they are balanced, as a power of two within bounds."""
    return min(max(_FEWEST_ROWS, pl.next_power_of_2(-(-2 * choices // num_experts))), _MOST_ROWS)


def _plan(expert_NA: jax.Array, mask_N: jax.Array, num_experts: int, rows: int) -> tuple[Slots, Tiles]:
    """A slot for each choice of a real token, and the tiles of them."""
    choices = expert_NA.size
    if expert_NA.shape[0] > 1:
        slots, sizes_E = sorted_slots(expert_NA, mask_N, num_experts)
        count = min(choices, choices // rows + num_experts)
        return slots, tiles(sizes_E, -(-count // _TOGETHER) * _TOGETHER if count > _TOGETHER else count, choices, rows)
    # One token chooses no expert twice: each choice is a tile.
    number_A = jnp.arange(choices, dtype=jnp.int32)
    slots = Slots(jnp.where(mask_N[:, None], number_A[None], choices), number_A)
    return slots, Tiles(expert_NA[0], number_A, jnp.where(mask_N, number_A + 1, number_A))


def product(
    x_MD: jax.Array,
    w_EDF: jax.Array | Quantized,
    where: Tiles,
    rows: int,
    result_dtype: str,
    interpret: bool = False,
) -> jax.Array:
    """Row by row, x times the matrix of the row's expert; what stands in rows of no tile means nothing.

    Args:
      x_MD: bfloat16, rows in the order of their experts.
      w_EDF: numbers, or eight bits with a scale for each expert's output.
      rows: of a tile.

    Returns:
      [M, F].
    """
    (num_rows, depth), width = x_MD.shape, w_EDF.shape[2]
    columns = rows if rows == _MOST_ROWS and width % rows == 0 else UNIT
    across, count = width // columns, where.expert_J.shape[0]
    parts = _parts(count * across, depth // UNIT)
    values_EDF, scale_EF = (w_EDF.values, w_EDF.scale[:, 0]) if isinstance(w_EDF, Quantized) else (w_EDF, None)
    if values_EDF.dtype == jnp.float8_e4m3fn:
        values_EDF = jax.lax.bitcast_convert_type(values_EDF, jnp.uint8)
    kernel = partial(_kernel, steps=depth // UNIT // parts, across=across, together=min(count, _TOGETHER))
    y_PMF: jax.Array = pl.pallas_call(
        partial(kernel, rows=rows, columns=columns),
        grid=(count * across, parts),
        out_shape=jax.ShapeDtypeStruct((parts, num_rows, width), result_dtype if parts == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8 if rows == _MOST_ROWS else 4, num_stages=3),
        interpret=interpret,
        name="chosen_experts",
    )(where, x_MD, values_EDF, scale_EF)
    return jnp.sum(y_PMF, axis=0).astype(result_dtype) if parts > 1 else y_PMF[0]


def _parts(programs: int, steps: int) -> int:
    """How many programs share so many steps of a sum: a power of two that divides them."""
    wanted = max(1, _PROGRAMS // programs)
    return min(1 << wanted.bit_length() - 1, steps & -steps)


def _kernel(
    where: Any, x_ref: Any, w_ref: Any, scale_ref: Any, y_ref: Any, *, rows: int, columns: int, steps: int,
    across: int, together: int,
) -> None:  # fmt: skip
    tile, column = tile_of(pl.program_id(0), together, across)
    part = pl.program_id(1)
    expert, row, end = (triton.load(ref.at[tile]) for ref in where)
    own_R1 = (row + jnp.arange(rows) < end)[:, None]
    own_rows, own_columns = pl.ds(row, rows), pl.ds(column * columns, columns)

    @pl.when(row < end)
    def _() -> None:
        def step(number: Any, y_RF: jax.Array) -> jax.Array:
            inner = pl.ds((part * steps + number) * UNIT, UNIT)
            x_RD = triton.load(x_ref.at[own_rows, inner], mask=own_R1, other=0)
            w_DF = _numbers(w_ref[expert, inner, own_columns], x_RD.dtype)
            return y_RF + triton.dot(x_RD, w_DF)

        y_RF = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
        if scale_ref is not None:
            y_RF *= triton.load(scale_ref.at[expert, own_columns])[None]
        triton.store(y_ref.at[part, own_rows, own_columns], y_RF.astype(y_ref.dtype), mask=own_R1)


def _numbers(values: jax.Array, dtype: Any) -> jax.Array:
    """What values of a matrix stand for, in dtype; uint8 is the bits of fp8, which Triton converts on few GPUs."""
    if values.dtype != jnp.uint8:
        return values.astype(dtype)
    # Sign, exponent and fraction of e4m3 in their places of float16, whose exponents mean 2 ** -8 of what these do.
    wide = values.astype(jnp.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return (jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256).astype(dtype)
