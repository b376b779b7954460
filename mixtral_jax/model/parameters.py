"""How a module declares a weight: float32, normal with the models' standard deviation, its axes named."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.partition import use_weight
from mixtral_jax.sharding.rules import Rules

INIT_STD = 0.02
"""Of every matrix, whatever its fan-in, as in the published models' configs (`initializer_range`)."""


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], names: Names, rules: Rules, dtype: DTypeLike | None = None
) -> Any:
    """Declares a float32 matrix of the module and returns it as a layer uses it: gathered, where it is stored in parts.

    One that inference prepared in another form, such as Quantized, is returned as it is.

    Args:
      names: a logical axis for each dimension.
      dtype: of the product that it is for; on a mesh the weight comes in it.
    """
    if module.has_variable("prepared", name):
        return module.get_variable("prepared", name)
    return use_weight(stored_weight(module, name, shape, names), names, rules, dtype)


def stored_weight(module: nn.Module, name: str, shape: tuple[int, ...], names: Names) -> jax.Array:
    """Declares a float32 matrix of the module and returns it as it is stored, for a function over each shard."""
    initializer = nn.with_logical_partitioning(nn.initializers.normal(INIT_STD), names)
    return module.param(name, initializer, shape, jnp.float32)
