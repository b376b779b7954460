"""Models small enough to compile in a second, with weights large enough that every part shows in the output."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mixtral_jax.config import ModelConfig, MoEConfig
from mixtral_jax.model.transformer import abstract_params

FAMILIES = ("mistral", "mixtral")


def config(family: str, **changes: Any) -> ModelConfig:
    """Two layers of width 16; the Mixtral has four experts, two a token."""
    moe = MoEConfig(num_experts=4, experts_per_token=2) if family == "mixtral" else None
    defaults = {
        "dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "hidden_dim": 24,
        "vocab_size": 40,
        "sliding_window": 6,
        "moe": moe,
    }
    return ModelConfig(**(defaults | changes))


@cache
def params(config: ModelConfig, seed: int = 0) -> Any:
    """Random weights by fan-in, so that no layer's share is lost in the residual stream; norm scales near 1."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "scale":
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = {"output": config.num_heads * config.head_dim, "down": config.hidden_dim, "embedding": 1}
            values = rng.standard_normal(leaf.shape) * fan_in.get(name, config.dim) ** -0.5
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract_params(config)))


def tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """int32 [B, T]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
