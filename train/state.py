"""The state of training, created in its place on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import init_params
from mixtral_jax.sharding.partition import named_shardings
from mixtral_jax.sharding.rules import Rules


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    """int32, steps done."""
    params: Any
    """float32 master weights."""
    optimizer: Any
    """optax's state."""


Init = Callable[[ModelConfig, jax.Array], Any]
"""Makes fresh parameters, boxed with the names of their axes."""


def create(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array, init: Init = init_params
) -> TrainState:
    """A fresh state; its arrays are boxed with the names of their axes, the optimizer's like their parameters'."""
    params = init(config, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    init: Init = init_params,
) -> tuple[TrainState, TrainState]:
    """The state's shapes and dtypes with their shardings, and the shardings alone; nothing is allocated.

    Raises:
      InputError: dimensions that the mesh does not divide.
    """
    boxed = jax.eval_shape(lambda: create(config, optimizer, jax.random.key(0), init))
    shardings = named_shardings(mesh, boxed, rules)
    shaped = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )
    return shaped, shardings


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    seed: int,
    init: Init = init_params,
) -> TrainState:
    """A fresh state, each array made where it belongs: none is ever whole on one device."""
    _, shardings = abstract_state(config, optimizer, mesh, rules, init)
    make = jax.jit(lambda key: nn.unbox(create(config, optimizer, key, init)), out_shardings=shardings)
    return make(jax.random.key(seed))


def state_of(
    params: Any, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
    """The state before the first step of a run that begins with these parameters, which lie as the rules store them."""
    _, shardings = abstract_state(config, optimizer, mesh, rules)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, moments)
