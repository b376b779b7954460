"""The grouped product for GPUs, as Triton kernels: XLA's own multiplies every row with every expert's weight there.

A program computes one tile of a result. Rows lie in expert order and experts begin anywhere, so tiles of rows are
counted from each expert's first one, and what a tile's last rows are of the next expert is not written:

    rows      0 0 0 0 0 1 1 2 2 2        of experts 0, 1, 2; tiles of four rows
    tiles     |-------|                  expert 0, its first row 0
                      |-|                expert 0, row 4
                        |---|            expert 1, row 5
                            |-----|      expert 2, row 7
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

TILE = 128
"""Of a result, each way."""
DEPTH = 64
"""Of a step along what is summed over."""
_TOGETHER = 8  # tiles one below the other that programs take after one another, so that they share what they read
_PARAMS = triton.CompilerParams(num_warps=8, num_stages=3)


def suits(dtype: str | jnp.dtype, *widths: int) -> bool:
    """Whether the kernels take these: bfloat16 operands, of widths that tiles divide."""
    return jnp.dtype(dtype) == jnp.bfloat16 and all(width % TILE == 0 for width in widths)


def product(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transposed: bool = False, interpret: bool = False
) -> jax.Array:
    """Row by row, x times the weight of the row's expert; what stands in rows beyond the sizes' sum means nothing.

    Args:
      x_MD: rows in expert order.
      sizes_E: int32, rows of each expert, M together at most.
      transposed: the weights are [E, F, D].
      interpret: run it step by step on any platform, which is slow, for tests.

    Returns:
      float32 [M, F].
    """
    num_rows, depth = x_MD.shape
    width = w_EDF.shape[1 if transposed else 2]
    count = -(-(num_rows // TILE + sizes_E.shape[0]) // _TOGETHER) * _TOGETHER
    kernel = partial(_product_kernel, depth=depth, across=width // TILE, transposed=transposed)
    y_MF: jax.Array = pl.pallas_call(
        kernel,
        grid=(count * (width // TILE),),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), jnp.float32),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="grouped_product",
    )(*tiles(sizes_E, count, num_rows), x_MD, w_EDF)
    return y_MF


def weight_gradient(x_MD: jax.Array, gradient_MF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """For each expert the sum over its rows of x times the gradient: float32 [E, D, F]."""
    (_, dim), width, experts = x_MD.shape, gradient_MF.shape[1], sizes_E.shape[0]
    down, across = dim // TILE, width // TILE
    ends_E = jnp.minimum(jnp.cumsum(sizes_E), x_MD.shape[0])
    gradient_EDF: jax.Array = pl.pallas_call(
        partial(_gradient_kernel, down=down, across=across),
        grid=(down * across, experts),
        out_shape=jax.ShapeDtypeStruct((experts, dim, width), jnp.float32),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="grouped_weight_gradient",
    )(jnp.cumsum(sizes_E) - sizes_E, ends_E, x_MD, gradient_MF)
    return gradient_EDF


class Tiles(NamedTuple):
    """int32 [J]: of each tile of rows its expert, its first row, and where its expert's rows end. A tile that begins
    there has none."""

    expert_J: jax.Array
    row_J: jax.Array
    end_J: jax.Array


def tiles(sizes_E: jax.Array, count: int, num_rows: int, rows: int = TILE) -> Tiles:
    """So many tiles, of so many rows each, of experts that have these sizes; those that are not needed are the last."""
    ends_E = jnp.cumsum(sizes_E)
    tiles_E = -(-sizes_E // rows)
    last_E = jnp.cumsum(tiles_E)
    number = jnp.arange(count)
    # By comparisons: to search by halves is a loop, around which the GPU waits for the host.
    expert = jnp.searchsorted(last_E, number, side="right", method="compare_all")
    expert = jnp.minimum(expert, sizes_E.shape[0] - 1).astype(jnp.int32)
    end = jnp.minimum(ends_E[expert], num_rows)  # beyond it nothing is read or written, whatever the sizes
    row = (ends_E - sizes_E)[expert] + (number - (last_E - tiles_E)[expert]) * rows
    return Tiles(expert, jnp.minimum(row, end).astype(jnp.int32), end.astype(jnp.int32))


def tile_of(program: Any, together: int, across: int) -> tuple[Any, Any]:
    """A program's tile, down and across: so many rows of tiles are taken together, column by column."""
    group, rest = program // (together * across), program % (together * across)
    return group * together + rest % together, rest // together


def _product_kernel(
    expert_ref: Any, row_ref: Any, end_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any, *, depth: int, across: int,
    transposed: bool,
) -> None:  # fmt: skip
    tile, column = tile_of(pl.program_id(0), _TOGETHER, across)
    expert, row, end = (triton.load(ref.at[tile]) for ref in (expert_ref, row_ref, end_ref))
    own_R1 = (row + jnp.arange(TILE) < end)[:, None]
    columns = pl.ds(column * TILE, TILE)

    @pl.when(row < end)
    def _() -> None:
        def step(number: Any, y_RF: jax.Array) -> jax.Array:
            inner = pl.ds(number * DEPTH, DEPTH)
            x_RD = triton.load(x_ref.at[pl.ds(row, TILE), inner], mask=own_R1, other=0)
            if transposed:
                return y_RF + triton.dot(x_RD, triton.load(w_ref.at[expert, columns, inner]), trans_b=True)
            return y_RF + triton.dot(x_RD, triton.load(w_ref.at[expert, inner, columns]))

        y_RF = jax.lax.fori_loop(0, depth // DEPTH, step, jnp.zeros((TILE, TILE), jnp.float32))
        triton.store(y_ref.at[pl.ds(row, TILE), columns], y_RF, mask=own_R1)


def _gradient_kernel(
    start_ref: Any, end_ref: Any, x_ref: Any, gradient_ref: Any, y_ref: Any, *, down: int, across: int
) -> None:
    expert = pl.program_id(1)
    tile, column = tile_of(pl.program_id(0), next(each for each in (_TOGETHER, 4, 2, 1) if down % each == 0), across)
    start, end = (triton.load(ref.at[expert]) for ref in (start_ref, end_ref))
    down_slice, across_slice = pl.ds(tile * TILE, TILE), pl.ds(column * TILE, TILE)

    def step(number: Any, y_DF: jax.Array) -> jax.Array:
        row = start + number * DEPTH
        own_R1 = (row + jnp.arange(DEPTH) < end)[:, None]
        rows = pl.ds(row, DEPTH)
        x_RD = triton.load(x_ref.at[rows, down_slice], mask=own_R1, other=0)
        # What stands in rows beyond the last may be no number, which zeros of x would not undo.
        gradient_RF = triton.load(gradient_ref.at[rows, across_slice], mask=own_R1, other=0)
        return y_DF + triton.dot(x_RD, gradient_RF, trans_a=True)

    y_DF = jax.lax.fori_loop(0, -(-(end - start) // DEPTH), step, jnp.zeros((TILE, TILE), jnp.float32))
    y_ref[expert, down_slice, across_slice] = y_DF
