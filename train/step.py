"""One step of training: loss, gradients over micro-batches, guard, update. A pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixtral_jax.model.balance import shift_bias
from mixtral_jax.model.routing import Statistics
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.losses import LossConfig, auxiliary, batch_cross_entropy
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


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
    more: Metrics | None = None
    """What else an objective tells of a step, by its name in metrics.jsonl."""


class Objective(NamedTuple):
    """What a run minimises, beside the routing's losses."""

    weight: Callable[[Any], jax.Array]
    """What a batch's loss is the mean over, float32: targets that carry loss, or pairs; 0 where there are none."""
    losses: Callable[[Any, Any, Totals, jax.Array | None], Sums]
    """Of the model's parameters, a (micro-)batch, and the key of the router's jitter, None for none."""


def learnt(batch: Any) -> jax.Array:
    """The weight of a batch's targets."""
    return jnp.sum(batch.loss_weight)


def totals(batch: Any, weight: Callable[[Any], jax.Array] = learnt) -> Totals:
    """The divisors of a batch; at least 1, so that a batch without real tokens has loss zero."""
    real = jnp.sum((batch.segment != 0).astype(jnp.float32))
    return Totals(jnp.maximum(weight(batch), 1.0), jnp.maximum(real, 1.0))


def compute_losses(
    model: Transformer, losses: LossConfig, params: Any, batch: Batch, total: Totals, key: jax.Array | None = None
) -> Sums:
    """The forward pass of a (micro-)batch; the key is of the router's jitter, None for none."""
    bound = model.bind({"params": params}, rngs=None if key is None else {"jitter": key})
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
    balance, z = (
        (jnp.zeros(()), jnp.zeros(())) if routing is None else auxiliary(routing, total.tokens, losses.balance_loss)
    )
    return Sums(nats / total.weight, balance, z, routing)


def pretraining(model: Transformer, losses: LossConfig) -> Objective:
    """The cross-entropy of targets that carry loss, mean over a batch."""
    return Objective(learnt, partial(compute_losses, model, losses))


def gradients(
    model: Transformer,
    losses: LossConfig,
    params: Any,
    batch: Any,
    accumulation: int,
    chosen: Objective | None = None,
    whole: Callable[[Any], Any] = lambda params: params,
    key: jax.Array | None = None,
) -> tuple[Any, Sums]:
    """The gradient of loss + balance + z over a batch, taken in micro-batches of every accumulation-th row.

    Args:
      chosen: the objective; None: pretraining.
      whole: makes the model's parameters of those that are trained.
      key: of the router's jitter; None for none.
    """
    chosen = chosen or pretraining(model, losses)
    total = totals(batch, chosen.weight)

    def objective(params: Any, micro: Any, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        sums = chosen.losses(whole(params), micro, total, key)
        return sums.loss + losses.balance * sums.balance_loss + losses.z * sums.z_loss, sums

    differentiate = jax.grad(objective, has_aux=True)
    if accumulation == 1:
        return differentiate(params, batch, key)
    # Row i goes to micro-batch i mod accumulation: each shard keeps its own rows.
    micros = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), batch)

    keys = None if key is None else jax.random.split(key, accumulation)

    def add(so_far: Any, micro: tuple[Any, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, differentiate(params, *micro)), None

    shapes = jax.eval_shape(differentiate, params, *jax.tree.map(lambda x: x[0], (micros, keys)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (micros, keys))[0]


def make_step(
    model: Transformer,
    losses: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int = 1,
    objective: Objective | None = None,
    whole: Callable[[Any, Any], Any] = lambda params, frozen: params,
    seed: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step, to be jitted with the state donated; its randomness is a function of the seed and the step's number.

    Args:
      objective: None: pretraining.
      whole: makes the model's parameters of those that are trained and of the step's third argument, which is not.

    Returns:
      The function of state, batch, what is frozen and, by name, `limit`: a step with a greater loss makes no update.
    """

    def step(
        state: TrainState, batch: Any, frozen: Any = None, *, limit: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        def of_all(params: Any) -> Any:
            return whole(params, frozen)

        key = jax.random.fold_in(jax.random.key(seed), state.step) if losses.jitter else None
        gradient, sums = gradients(model, losses, state.params, batch, accumulation, objective, of_all, key)
        grad_norm = optax.tree.norm(gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if losses.bias_rate:
            params = _balanced(params, state.params, sums.routing, losses.bias_rate)
        after = TrainState(state.step + 1, params, moments)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss)
        if limit is not None:
            good &= sums.loss <= limit
        # A skipped step counts as a step, so that the data goes on; all else stays bit by bit.
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after._replace(step=state.step), state)
        metrics = {
            "loss": sums.loss,
            "balance_loss": sums.balance_loss,
            "z_loss": sums.z_loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(_updates(state.optimizer)), jnp.float32),
            "skipped": ~good,
            **routing_metrics(sums.routing),
            **(sums.more or {}),
        }
        return kept._replace(step=after.step), metrics

    return step


def _balanced(params: Any, before: Any, routing: Statistics | None, rate: float) -> Any:
    """The parameters with the selection biases moved by the load: the optimizer has no say in them."""
    assert routing is not None
    layers, moe = params["layers"], params["layers"]["moe"]
    bias_LE = shift_bias(before["layers"]["moe"]["bias"], routing.assigned_E, rate)
    return params | {"layers": layers | {"moe": moe | {"bias": bias_LE}}}


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
