"""Weights in eight or four bits: which tensors, and how each is rounded.

The layers' matrices and the unembedding are quantised; the router, the norms and the embedding, of which a token reads
one row, are not.
"""

from __future__ import annotations

import math
from typing import Literal

import ml_dtypes
import numpy as np

from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor

Bits = Literal["int8", "int4", "fp8"]
GROUP = 32
"""Inputs that share a scale in int4, or fewer where that does not divide them."""

_RANGE = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}
_RATIOS = (1.05, 1, 0.95, 0.9, 0.85, 0.8, 0.75)
_SCALE_BITS = 5
"""Significant bits of a scale of int4: with the three of a number, a weight is exact in the eight of bfloat16."""
DTYPES: dict[Bits, np.dtype] = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
FLOAT32 = ("scale", "router", "bias")
"""Never in a shorter form, of floats neither: they are small, and decide by small differences."""


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is quantised, in a model that is."""
    return tensor.path[-1] not in ("embedding", *FLOAT32)


def bits_of(dtype: np.dtype) -> Bits | None:
    """What a type says of a tensor that is written; None for a longer float."""
    return next((bits for bits, each in DTYPES.items() if each == dtype), None)


def scale_shape(tensor: Tensor, bits: Bits) -> tuple[int, ...]:
    """The shape of a tensor's scales: 1, or the number of groups, in a dimension that is summed over."""
    if bits != "int4":
        return tuple(1 if axis < tensor.inputs else size for axis, size in enumerate(tensor.shape))
    along = tensor.inputs - 1
    return tuple(groups(size) if axis == along else size for axis, size in enumerate(tensor.shape))


def groups(inputs: int) -> int:
    """How many scales so many inputs of a channel have in int4."""
    return inputs // math.gcd(inputs, GROUP)


def nbytes(tensor: Tensor, bits: Bits) -> int:
    """The bytes of a tensor in so many bits, its scales among them; two numbers of int4 share a byte."""
    size = math.prod(tensor.shape)
    return (-(-size // 2) if bits == "int4" else size) + 4 * math.prod(scale_shape(tensor, bits))


def quantize(weight: np.ndarray, tensor: Tensor, bits: Bits) -> Quantized:
    """A tensor on the host in fewer bits; its leaves are numpy arrays.

    Args:
      weight: in our layout, in any float dtype.
    """
    weight = np.asarray(weight, np.float32)
    shape = scale_shape(tensor, bits)
    # Each dimension as groups and what is in one: (16, 8) with scales (2, 1) is (2, 8, 1, 8).
    split = [part for size, groups in zip(weight.shape, shape, strict=True) for part in (groups, size // groups)]
    grouped = weight.reshape(split)
    inside = tuple(range(1, len(split), 2))
    if bits == "int4":
        scale = _best_scale(grouped, inside)
    else:
        scale = np.abs(grouped).max(axis=inside, keepdims=True) / _RANGE[bits][1]
    values = _rounded(grouped, scale, bits)
    values = (values if bits == "fp8" else values.astype(np.int8)).astype(DTYPES[bits])
    return Quantized(values.reshape(weight.shape), scale.reshape(shape))


def _rounded(grouped: np.ndarray, scale: np.ndarray, bits: Bits) -> np.ndarray:
    """The nearest values that there are, in float32."""
    least, most = _RANGE[bits]
    # A group of zeros has the scale 0, and any value does.
    values = np.clip(grouped / np.where(scale == 0, 1, scale), least, most)
    return values.astype(DTYPES[bits]).astype(np.float32) if bits == "fp8" else np.rint(values)


def _best_scale(grouped: np.ndarray, inside: tuple[int, ...]) -> np.ndarray:
    """Of some scales the one that leaves each group the least squared error.

    The value that is largest either way becomes -8, so that no number is spared for the other way; a smaller scale cuts
    it off, for finer steps between the others. A quarter less error than absmax / 7.
    """
    most, least = grouped.max(axis=inside, keepdims=True), grouped.min(axis=inside, keepdims=True)
    largest = np.where(most > -least, most, least)
    best, smallest = np.zeros_like(largest), np.full_like(largest, np.inf)
    for ratio in _RATIOS:
        scale = _in_few_bits(largest * np.float32(ratio / -8))
        error = np.square(_rounded(grouped, scale, "int4") * scale - grouped).sum(axis=inside, keepdims=True)
        best, smallest = np.where(error < smallest, scale, best), np.minimum(error, smallest)
    return best


def _in_few_bits(scale: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.rint(mantissa * 2**_SCALE_BITS) / 2**_SCALE_BITS, exponent)


def pack(values: np.ndarray) -> np.ndarray:
    """Numbers of int4 as uint8, one after another in a row: of a byte the low half is the first."""
    low, high = np.pad(values.astype(np.uint8).reshape(-1), (0, values.size % 2)).reshape(-1, 2).T
    return (low & 15) | (high << 4)


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What `pack` packed."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
    return ((halves ^ 8).astype(np.int8) - 8).astype(DTYPES["int4"]).reshape(shape)
