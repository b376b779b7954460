"""AdamW with clipping and a schedule, all optax's."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax.config import STRICT, require, require_positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) and its learning rate over time."""

    learning_rate: float
    """The peak."""
    warmup_steps: int = 0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up. `wsd`: warm-up, stable, and a linear decay over the last `decay_fraction` of the steps."""
    final_fraction: float = 0.1
    """What the rate goes down to, over the peak: the step after the last would have it."""
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norm scales are left alone."""
    clip_norm: float = 1.0
    """The largest global norm of the gradient; inf: any."""

    @model_validator(mode="after")
    def check(self) -> OptimizerConfig:
        require_positive(self, ("learning_rate", "epsilon"))
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "a number above zero is needed, inf for no clipping")
        for name in ("final_fraction", "decay_fraction"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "zero or more and below 1")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        return self


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of so many.

    Raises:
      InputError: the warm-up is longer than the run.
    """
    require(config.warmup_steps < steps, "optimizer.warmup_steps", config.warmup_steps, f"fewer than steps = {steps}")
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    remaining = steps - config.warmup_steps
    warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, max(config.warmup_steps - 1, 1))
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
        case "constant":
            after = optax.constant_schedule(peak)
        case "wsd":
            decay = max(1, round(remaining * config.decay_fraction))
            stable = optax.constant_schedule(peak)
            after = optax.join_schedules([stable, optax.linear_schedule(peak, last, decay)], [remaining - decay])
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, AdamW and the schedule, in that order; moments are float32 and laid out as their parameters."""
    return optax.chain(
        optax.identity() if math.isinf(config.clip_norm) else clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def clip_by_global_norm(clip_norm: float) -> optax.GradientTransformation:
    """optax's function of the same name, as a multiplication by one number.

    Theirs divides every element, which XLA on CPU does in a pass of its own: 5% of a step of the tiny Mixtral.
    """

    def clip(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(optax.tree.norm(updates), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda update: update * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), clip)


def _decayed(params: Any) -> Any:
    """True for matrices: neither a norm's scale nor a router's selection bias. The parameters may be boxed."""
    names = {jax.tree_util.DictKey("scale"), jax.tree_util.DictKey("bias")}
    return jax.tree_util.tree_map_with_path(lambda path, _: names.isdisjoint(path), params)
