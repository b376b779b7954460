"""The products of a training step of the tiny Mixtral, each alone, beside torch's: what the libraries allow.

What they take at these rates a step takes at least, about: in it they meet other caches and other work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.pieces import OURS, Calls, autocast, contenders, draw
from benchmarks.timing import Row, interleave, rates
from mixtral_jax.model.backends.products import einsum

PRODUCTS = {
    "unembedding": ("TD,DV->TV", {"T": 1024, "D": 256, "V": 32000}),
    "experts' gate and up": ("ECD,EDH->ECH", {"E": 8, "C": 640, "D": 256, "H": 512}),
    "experts' down": ("ECH,EHD->ECD", {"E": 8, "C": 640, "D": 256, "H": 512}),
    "queries": ("TD,DN->TN", {"T": 2048, "D": 256, "N": 256}),
    "keys": ("TD,DN->TN", {"T": 2048, "D": 256, "N": 64}),
}
"""Of 4 rows of 512 tokens, with capacity 1.25; the unembedding's of a chunk of the loss."""


def products(repeats: int) -> list[Row]:
    """Each with both gradients, from float32 operands: three products, and what it takes to cast them."""
    rows = []
    for name, (spec, size) in PRODUCTS.items():
        calls = product_calls(spec, size)
        work = 3 * 2 * math.prod(size.values()) / 1e9
        rows += rates(f"products, {name}", "GFLOP/s", work, interleave(calls, repeats, warm_up=1), OURS)
    return rows


def product_calls(spec: str, size: dict[str, int]) -> Calls:
    """Calls that give a product and its gradients by both operands."""
    x, w, dy = (draw(*(size[letter] for letter in dims)) for dims in spec.replace("->", ",").split(","))
    arrays = jax.device_put((x, w, dy))
    tensors = [torch.from_numpy(each).requires_grad_() for each in (x, w)]
    cotangent = torch.from_numpy(np.array(dy))

    def ours(dtype: str) -> Callable[[], Any]:
        @jax.jit
        def three(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
            y, backward = jax.vjp(partial(einsum, spec, dtype=dtype), x, w)
            return y, backward(dy)

        return lambda: jax.block_until_ready(three(*arrays))

    def theirs(dtype: str) -> Any:
        with autocast(dtype):
            y = torch.matmul(*tensors)
        return y, torch.autograd.grad(y, tensors, cotangent.to(y.dtype))

    return contenders(ours, "torch", theirs)
