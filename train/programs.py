"""A run's jitted functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.objective import make_objective
from mixtral_jax.train.optimizer import learning_rate, make_optimizer
from mixtral_jax.train.setting import Setting
from mixtral_jax.train.state import abstract_state
from mixtral_jax.train.step import make_step
from mixtral_jax.train.validation import make_validation


class Programs(NamedTuple):
    """A run's jitted functions and where its arrays lie."""

    mesh: Mesh
    step: Any
    validation: Any
    batch_sharding: NamedSharding
    largest: Any
    """Of an array with an element a device."""


def make_programs(config: TrainConfig, mesh: Mesh, setting: Setting, frozen: Any) -> Programs:
    """The functions, with what is frozen given to them; nothing is compiled yet."""
    model = Transformer(config.model, config.execution, config.dispatch, TRAINING, config.losses.router)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate(config.optimizer, config.steps)
    _, shardings = abstract_state(config.model, optimizer, mesh, TRAINING, setting.init)
    everywhere = NamedSharding(mesh, PartitionSpec())
    objective, whole = partial(make_objective, config.objective), setting.whole
    chosen = objective(model, config.losses)
    step = make_step(model, config.losses, optimizer, schedule, config.accumulation, chosen, whole, config.seed)
    validation = make_validation(model, config.losses, objective, whole)
    return Programs(
        mesh=mesh,
        # The state comes out laid out as it went in, so that the next step is the same program; numbers, on every
        # process.
        step=_with(frozen, jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))),
        validation=_with(frozen, jax.jit(validation, out_shardings=everywhere)),
        batch_sharding=NamedSharding(mesh, TRAINING.use(("batch", "length"))),
        largest=jax.jit(jnp.max, out_shardings=everywhere),
    )


def _with(frozen: Any, program: Callable) -> Callable:
    """The program with what is frozen as its third argument."""
    return program if frozen is None else lambda state, batch, **more: program(state, batch, frozen, **more)
