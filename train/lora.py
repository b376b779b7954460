"""Training low-rank factors: made, laid out like their matrices, and merged inside the loss.

The loss is taken of weights into which the factors' product is added, so that every kernel, mesh and policy of remat
serves as it does without; what that costs is one more copy of the matrices that have factors, laid out as they are
stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mixtral_jax.checkpoints.adapter import INPUTS, OUTPUTS, LoraConfig, inputs
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor, assign, tensors
from mixtral_jax.sharding.axes import Names

_LETTERS = "ABCDEFGH"


def _first(config: ModelConfig) -> dict[tuple[str, ...], Tensor]:
    """One tensor of each leaf."""
    return {tensor.path: tensor for tensor in reversed(tensors(config))}


def _stack(tensor: Tensor) -> Names:
    names: Names = ("layers", "experts")
    return names[: len(tensor.index)]


def init_factors(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Any:
    """Fresh factors, boxed with the names of their axes: a uniform within 1 / sqrt(inputs) as peft's, b zero."""
    tree: dict[str, Any] = {}
    counts = {"layers": config.num_layers, "experts": config.moe.num_experts if config.moe else 1}
    for number, (path, tensor) in enumerate(sorted(_first(config).items())):
        if tensor.kind not in lora.kinds:
            continue
        split, names = inputs(tensor.kind), _stack(tensor)
        stack = tuple(counts[name] for name in names if name is not None)
        before, after = tensor.shape[:split], tensor.shape[split:]
        bound = math.prod(before) ** -0.5
        drawn = jax.random.uniform(
            jax.random.fold_in(key, number), (*stack, *before, lora.rank), minval=-bound, maxval=bound
        )
        boxes = {
            INPUTS: nn.LogicallyPartitioned(drawn, names=(*names, *tensor.axes[:split], None)),
            OUTPUTS: nn.LogicallyPartitioned(
                jnp.zeros((*stack, lora.rank, *after)), names=(*names, None, *tensor.axes[split:])
            ),
        }
        assign(tree, path, boxes)
    return tree


def merge(config: ModelConfig, lora: LoraConfig) -> Callable[[Any, Any], Any]:
    """The function of factors and the frozen weights that gives the model's parameters, float32."""
    leaves = _first(config)

    def whole(factors: Any, frozen: Any) -> Any:
        tree: dict[str, Any] = {}
        for path, tensor in leaves.items():
            leaf, pair = frozen, factors
            for key in path:
                leaf = leaf[key]
                pair = pair.get(key, {}) if isinstance(pair, dict) else {}
            weight = leaf.dequantized() if isinstance(leaf, Quantized) else leaf.astype(jnp.float32)
            if pair:
                weight = _added(weight, pair, tensor, lora.scale)
            assign(tree, path, weight)
        return tree

    return whole


def _added(weight: jax.Array, pair: Any, tensor: Tensor, scale: float) -> jax.Array:
    """weight + scale * a @ b, for each layer and expert."""
    stack, split = len(tensor.index), inputs(tensor.kind)
    letters = _LETTERS[: weight.ndim]
    before, after = letters[: stack + split], letters[:stack] + "r" + letters[stack + split :]
    product = jnp.einsum(f"{before}r,{after}->{letters}", pair[INPUTS], pair[OUTPUTS])
    return weight + scale * product
