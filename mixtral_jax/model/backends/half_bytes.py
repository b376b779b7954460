"""Products with a matrix in int4, on a CPU.

XLA:CPU makes floats of int4 one after another. Of bytes that hold two it makes them in vectors, if neither has to move
to another place: so a byte holds an input of the first half and one of the second, and each half is multiplied by its
own of x. Few rows go through the matrix in a loop like that of `few_rows`; what is said there of loops holds here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from mixtral_jax.model.backends.few_rows import in_turns
from mixtral_jax.model.backends.quantized import Quantized

_MOST_IN_A_LOOP = 4
_MOST_IN_LOOPS = {jnp.dtype(jnp.bfloat16): 8, jnp.dtype(jnp.float32): 32}
"""By the dtype of which XLA would make another matrix."""
_MOST_STREAMS, _SUMS_AT_ONCE = 4, 8
"""Parts that a loop reads at a time, of all its matrices, and sums that it makes; of 8 parts it takes twice as long."""


@partial(jax.tree_util.register_dataclass, data_fields=("bytes_NJ", "scale_NG"), meta_fields=("shape", "inputs"))
@dataclass(frozen=True)
class HalfBytes:
    """A matrix of K inputs and N outputs in int4; on the host or on a device."""

    bytes_NJ: Any
    """uint8, J = K / 2: the low half of byte j is input j, the high half input J + j."""
    scale_NG: Any
    """float32: each of K / G inputs, one after another; G is even."""
    shape: tuple[int, ...]
    """Its own, inputs first."""
    inputs: int
    """How many of its own dimensions, the first, are summed over."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def half(self, which: int) -> jax.Array:
        """Its inputs of the first (0) or second (1) half: float32 [N, G / 2, K / G]."""
        outputs, groups = self.scale_NG.shape
        bytes_NGI = self.bytes_NJ.reshape(outputs, groups // 2, -1).astype(jnp.int32)
        scale_NG1 = self.scale_NG.reshape(outputs, 2, groups // 2, 1)[:, which]
        signed = lax.shift_right_arithmetic(lax.shift_left(bytes_NGI, jnp.int32(28 - 4 * which)), jnp.int32(28))
        return signed.astype(jnp.float32) * scale_NG1

    def restored(self) -> jax.Array:
        """The array in its own shape, float32."""
        halves = [self.half(which).reshape(self.bytes_NJ.shape) for which in (0, 1)]
        return jnp.concatenate(halves, axis=1).T.reshape(self.shape)


def half_bytes(weight: Quantized, inputs: int) -> HalfBytes | None:
    """A matrix in int4 on the host, whose first dimensions, so many, are its inputs and whose groups lie along the last
    of them; None where a group would lie in both halves."""
    shape, num_inputs = weight.shape, math.prod(weight.shape[:inputs])
    scale_NG = weight.scale.reshape(math.prod(weight.scale.shape[:inputs]), -1).T
    if scale_NG.shape[1] % 2:
        return None
    values_NK = weight.values.reshape(num_inputs, -1).T.astype(np.int8).view(np.uint8)
    low_NJ, high_NJ = np.split(values_NK & 15, 2, axis=1)
    return HalfBytes(low_NJ | high_NJ << 4, np.ascontiguousarray(scale_NG), shape, inputs)


def are_few(rows: int, multiplied: DTypeLike) -> bool:
    """Whether `products` is the fastest for so many rows, to be multiplied in a dtype."""
    return 0 < rows <= _MOST_IN_LOOPS[jnp.dtype(multiplied)]


def products(x_MK: jax.Array, matrices: Sequence[HalfBytes]) -> list[jax.Array]:
    """x times each matrix, all of one shape: float32 [M, N].

    Products and sums are in float32, and a row's don't depend on the other rows.
    """
    return in_turns(_MOST_IN_A_LOOP, x_MK, matrices, _in_loops)


def _in_loops(x_MK: jax.Array, matrices: Sequence[HalfBytes]) -> list[jax.Array]:
    at_once = max(1, min(_MOST_STREAMS, _SUMS_AT_ONCE // x_MK.shape[0]))
    loops = [matrices[start : start + at_once] for start in range(0, len(matrices), at_once)]
    return [y_MN for loop in loops for y_MN in _in_a_loop(x_MK, loop)]


def _in_a_loop(x_MK: jax.Array, matrices: Sequence[HalfBytes]) -> list[jax.Array]:
    count, rows, (outputs, groups) = len(matrices), x_MK.shape[0], matrices[0].scale_NG.shape
    parts = math.gcd(outputs, max(1, min(_MOST_STREAMS // count, _SUMS_AT_ONCE // (count * rows))))
    x_M2GI = x_MK.reshape(rows, 2, groups // 2, -1)
    terms = [
        low_NGI * x_2GI[:1] + high_NGI * x_2GI[1:]
        for w in matrices
        for low_NGI, high_NGI in zip(jnp.split(w.half(0), parts), jnp.split(w.half(1), parts), strict=True)
        for x_2GI in x_M2GI
    ]
    zeros = [jnp.zeros((), jnp.float32)] * len(terms)

    def add(totals: list[jax.Array], terms: list[jax.Array]) -> list[jax.Array]:
        return [total + term for total, term in zip(totals, terms, strict=True)]

    y_WPMN = jnp.stack(lax.reduce(terms, zeros, add, (1, 2))).reshape(count, parts, rows, -1)
    return list(jnp.swapaxes(y_WPMN, 1, 2).reshape(count, rows, outputs))
