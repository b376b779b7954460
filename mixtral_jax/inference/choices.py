"""Which experts each token of a text chooses, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.inference.decode import embed
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.attention import Context
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.rope import rotation
from mixtral_jax.model.routing import route
from mixtral_jax.model.transformer import Block
from mixtral_jax.sharding.rules import DECODING

_ROWS = 4
"""Windows that are read at a time."""


def choices(
    weights: Prepared,
    ids: Sequence[int],
    config: ModelConfig,
    execution: Execution,
    window: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The experts that every token of a text chooses, the text being read in windows that know nothing of each other.

    Returns:
      int32 [L, N, A], the best first, and int32 [N], each token's window.

    Raises:
      InputError: the model has no experts, the text no tokens, or the window is out of bounds.
    """
    if config.moe is None:
        raise InputError("model", "a Mistral", "it has no experts to route to; a Mixtral is needed")
    if not ids:
        raise InputError("text", 0, "a token or more is needed")
    if not 2 <= window <= config.max_position:
        raise InputError("--window", window, f"from 2 to the model's {config.max_position} positions")
    spans = [ids[start : start + window] for start in range(0, len(ids), window)]
    parts = []
    for first in range(0, len(spans), _ROWS):
        tokens_BT, real_BT = np.zeros((_ROWS, window), np.int32), np.zeros((_ROWS, window), bool)
        for row, span in enumerate(spans[first : first + _ROWS]):
            tokens_BT[row, : len(span)], real_BT[row, : len(span)] = span, True
        expert_LBTA = np.asarray(_forward(weights, tokens_BT, real_BT, config, execution))
        parts.append(expert_LBTA[:, real_BT])
        progress(min(len(ids), (first + _ROWS) * window), len(ids))
    return np.concatenate(parts, axis=1), np.arange(len(ids)) // window


def _forward(weights: Prepared, tokens_BT: Any, real_BT: Any, config: ModelConfig, execution: Execution) -> jax.Array:
    position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    context = Context(rotation(position_BT, config.head_dim, config.rope_theta), jnp.asarray(real_BT))
    x_BTD = embed(weights, tokens_BT, execution)
    found = []
    block = Block(config, execution, rules=DECODING)

    @jax.jit
    def layer(variables: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        (x_BTD, _), kept = block.apply(
            variables,
            x_BTD,
            context,
            capture_intermediates=lambda module, _: module.name == "feed_forward_norm",
            mutable=["intermediates"],
        )
        (seen_BTD,) = kept["intermediates"]["feed_forward_norm"]["__call__"]
        moe, assigned = variables["params"]["moe"], config.moe
        assert assigned is not None
        logits_BTE = einsum("BTD,DE->BTE", seen_BTD, moe["router"], dtype="float32")
        return x_BTD, route(logits_BTE, assigned.experts_per_token, moe.get("bias")).expert_BTA

    for variables in weights.layers:
        x_BTD, expert_BTA = layer(variables, x_BTD)
        found.append(expert_BTA)
    return jnp.stack(found)
