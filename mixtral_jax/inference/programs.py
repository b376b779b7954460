"""The jitted programs of continuous batching: pieces of prompts are taken in, texts begin, and all go on a few steps.

Every program has one shape, whatever the slots hold: a text's numbers don't depend on its neighbours, and nothing is
compiled once each program has run. A step takes in each slot's last token and what was proposed to follow it, draws the
model's own choice at each of these places, and goes on after the first that differs: proposals never change what is
drawn, only how many tokens a step yields.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mixtral_jax.inference.compiling import program
from mixtral_jax.inference.decode import forward, replicated, unembed
from mixtral_jax.inference.proposals import Proposer
from mixtral_jax.inference.sampling import EVERY_TOKEN, choose
from mixtral_jax.inference.slots import (
    MOST_LOGPROBS,
    NO_LOGPROBS,
    Chosen,
    Model,
    Settings,
    Slots,
    active_values,
    keys,
    pinned,
)
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.cache import EMPTY, rewind


@program(static_argnames=("models", "fresh"), donate_argnames=("slots",))
def prefill(
    weights: tuple[Prepared, ...],
    slots: Slots,
    row_P: jax.Array,
    tokens_PT: jax.Array,
    real_PT: jax.Array,
    *,
    models: tuple[Model, ...],
    fresh: bool,
) -> Slots:
    """Takes a piece of each of P prompts into the caches.

    Args:
      row_P: int32, the prompts' slots; the number of slots where there are fewer prompts.
      fresh: whether the texts begin here; what the slots held is forgotten.
    """
    caches = []
    for own, cache, model in zip(weights, slots.caches, models, strict=True):
        _, after = forward(own, tokens_PT, real_PT, cache, model.config, model.execution, fresh, row_P)
        assert after is not None
        caches.append(after)
    return pinned(slots._replace(caches=tuple(caches)))


@program(donate_argnames=("slots",))
def begin(
    slots: Slots,
    row_P: jax.Array,
    token_P: jax.Array,
    length_P: jax.Array,
    settings: Settings,
    index_P: jax.Array,
    seen_PV: jax.Array,
    history_PN: jax.Array,
) -> Slots:
    """Has rows decode, whose caches hold all of a prompt but its last token.

    Args:
      row_P: int32; the number of slots where there are fewer texts.
      token_P: int32, each prompt's last.
      length_P: int32, the tokens before it; with none, what the row held is forgotten.
      settings: the texts', each [P, ...].
      index_P: uint32, which of the texts of its key it is.
      seen_PV: bool, the prompt's tokens.
      history_PN: int32, the prompt, -1 after its end.
    """

    def put(every: jax.Array, own: jax.Array | bool | int) -> jax.Array:
        return every.at[row_P].set(own, mode="drop")

    caches = tuple(
        cache._replace(
            position_BR=put(
                cache.position_BR,
                jnp.where(length_P[:, None] > 0, cache.position_BR.at[row_P].get(mode="clip"), EMPTY),
            ),
            length_B=put(cache.length_B, length_P),
        )
        for cache in slots.caches
    )
    key_P2 = jax.random.key_data(keys(settings.key, index_P))
    return pinned(
        Slots(
            caches=caches,
            settings=jax.tree.map(put, slots.settings, settings._replace(key=key_P2)),
            token_B=put(slots.token_B, token_P),
            count_B=put(slots.count_B, 0),
            active_B=put(slots.active_B, True),
            seen_BV=put(slots.seen_BV, seen_PV),
            history_BN=put(slots.history_BN, history_PN),
        )
    )


@program(static_argnames=("models", "proposer", "most_steps"), donate_argnames=("slots",))
def decode(
    weights: tuple[Prepared, ...],
    slots: Slots,
    goes_on_B: jax.Array,
    steps: jax.Array,
    allowed_BW: jax.Array,
    *,
    models: tuple[Model, ...],
    proposer: Proposer,
    most_steps: int,
) -> tuple[Slots, Chosen]:
    """Up to so many steps of all active rows, fewer where all end before.

    Args:
      goes_on_B: bool; rows of which the host wants no more are False.
      steps: int32, at most most_steps.
      allowed_BW: uint32, a bit for each token that may come next. Rows that are constrained take one step a call.
    """
    slots = slots._replace(active_B=slots.active_B & goes_on_B)
    batch, per_step = slots.token_B.shape[0], proposer.tokens + 1
    room = most_steps * per_step

    def unfinished(carry: tuple[jax.Array, Slots, Chosen]) -> jax.Array:
        return (carry[0] < steps) & jnp.any(carry[1].active_B)

    def step(carry: tuple[jax.Array, Slots, Chosen]) -> tuple[jax.Array, Slots, Chosen]:
        done, slots, so_far = carry
        slots, chosen = _step(weights, slots, allowed_BW, models, proposer)
        return done + 1, slots, _appended(so_far, chosen)

    nothing = Chosen(
        token_BM=jnp.zeros((batch, room), jnp.int32),
        logprob_BM=jnp.zeros((batch, room), jnp.float32),
        top_BMA=jnp.zeros((batch, room, MOST_LOGPROBS), jnp.int32),
        top_logprob_BMA=jnp.zeros((batch, room, MOST_LOGPROBS), jnp.float32),
        count_B=jnp.zeros((batch,), jnp.int32),
        proposed=jnp.zeros((), jnp.int32),
        accepted=jnp.zeros((), jnp.int32),
    )
    _, slots, chosen = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), slots, nothing))
    return pinned(slots), replicated(chosen)


def _step(
    weights: tuple[Prepared, ...],
    slots: Slots,
    allowed_BW: jax.Array,
    models: tuple[Model, ...],
    proposer: Proposer,
) -> tuple[Slots, Chosen]:
    """One step: propose, take in, choose, and go back to the first proposal that was wrong.

    With two proposals, and the model's choices beside them:

        taken in      token  a  b
        proposed             a  b
        chosen        a      c  .     a was right and b was not: a and c are new, c is the next token
    """
    length_B = slots.caches[0].length_B
    proposal_BD, draft_caches = proposer.propose(weights, slots, models)
    token_BT = jnp.concatenate([slots.token_B[:, None], proposal_BD], axis=1)
    # A row's proposals end where one is -1.
    real_BT = slots.active_B[:, None] & (jnp.cumsum(token_BT < 0, axis=1) == 0)
    main = models[0]
    hidden_BTD, cache = forward(
        weights[0], jnp.maximum(token_BT, 0), real_BT, slots.caches[0], main.config, main.execution
    )
    assert cache is not None
    logits_BTV = unembed(weights[0], hidden_BTD, main.execution)
    choice_BT = _choices(logits_BTV, token_BT, slots, allowed_BW)
    right_BD = (proposal_BD == choice_BT[:, :-1]) & real_BT[:, 1:]
    # What a constrained text may say after its next token is not known yet.
    right_BD &= jnp.all(allowed_BW == EVERY_TOKEN, axis=1, keepdims=True)
    new_B = 1 + jnp.sum(jnp.cumprod(right_BD, axis=1), axis=1, dtype=jnp.int32)
    new_B, ended_B = _cut(choice_BT, new_B, slots)
    caches = tuple(rewind(each, length_B + new_B) if proposer.tokens else each for each in (cache, *draft_caches))
    row_B, place_BT = jnp.arange(new_B.shape[0]), jnp.arange(choice_BT.shape[1])[None]
    is_new_BT = place_BT < new_B[:, None]
    last_B = jnp.take_along_axis(choice_BT, jnp.maximum(new_B - 1, 0)[:, None], axis=1)[:, 0]
    size = slots.history_BN.shape[1]
    history_BT = jnp.where(is_new_BT, length_B[:, None] + 1 + place_BT, size)
    vocabulary = slots.seen_BV.shape[1]
    after = slots._replace(
        caches=caches,
        token_B=jnp.where(slots.active_B, last_B, slots.token_B),
        count_B=slots.count_B + new_B,
        active_B=slots.active_B & ~ended_B,
        seen_BV=slots.seen_BV.at[row_B[:, None], jnp.where(is_new_BT, choice_BT, vocabulary)].set(True, mode="drop"),
        history_BN=slots.history_BN.at[row_B[:, None], history_BT].set(choice_BT, mode="drop"),
    )
    chosen = _record(logits_BTV, choice_BT, slots.settings, new_B)
    proposed = jnp.sum(real_BT[:, 1:], dtype=jnp.int32)
    accepted = jnp.sum(jnp.maximum(new_B - 1, 0))
    return after, chosen._replace(proposed=proposed, accepted=accepted)


def _choices(logits_BTV: jax.Array, token_BT: jax.Array, slots: Slots, allowed_BW: jax.Array) -> jax.Array:
    """The model's choice after each token, int32 [B, T], given that all before it are the text's."""
    choices, seen_BV, row_B = [], slots.seen_BV, jnp.arange(token_BT.shape[0])
    values = active_values(slots)
    for place in range(token_BT.shape[1]):
        if place > 0:
            seen_BV = seen_BV.at[row_B, token_BT[:, place]].set(True, mode="drop")
        key_B = keys(slots.settings.key, slots.count_B + place)
        choices.append(choose(logits_BTV[:, place], key_B, seen_BV, values, allowed_BW if place == 0 else None))
    return jnp.stack(choices, axis=1)


def _cut(choice_BT: jax.Array, new_B: jax.Array, slots: Slots) -> tuple[jax.Array, jax.Array]:
    """How many of the new tokens come before a text's end, the one that ends it among them; and whether it ends."""
    settings = slots.settings
    new_B = jnp.minimum(new_B, settings.limit - slots.count_B)
    stops_BT = jnp.any(choice_BT[..., None] == settings.stop_X[:, None], axis=-1)
    size = choice_BT.shape[1]
    until_B = jnp.min(jnp.where(stops_BT, jnp.arange(size)[None] + 1, size + 1), axis=1)
    ended_B = (until_B <= new_B) | (slots.count_B + new_B >= settings.limit)
    return jnp.where(slots.active_B, jnp.minimum(new_B, until_B), 0), ended_B


def _record(logits_BTV: jax.Array, token_BT: jax.Array, settings: Settings, count_B: jax.Array) -> Chosen:
    """Tokens with the probabilities that their texts asked for."""

    def look(logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logprob_BTV = jax.nn.log_softmax(logits_BTV)
        top_logprob_BTA, top_BTA = jax.lax.top_k(logprob_BTV, min(MOST_LOGPROBS, logprob_BTV.shape[-1]))
        missing = [(0, 0), (0, 0), (0, MOST_LOGPROBS - top_BTA.shape[-1])]
        own_BT = jnp.take_along_axis(logprob_BTV, token_BT[..., None], axis=-1)[..., 0]
        return own_BT, jnp.pad(top_BTA, missing, constant_values=-1), jnp.pad(top_logprob_BTA, missing)

    def skip(logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        top = (*token_BT.shape, MOST_LOGPROBS)
        return jnp.zeros(token_BT.shape), jnp.zeros(top, jnp.int32), jnp.zeros(top)

    wanted = jnp.any((settings.logprobs > NO_LOGPROBS) & (count_B > 0))
    zero = jnp.zeros((), jnp.int32)
    own_BT, top_BTA, top_logprob_BTA = jax.lax.cond(wanted, look, skip, logits_BTV)
    return Chosen(token_BT, own_BT, top_BTA, top_logprob_BTA, count_B, zero, zero)


def _appended(so_far: Chosen, chosen: Chosen) -> Chosen:
    """The new tokens after those that came before, in each row's own place."""
    row_B1 = jnp.arange(chosen.count_B.shape[0])[:, None]
    place_1T = jnp.arange(chosen.token_BM.shape[1])[None]
    place_BT = so_far.count_B[:, None] + place_1T
    place_BT = jnp.where(place_1T < chosen.count_B[:, None], place_BT, so_far.token_BM.shape[1])

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        return rows.at[row_B1, place_BT].set(new, mode="drop")

    return Chosen(
        token_BM=put(so_far.token_BM, chosen.token_BM),
        logprob_BM=put(so_far.logprob_BM, chosen.logprob_BM),
        top_BMA=put(so_far.top_BMA, chosen.top_BMA),
        top_logprob_BMA=put(so_far.top_logprob_BMA, chosen.top_logprob_BMA),
        count_B=so_far.count_B + chosen.count_B,
        proposed=so_far.proposed + chosen.proposed,
        accepted=so_far.accepted + chosen.accepted,
    )
