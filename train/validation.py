"""Validation: the loss and the routing on held-out text, every token served."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.step import Totals, compute_losses, routing_metrics


class Validation(NamedTuple):
    """What validation found."""

    loss: float
    """Nats a target, mean over all that carry loss."""
    tokens: int
    """Targets that carry loss."""
    load_LE: np.ndarray | None
    """Of each layer, tokens an expert over the mean; None for a Mistral."""


def make_validation(model: Transformer, losses: LossConfig) -> Callable[[Any, Batch], tuple]:
    """The step of validation, to be jitted: a batch's nats, weights and routing, as sums."""
    # As in inference: a token's loss must not depend on who else wants its expert.
    dropless = model.clone(dispatch=replace(model.dispatch, capacity_factor=None))

    def step(params: Any, batch: Batch) -> tuple:
        one = Totals(jnp.ones(()), jnp.ones(()))
        sums = compute_losses(dropless, losses, params, batch, one)
        return sums.loss, jnp.sum(batch.loss_weight), sums.routing

    return step


def validate(step: Callable[[Any, Batch], tuple], params: Any, batches: Iterable[Batch]) -> Validation:
    """The mean over all batches."""
    total = None
    for batch in batches:
        part = step(params, batch)
        # Waits for each batch: nothing orders the programs of two, and devices that share threads could lock up.
        total = jax.block_until_ready(part if total is None else jax.tree.map(jnp.add, total, part))
    assert total is not None
    nats, weight, routing = total
    load = routing_metrics(routing).get("expert_load")
    return Validation(float(nats) / float(weight), int(weight), None if load is None else np.asarray(load))
