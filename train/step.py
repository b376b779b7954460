"""One step of training: loss, gradients over micro-batches, guard, update. A pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixtral_jax.model.routing import Statistics
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.losses import LossConfig, auxiliary, batch_cross_entropy
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.state import TrainState


class Totals(NamedTuple):
    """What a batch's sums are divided by, the same for each of its micro-batches: parts then add up exactly."""

    weight: jax.Array
    """float32, the loss weights' sum."""
    tokens: jax.Array
    """float32, real tokens."""


class Sums(NamedTuple):
    """What a forward pass adds to a batch's losses."""

    loss: jax.Array
    """float32, cross-entropy in nats over `Totals.weight`."""
    balance_loss: jax.Array
    z_loss: jax.Array
    routing: Statistics | None


Metrics = dict[str, jax.Array]


def totals(batch: Batch) -> Totals:
    """The divisors of a batch; at least 1, so that a batch without real tokens has loss zero."""
    real = jnp.sum((batch.segment != 0).astype(jnp.float32))
    return Totals(jnp.maximum(jnp.sum(batch.loss_weight), 1.0), jnp.maximum(real, 1.0))


def compute_losses(model: Transformer, losses: LossConfig, params: Any, batch: Batch, total: Totals) -> Sums:
    """The forward pass of a (micro-)batch."""
    bound = model.bind({"params": params})
    hidden_BTD, routing = bound.hidden(batch.tokens, batch.segment, batch.position)
    nats = batch_cross_entropy(
        hidden_BTD,
        bound.unembedding(),
        batch.targets,
        batch.loss_weight,
        chunk=losses.chunk,
        product_dtype=model.execution.product_dtype,
        rules=model.rules,
    )
    balance, z = (jnp.zeros(()), jnp.zeros(())) if routing is None else auxiliary(routing, total.tokens)
    return Sums(nats / total.weight, balance, z, routing)


def gradients(model: Transformer, losses: LossConfig, params: Any, batch: Batch, accumulation: int) -> tuple[Any, Sums]:
    """The gradient of loss + balance + z over a batch, taken in micro-batches of every accumulation-th row."""
    total = totals(batch)

    def objective(params: Any, micro: Batch) -> tuple[jax.Array, Sums]:
        sums = compute_losses(model, losses, params, micro, total)
        return sums.loss + losses.balance * sums.balance_loss + losses.z * sums.z_loss, sums

    differentiate = jax.grad(objective, has_aux=True)
    if accumulation == 1:
        return differentiate(params, batch)
    # Row i goes to micro-batch i mod accumulation: each shard keeps its own rows.
    micros = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), batch)

    def add(so_far: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, differentiate(params, micro)), None

    shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, micros)[0]


def make_step(
    model: Transformer,
    losses: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step, to be jitted with the state donated."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient, sums = gradients(model, losses, state.params, batch, accumulation)
        grad_norm = optax.tree.norm(gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss)
        # A skipped step counts as a step, so that the data goes on; all else stays bit by bit.
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after._replace(step=state.step), state)
        metrics = {
            "loss": sums.loss,
            "balance_loss": sums.balance_loss,
            "z_loss": sums.z_loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(_updates(state.optimizer)), jnp.float32),
            "skipped": ~finite,
            **routing_metrics(sums.routing),
        }
        return kept._replace(step=after.step), metrics

    return step


def _updates(optimizer_state: Any) -> jax.Array:
    """Updates done, int32: what the schedule goes by. A skipped step is not one."""
    return optax.tree.get_all_with_path(optimizer_state, "count")[0][1]


def routing_metrics(routing: Statistics | None) -> Metrics:
    """Means over real tokens, of the worst layer where it says so; the load by layer and expert is over its mean."""
    if routing is None:
        return {}
    tokens_L = jnp.maximum(routing.tokens, 1.0)
    mean_L1 = jnp.maximum(jnp.mean(routing.assigned_E, axis=-1, keepdims=True), 1.0)
    load_LE = routing.assigned_E / mean_L1
    return {
        "dropped_fraction": jnp.sum(routing.dropped) / jnp.maximum(jnp.sum(routing.assigned_E), 1.0),
        "expert_load_max": jnp.max(load_LE),
        "expert_load_min": jnp.min(load_LE),
        "router_entropy": jnp.mean(routing.entropy / tokens_L),
        "expert_load": load_LE,
    }
