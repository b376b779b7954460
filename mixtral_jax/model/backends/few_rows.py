"""Products of a few rows with a matrix, on a CPU.

There the matrix is what costs, and XLA:CPU packs it before it multiplies more rows than one: decoding waits for that.
Here the sums of all rows run through it side by side, in one loop that reads it once, as it lies: in bfloat16 at half
the bytes, in int8 at a quarter. Parts of it, or several matrices, run side by side too, where the rows alone would be
too few. More rows take turns, where XLA would first have to make a matrix of another dtype; else see `operand_order`.
So the matrix has to lie output by output; and XLA has to vectorise a sum, which it does only where it may reorder one:
in programs compiled with OPTIONS. In others the same loop takes four times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.sharding import chips

OPTIONS = {"xla_cpu_enable_fast_math": True, "xla_cpu_prefer_vector_width": 512}
"""The compiler's. Infinities, NaN, divisions and functions stay as they are: XLA has a flag for each. Left to itself,
XLA vectorises by 256 bits where the processor has 512."""

_SIDE_BY_SIDE, _SIDE_BY_SIDE_OF_WIDE = 4, 16
"""Sums that one loop has, at least about: a wide row is read again, for as many outputs as are made at a time."""
_STREAMS_OF_WIDE, _MOST_STREAMS = 4, 8
"""Parts that a loop reads at a time, of all its matrices: at least, where rows are wide, and at most. Of 16, the
processors that were measured lose track."""
_IN_FIRST_CACHE = 4096
"""Numbers of x that leave room there for what is read of w."""
_MOST_IN_A_LOOP = 8
_MOST_BESIDE_UNITS = 2
"""Rows in a loop where there are matrix units."""
_MOST_IN_LOOPS = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float32): 64}
"""By the dtype of which XLA would make another matrix."""


@cache
def are_for_this_host() -> bool:
    """Whether the default device is a CPU."""
    return jax.default_backend() == "cpu"


def streams_of_float32() -> int:
    """Parts that a loop over float32 reads at least. By 512 bits, eight rows take from memory in one part half as long
    again as in two; by 256 it is the other way round."""
    return 2 if chips.has_avx512() else 1


def on_matrix_units(held: DTypeLike, multiplied: DTypeLike) -> bool:
    """Whether a matrix held in one dtype and multiplied in another is for such units."""
    return jnp.dtype(held) == jnp.dtype(multiplied) == jnp.bfloat16 and chips.has_amx()


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("inputs",))
@dataclass(frozen=True)
class ByOutput:
    """A matrix that lies output by output, though its own shape has the inputs first; on the host or on a device."""

    values: Any
    """An array of jax, or while it is on the host of numpy: the outputs' dimensions, then the inputs'."""
    inputs: int
    """How many of its own dimensions, the first, are summed over."""
    scale: Any = None
    """float32, the outputs' dimensions: what whole numbers are multiplied by; None where values are weights."""

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[-self.inputs :] + self.values.shape[: -self.inputs]

    def as_it_lies(self, dims: str) -> str:
        """The letters of its own dimensions, in the order of those of `values`."""
        return dims[self.inputs :] + dims[: self.inputs]

    def restored(self) -> Any:
        """The array in its own shape; float32 where it has a scale."""
        outputs = self.ndim - self.inputs
        values = self.values.transpose(*range(outputs, self.ndim), *range(outputs))
        return values if self.scale is None else values.astype(jnp.float32) * self.scale[(None,) * self.inputs]


def by_output(weight: Any, inputs: int) -> ByOutput:
    """A matrix whose first dimensions, so many, are its inputs; if Quantized, with a scale for each output."""
    values, scale = (weight.values, weight.scale) if isinstance(weight, Quantized) else (weight, None)
    lying = values.transpose(*range(inputs, values.ndim), *range(inputs))
    return ByOutput(lying, inputs, None if scale is None else scale.reshape(values.shape[inputs:]))


def are_few(rows: int, inputs: int, held: DTypeLike, multiplied: DTypeLike) -> bool:
    """Whether `products` is the fastest for so many rows, and a matrix held in one dtype and multiplied in another."""
    if on_matrix_units(held, multiplied):
        return 0 < rows <= _MOST_BESIDE_UNITS
    if held == multiplied == jnp.float32:
        return 0 < rows <= (_SIDE_BY_SIDE if is_wide(rows, inputs) else _MOST_IN_A_LOOP)
    return 0 < rows <= (_MOST_IN_A_LOOP if held == multiplied else _MOST_IN_LOOPS[jnp.dtype(multiplied)])


def is_wide(rows: int, inputs: int) -> bool:
    """Whether so many rows are read from beyond the first cache, for each output."""
    return rows * inputs > _IN_FIRST_CACHE


def products(x_MK: jax.Array, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """x times the transpose of each w_NK, all of one shape and dtype: float32 [M, N].

    Sums are in float32, and a row's don't depend on the other rows.
    """
    return in_turns(_MOST_IN_A_LOOP, x_MK, matrices, _in_loops)


def in_turns(
    most: int, x_MK: jax.Array, matrices: Any, multiply: Callable[[jax.Array, Any], list[jax.Array]]
) -> list[jax.Array]:
    """`multiply` of rows and matrices, in as few turns of at most so many rows as will do: one program for all."""

    def turn(x_RK: jax.Array) -> list[jax.Array]:
        # The barrier keeps the cast of w from being done once for all turns of a loop around it, which would write it
        # and read it at twice the bytes.
        x_RK, own = lax.optimization_barrier((x_RK.astype(jnp.float32), matrices))
        return multiply(made_once(x_RK), own)

    rows, inputs = x_MK.shape
    turns = -(-rows // most)
    if turns == 1:
        return turn(x_MK)
    each = -(-rows // turns)
    x_TRK = jnp.pad(x_MK, [(0, turns * each - rows), (0, 0)]).reshape(turns, each, inputs)
    return [y_TRN.reshape(turns * each, -1)[:rows] for y_TRN in lax.map(turn, x_TRK)]


def _in_loops(x_MK: jax.Array, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Several matrices a loop, as far as they are good for it."""
    rows, inputs = x_MK.shape
    sums, streams = _SIDE_BY_SIDE, streams_of_float32() if matrices[0].dtype == jnp.float32 else 1
    if is_wide(rows, inputs):
        sums, streams = _SIDE_BY_SIDE_OF_WIDE, _STREAMS_OF_WIDE
    at_once = max(1, min(_MOST_STREAMS, 2 * sums // rows))  # twice as many sums cost less than another loop
    streams = max(streams, -(-sums // rows))
    loops = [matrices[start : start + at_once] for start in range(0, len(matrices), at_once)]
    return [y_MN for loop in loops for y_MN in _in_a_loop(x_MK, [w_NK.astype(jnp.float32) for w_NK in loop], streams)]


def _in_a_loop(x_MK: jax.Array, matrices: list[jax.Array], streams: int) -> list[jax.Array]:
    """One loop that reads about so many parts of the matrices at a time, by their outputs."""
    count, rows, outputs = len(matrices), x_MK.shape[0], matrices[0].shape[0]
    wanted = -(-streams // count)
    parts = math.gcd(outputs, min(max(1, _MOST_STREAMS // count), 1 << (wanted - 1).bit_length()))
    pairs = [(x_K, part) for w_NK in matrices for part in jnp.split(w_NK, parts) for x_K in x_MK]
    if len(pairs) == 1:
        # Twice the same: XLA would take one sum for a product and make a slow one of it.
        return [jnp.max(_side_by_side(pairs * 2), axis=0, keepdims=True)]
    y_WPMN = _side_by_side(pairs).reshape(count, parts, rows, -1)
    return list(jnp.swapaxes(y_WPMN, 1, 2).reshape(count, rows, outputs))


def made_once(x: jax.Array) -> jax.Array:
    """x, in a form that XLA:CPU does not make again for each output of a product: it repeats no division.

    What makes x is otherwise fused into the product's loop, where a product of two arrays is three reads, not one.
    """
    return x / jnp.where(x == x, jnp.float32(1), jnp.nan)


def _side_by_side(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The product of each x_K with its w_NK, [pairs, N]: one reduction of them all, which XLA makes one loop of."""
    terms = [x_K[None] * w_NK for x_K, w_NK in pairs]
    zeros = [jnp.zeros((), jnp.float32)] * len(terms)

    def add(totals: list[jax.Array], terms: list[jax.Array]) -> list[jax.Array]:
        return [total + term for total, term in zip(totals, terms, strict=True)]

    return jnp.stack(lax.reduce(terms, zeros, add, (1,)))
