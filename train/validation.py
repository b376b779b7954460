"""Validation: the loss and the routing on held-out text, every token served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.metrics import VALIDATION
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.state import TrainState
from mixtral_jax.train.step import Objective, Totals, pretraining, routing_metrics


class Validation(NamedTuple):
    """What validation found."""

    loss: float
    """Nats a target, mean over all that carry loss."""
    tokens: int
    """Targets that carry loss."""
    load_LE: np.ndarray | None
    """Of each layer, tokens an expert over the mean; None for a Mistral."""


def make_validation(
    model: Transformer,
    losses: LossConfig,
    objective: Callable[[Transformer, LossConfig], Objective] = pretraining,
    whole: Callable[[Any, Any], Any] = lambda params, frozen: params,
) -> Callable[..., tuple]:
    """The step of validation, to be jitted: a batch's losses, weights and routing, as sums; see make_step."""
    # As in inference: a token's loss must not depend on who else wants its expert.
    dropless = model.clone(dispatch=replace(model.dispatch, capacity_factor=None))

    chosen = objective(dropless, losses)

    def step(params: Any, batch: Any, frozen: Any = None) -> tuple:
        one = Totals(jnp.ones(()), jnp.ones(()))
        sums = chosen.losses(whole(params, frozen), batch, one, None)
        return sums.loss, chosen.weight(batch), sums.routing

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


class Validator:
    """Validates a run, tells what it found and writes it into the run's folder.

    Args:
      step: `make_validation`'s, jitted.
      batches: gives all held-out batches, on the mesh.
      entropy: the held-out text's unigram entropy, None where it has none.
      folder: the run's; None: of several processes, one that only takes part.
      tell: is given what was found, and the entropy.
    """

    def __init__(
        self,
        step: Callable[[Any, Batch], tuple],
        batches: Callable[[], Iterable[Batch]],
        entropy: float | None,
        folder: Path | None,
        tell: Callable[[Validation, float | None], None],
    ):
        self._step, self._batches, self._entropy = step, batches, entropy
        self._folder, self._tell = folder, tell

    def __call__(self, state: TrainState) -> float:
        """The loss on held-out text."""
        found = validate(self._step, state.params, self._batches())
        if self._folder is None:
            return found.loss
        line = {"step": int(state.step), "loss": found.loss, "unigram_entropy": self._entropy, "tokens": found.tokens}
        line = {key: value for key, value in line.items() if value is not None}
        if found.load_LE is not None:
            line["load"] = found.load_LE.round(4).tolist()
        with open(self._folder / VALIDATION, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._tell(found, self._entropy)
        return found.loss
