"""Grouped-query attention with a sliding window (Mistral 7B paper, section 2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import linen as nn

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.model.backends.products import einsum, einsums
from mixtral_jax.model.cache import LayerCache, View, advance
from mixtral_jax.model.context_parallel import attention, attention_to_cache
from mixtral_jax.model.parameters import weight
from mixtral_jax.model.rope import Rotation, rotate
from mixtral_jax.sharding.axes import LogicalAxis
from mixtral_jax.sharding.partition import constrain
from mixtral_jax.sharding.rules import Rules


class Context(NamedTuple):
    """What the layers need to know of a batch of tokens besides the tokens."""

    rotation: Rotation
    mask_BT: jax.Array
    """bool, True for real tokens."""
    segment_BT: jax.Array | None = None
    """int32, the documents of a row; None where a row is one."""
    view: View | None = None
    """The tokens' places in the cache, where there is one."""


class Attention(nn.Module):
    """Queries, keys and values by product, rope, attention, and the product back."""

    config: ModelConfig
    execution: Execution
    rules: Rules

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention of x to itself or, given a cache, to what `context.view` shows of it; in the activation dtype."""
        config, execution = self.config, self.execution
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        q_BTNH, k_BTKH = rotate(q_BTNH, context.rotation), rotate(k_BTKH, context.rotation)
        grouped = (config.num_kv_heads, config.queries_per_kv_head, config.head_dim)
        q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], *grouped)
        keys, values, view = k_BTKH, v_BTKH, context.view
        if cache is not None:
            assert view is not None
            cache, keys, values = advance(cache, k_BTKH, v_BTKH, view)
        if view is None or view.seen is None:
            window = config.sliding_window
            mixed = attention(q_BTKGH, keys, values, context.segment_BT, window, execution, self.rules)
        else:
            mixed = attention_to_cache(q_BTKGH, keys, values, view.seen, execution, self.rules)
        dtype = execution.product_dtype
        mixed_BTNH = mixed.astype(execution.activation_dtype).reshape(q_BTNH.shape)
        shape = (config.num_heads, config.head_dim, config.dim)
        output_NHD = weight(self, "output", shape, ("heads", "head_dim", "embed"), self.rules, dtype)
        y_BTD = einsum("BTNH,NHD->BTD", mixed_BTNH, output_NHD, dtype=dtype, result_dtype=execution.activation_dtype)
        return y_BTD, cache

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], in the activation dtype."""
        config, execution, dtype = self.config, self.execution, self.execution.product_dtype
        x_BTD = x_BTD.astype(dtype)  # once, for the three products that save it

        def project(names: tuple[str, ...], heads: int, axis: LogicalAxis) -> list[jax.Array]:
            shape = (config.dim, heads, config.head_dim)
            weights = [weight(self, name, shape, ("embed", axis, "head_dim"), self.rules, dtype) for name in names]
            found = einsums("BTD,DNH->BTNH", x_BTD, weights, dtype=dtype, result_dtype=execution.activation_dtype)
            return [constrain(y_BTNH, ("batch", "length", axis, "head_dim"), self.rules) for y_BTNH in found]

        (q_BTNH,) = project(("query",), config.num_heads, "heads")
        k_BTKH, v_BTKH = project(("key", "value"), config.num_kv_heads, "kv_heads")
        return q_BTNH, k_BTKH, v_BTKH
