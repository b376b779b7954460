"""Direct preference optimisation: pairs of answers, their loss, and the frozen reference's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.losses import LossConfig, auxiliary, batch_cross_entropy, token_nats
from mixtral_jax.train.step import Objective, Sums, Totals


class PairBatch(NamedTuple):
    """A batch of pairs: the first half of the rows are the chosen answers, the second half the rejected, in one order.

    A micro-batch of every n-th row has both rows of its pairs, if n divides the pairs.

    Attributes:
      tokens, targets, segment, position, loss_weight: as Batch has them; answers alone carry weight.
      reference: float32 [B, T], the reference's log-probability of the row's answer, the same at each token, so that
        all fields lie on the mesh alike.
    """

    tokens: Any
    targets: Any
    segment: Any
    position: Any
    loss_weight: Any
    reference: Any


class Answers(NamedTuple):
    """Of P pairs, float32 [P] each."""

    chosen: jax.Array
    """Log-probability of the chosen answer."""
    rejected: jax.Array
    reference_chosen: jax.Array
    """The same by the reference."""
    reference_rejected: jax.Array
    chosen_tokens: jax.Array
    """Learnt tokens of the chosen answer, at least 1."""
    rejected_tokens: jax.Array


class Terms(NamedTuple):
    """Of each pair, float32 [P]."""

    loss: jax.Array
    reward_chosen: jax.Array
    """beta times how much likelier the answer is than by the reference, in nats."""
    reward_rejected: jax.Array


def preference_terms(
    answers: Answers, *, kind: str = "sigmoid", beta: float = 0.1, smoothing: float = 0.0, sft: float = 0.0
) -> Terms:
    """The loss of each pair (Rafailov et al., 2023, equation 7; Azar et al., 2023, equation 17), and its rewards.

    Args:
      kind: `sigmoid`, or `ipo`, whose log-probabilities are means over an answer's tokens.
      smoothing: the share of pairs that are taken to be the wrong way round.
      sft: coefficient of the chosen answer's nats a token.
    """
    gain_chosen = answers.chosen - answers.reference_chosen
    gain_rejected = answers.rejected - answers.reference_rejected
    if kind == "ipo":
        margin = gain_chosen / answers.chosen_tokens - gain_rejected / answers.rejected_tokens
        loss = jnp.square(margin - 1 / (2 * beta))
    else:
        margin = beta * (gain_chosen - gain_rejected)
        loss = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
    loss = loss - sft * answers.chosen / answers.chosen_tokens
    return Terms(loss, beta * gain_chosen, beta * gain_rejected)


def preference(model: Transformer, losses: LossConfig, terms: Callable[[Answers], Terms]) -> Objective:
    """The mean over pairs of a loss of their answers' log-probabilities."""

    def loss(params: Any, batch: PairBatch, total: Totals, key: jax.Array | None) -> Sums:
        bound = model.bind({"params": params}, rngs=None if key is None else {"jitter": key})
        hidden_BTD, routing = bound.hidden(batch.tokens, batch.segment, batch.position)
        head = _head(model, losses)
        unembedding_DV = bound.unembedding()
        nats_BT = token_nats(*jax.lax.stop_gradient((hidden_BTD, unembedding_DV)), batch.targets, **head)
        log_probability_B = -jnp.sum(nats_BT * batch.loss_weight, axis=1)
        real_P = _real(batch)

        def total_loss(log_probability_B: jax.Array) -> tuple[jax.Array, Terms]:
            found = terms(_answers(log_probability_B, batch))
            return jnp.sum(found.loss * real_P) / total.weight, found

        (value, found), slope_B = jax.value_and_grad(total_loss, has_aux=True)(log_probability_B)
        # A cross-entropy whose rows weigh as much as the loss falls by them has the loss's gradient, and is chunked
        # over sharded logits as pretraining's is; its value is of no use.
        weight_BT = -slope_B[:, None] * batch.loss_weight
        slope = batch_cross_entropy(hidden_BTD, unembedding_DV, batch.targets, weight_BT, **head)
        balance, z = (
            (jnp.zeros(()), jnp.zeros(())) if routing is None else auxiliary(routing, total.tokens, losses.balance_loss)
        )
        more = {
            "reward_chosen": found.reward_chosen,
            "reward_rejected": found.reward_rejected,
            "reward_margin": found.reward_chosen - found.reward_rejected,
            "reward_accuracy": (found.reward_chosen > found.reward_rejected).astype(jnp.float32),
        }
        means = {name: jnp.sum(value_P * real_P) / total.weight for name, value_P in more.items()}
        return Sums(value + (slope - jax.lax.stop_gradient(slope)), balance, z, routing, means)

    return Objective(lambda batch: jnp.sum(_real(batch)), loss)


def make_reference(model: Transformer, losses: LossConfig) -> Callable[[Any, PairBatch], jax.Array]:
    """The log-probability of each row's answer, float32 [B], to be jitted: what `PairBatch.reference` is made of."""

    def score(params: Any, batch: PairBatch) -> jax.Array:
        bound = model.bind({"params": params})
        hidden_BTD, _ = bound.hidden(batch.tokens, batch.segment, batch.position)
        head = _head(model, losses)
        nats_BT = token_nats(hidden_BTD, bound.unembedding(), batch.targets, **head)
        return -jnp.sum(nats_BT * batch.loss_weight, axis=1)

    return score


def _head(model: Transformer, losses: LossConfig) -> dict[str, Any]:
    return {"chunk": losses.chunk, "product_dtype": model.execution.product_dtype, "rules": model.rules}


def _real(batch: PairBatch) -> jax.Array:
    """1 for a pair, 0 for one of padding that fills a batch up."""
    rows_B = jnp.sum(batch.loss_weight, axis=1) > 0
    return rows_B[: len(rows_B) // 2].astype(jnp.float32)


def _answers(log_probability_B: jax.Array, batch: PairBatch) -> Answers:
    tokens_B = jnp.maximum(jnp.sum(batch.loss_weight, axis=1), 1.0)
    both = (log_probability_B, batch.reference[:, 0], tokens_B)
    halves = [half for each_B in both for half in jnp.split(each_B, 2)]
    return Answers(*halves)
