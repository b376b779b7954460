"""Many requests at a time against one after another, in the engine, and in slots that have room for far more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from benchmarks.timing import Row, interleave, rates
from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.inference.engine import Engine
from mixtral_jax.inference.requests import EngineConfig, Request
from mixtral_jax.inference.runner import Loaded
from mixtral_jax.inference.weights import prepare
from mixtral_jax.model.transformer import init_params

REQUESTS, PROMPT, NEW = 64, 32, 32
ROOM = 4096
DTYPES = ("bfloat16", "float32")
OURS = f"{REQUESTS} at a time"


def batching(config: ModelConfig, repeats: int) -> list[Row]:
    """64 texts of 32 tokens and 32 more: all at once in 64 slots, in slots of 4,096 tokens, and one after another."""
    rows = []
    for dtype in DTYPES:
        seconds = interleave(calls(config, dtype), repeats, warm_up=1)
        # The eight of one call stand for as many calls as it takes for all.
        seconds["one at a time"] = [each * 8 for each in seconds["one at a time"]]
        rows += rates(f"engine, {dtype}", "new tokens/s", REQUESTS * NEW, seconds, OURS)
    return rows


def calls(config: ModelConfig, dtype: str) -> dict[str, Callable[[], Any]]:
    """Calls that serve the texts, but one at a time: an eighth of them."""
    execution = Execution(product_dtype=dtype)
    params = nn.unbox(init_params(config, jax.random.key(0)))
    loaded = Loaded(prepare(params, config, execution), config, execution)
    return {
        OURS: _requests(loaded, REQUESTS, REQUESTS),
        f"{OURS}, room for {ROOM}": _requests(loaded, REQUESTS, REQUESTS, ROOM),
        "one at a time": _requests(loaded, 1, REQUESTS // 8),
    }


def _requests(loaded: Loaded, slots: int, count: int, room: int = PROMPT + NEW) -> Callable[[], Any]:
    # Each at its best: all prompts that come at once are taken in together, half of each at a time.
    chunk = max(256, slots * PROMPT // 2)
    engine = Engine(loaded, EngineConfig(slots=slots, max_length=room, prefill_chunk=chunk, prefix_blocks=0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, loaded.config.vocab_size, (count, PROMPT)).tolist()

    def call() -> None:
        for prompt in prompts:
            engine.submit(Request(prompt=tuple(prompt), max_new_tokens=NEW))
        while engine.busy:
            engine.step()

    return call
