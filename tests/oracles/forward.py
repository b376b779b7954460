"""The whole model in float64, dropless, every expert computed for every token: what its routers say."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixtral_jax.config import ModelConfig
from oracles import attention, mixture


def router_logits(config: ModelConfig, params: Any, batch: Any) -> list[np.ndarray]:
    """float64 [B, T, E] of each layer.

    Args:
      params: the parameter tree, float64.
      batch: its tokens, segment and position.
    """
    assert config.moe is not None
    seen_BTS = attention.mask(np.asarray(batch.segment), config.sliding_window)
    x_BTD = params["embedding"][batch.tokens]
    found = []
    for layer in range(config.num_layers):
        own = _layer(params["layers"], layer)
        x_BTD = x_BTD + _attention(
            config, own["attention"], _norm(config, x_BTD, own["attention_norm"]), batch, seen_BTS
        )
        y_BTD = _norm(config, x_BTD, own["feed_forward_norm"])
        moe = own["moe"]
        found.append(y_BTD @ moe["router"])
        expert_BTA, gate_BTA = mixture.route(found[-1], config.moe.experts_per_token)
        results_BTED = np.stack(
            [
                mixture.feed_forward(y_BTD, *(moe[name][e] for name in ("gate", "up", "down")))
                for e in range(len(moe["gate"]))
            ],
            axis=2,
        )
        chosen_BTAD = np.take_along_axis(results_BTED, expert_BTA[..., None], axis=2)
        real_BT1 = (batch.segment != 0)[..., None]
        x_BTD = x_BTD + np.einsum("bta,btad->btd", gate_BTA, chosen_BTAD) * real_BT1
    return found


def _layer(tree: Any, layer: int) -> Any:
    return {key: _layer(each, layer) if isinstance(each, dict) else each[layer] for key, each in tree.items()}


def _norm(config: ModelConfig, x_BTD: np.ndarray, weights: Any) -> np.ndarray:
    return x_BTD * (np.mean(x_BTD**2, -1, keepdims=True) + config.norm_eps) ** -0.5 * weights["scale"]


def _attention(config: ModelConfig, weights: Any, x_BTD: np.ndarray, batch: Any, seen_BTS: np.ndarray) -> np.ndarray:
    q_BTNH, k_BTKH, v_BTKH = (np.einsum("btd,dnh->btnh", x_BTD, weights[name]) for name in ("query", "key", "value"))
    q_BTNH, k_BTKH = (_rotated(config, x, batch.position) for x in (q_BTNH, k_BTKH))
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], config.num_kv_heads, -1, config.head_dim)
    mixed_BTNH = attention.attention(q_BTKGH, k_BTKH, v_BTKH, seen_BTS).reshape(q_BTNH.shape)
    return np.einsum("btnh,nhd->btd", mixed_BTNH, weights["output"])


def _rotated(config: ModelConfig, x_BTNH: np.ndarray, position_BT: np.ndarray) -> np.ndarray:
    """Dimension i turned with i + H / 2, by its position times theta ** (-2i / H)."""
    half = config.head_dim // 2
    # The frequencies are float32 in the model.
    frequency_H = np.float64(np.float32(config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)))
    angle_BT1H = position_BT[:, :, None, None] * frequency_H
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    cos, sin = np.cos(angle_BT1H), np.sin(angle_BT1H)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
