"""Weights in eight or four bits: which tensors, and how each is rounded.

The layers' matrices and the unembedding are quantised; the router, the norms and the embedding, of which a token reads
one row, are not.
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np

from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor

Bits = Literal["int8", "int4"]
GROUP = 32
"""Inputs that share a scale in int4, or fewer where that does not divide them."""

_RANGE = {"int8": (-127, 127), "int4": (-8, 7)}
_RATIOS = (1, 0.95, 0.9, 0.85, 0.8, 0.75)
_DTYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
_WHOLE = ("embedding", "router", "scale")
_SUMMED = {"attention.output": (0, 1)}
"""The dimensions that products sum over, where it isn't the first alone."""


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is quantised, in a model that is."""
    return tensor.path[-1] not in _WHOLE


def scale_shape(tensor: Tensor, bits: Bits) -> tuple[int, ...]:
    """The shape of a tensor's scales: 1, or the number of groups, in a dimension that is summed over."""
    summed = _SUMMED.get(tensor.kind, (0,))
    if bits == "int8":
        return tuple(1 if axis in summed else size for axis, size in enumerate(tensor.shape))
    along = summed[-1]
    return tuple(size // int(np.gcd(size, GROUP)) if axis == along else size for axis, size in enumerate(tensor.shape))


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
    scale = np.abs(grouped).max(axis=inside, keepdims=True) / 127 if bits == "int8" else _best_scale(grouped, inside)
    values = _rounded(grouped, scale, bits).astype(np.int8).astype(_DTYPES[bits])
    return Quantized(values.reshape(weight.shape), scale.reshape(shape))


def _rounded(grouped: np.ndarray, scale: np.ndarray, bits: Bits) -> np.ndarray:
    """The nearest whole numbers, in float32."""
    least, most = _RANGE[bits]
    # A group of zeros has the scale 0, and any value does.
    return np.clip(np.rint(grouped / np.where(scale == 0, 1, scale)), least, most)


def _best_scale(grouped: np.ndarray, inside: tuple[int, ...]) -> np.ndarray:
    """Of some scales the one that leaves each group the least squared error.

    The value that is largest either way becomes -8, so that no number is spared for the other way; a smaller scale cuts
    it off, for finer steps between the others. A quarter less error than absmax / 7.
    """
    most, least = grouped.max(axis=inside, keepdims=True), grouped.min(axis=inside, keepdims=True)
    largest = np.where(most > -least, most, least)
    best, smallest = largest / -8, np.full_like(largest, np.inf)
    for ratio in _RATIOS:
        scale = largest * np.float32(ratio / -8)
        error = np.square(_rounded(grouped, scale, "int4") * scale - grouped).sum(axis=inside, keepdims=True)
        best, smallest = np.where(error < smallest, scale, best), np.minimum(error, smallest)
    return best
