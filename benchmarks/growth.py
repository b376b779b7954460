"""How the cost of attention grows with length, window and none."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.timing import Row, interleave, rates
from mixtral_jax.model.backends.chunked import Keys, self_attention

WINDOW = 1024


def window(repeats: int) -> list[Row]:
    """Attention with W = 1024 at T = 4W, 8W and 16W: tokens a second should not fall by more than a tenth."""
    rows = []
    lengths = [4 * WINDOW, 8 * WINDOW, 16 * WINDOW]
    calls = {f"T = {length}, W = {WINDOW}": _attention(length, WINDOW) for length in lengths}
    calls |= {f"T = {length}, no window": _attention(length, None) for length in lengths[:2]}
    seconds = interleave(calls, repeats)
    for name, times in seconds.items():
        length = int(name.split()[2].rstrip(","))
        rows += rates("attention", "tokens/s", length, {name: times}, name)
    return rows


def _attention(length: int, window: int | None):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, 2, 2, 32), (1, length, 2, 32), (1, length, 2, 32)]
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    call = jax.jit(partial(self_attention, segment_BT=None, window=window, chunk=512, product_dtype="bfloat16"))
    return lambda: jax.block_until_ready(call(q, Keys(k, v)))
