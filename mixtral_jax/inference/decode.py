"""The jitted parts of inference: a forward pass over prepared weights, prefill in chunks, and the decode loop."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.inference.compiling import program
from mixtral_jax.inference.sampling import Form, Values, sample
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.attention import Context
from mixtral_jax.model.backends.bits import bits, numbers
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.cache import Cache, LayerCache, empty_cache, view
from mixtral_jax.model.norm import RMSNorm
from mixtral_jax.model.rope import rotation
from mixtral_jax.model.transformer import Block
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.partition import constrain
from mixtral_jax.sharding.rules import DECODING

CACHE_AXES: Names = (None, "kv_heads", None, "head_dim")
"""Of a layer's keys and values."""


def forward(
    weights: Prepared,
    tokens_BT: jax.Array,
    real_BT: jax.Array,
    cache: Cache | None,
    config: ModelConfig,
    execution: Execution,
    fresh: bool = False,
    row_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The last layer's normalised output [B, T, D] for a chunk of tokens, and the cache with them in it.

    Args:
      tokens_BT: int32.
      real_BT: bool; each row's real tokens come first, the rest is padding.
      cache: what came before; None: nothing did, and nothing is kept.
      fresh: whether the texts begin here; see `view`.
      row_B: int32, the cache's row of each of these; see `view`.
    """
    if cache is None:
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        window_view = None
    else:
        window_view, cache, position_BT = view(cache, real_BT, config.sliding_window, fresh, row_B)
    angles = rotation(position_BT, config.head_dim, config.rope_theta)
    context = Context(angles, real_BT, view=window_view)
    x_BTD = embed(weights, tokens_BT, execution)
    layers = []
    for index, variables in enumerate(weights.layers):
        layer = None if cache is None else cache.layers[index]
        x_BTD, layer = _layer(variables, x_BTD, context, layer, config=config, execution=execution)
        layers.append(layer)
    x_BTD = RMSNorm(config.norm_eps).apply({"params": weights.norm}, x_BTD)
    return x_BTD, None if cache is None else cache._replace(layers=tuple(layers))


@partial(jax.jit, static_argnames=("config", "execution"))
def _layer(
    variables: Any,
    x_BTD: jax.Array,
    context: Context,
    cache: LayerCache | None,
    *,
    config: ModelConfig,
    execution: Execution,
) -> tuple[jax.Array, LayerCache | None]:
    """One layer; jitted, so that it's traced once for all of them, which otherwise takes longer than to compile."""
    x_BTD, (_, cache) = Block(config, execution, rules=DECODING).apply(variables, x_BTD, context, cache)
    return x_BTD, jax.tree.map(lambda each: constrain(each, CACHE_AXES, DECODING), cache)


def embed(weights: Prepared, tokens_BT: jax.Array, execution: Execution) -> jax.Array:
    """The tokens' rows of the embedding, [B, T, D]."""

    def on_cpu(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return numbers(bits(table_VD)[tokens_BT])

    def elsewhere(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return table_VD[tokens_BT]

    if weights.embedding_VD.dtype == jnp.bfloat16:
        x_BTD = jax.lax.platform_dependent(weights.embedding_VD, tokens_BT, cpu=on_cpu, default=elsewhere)
    else:
        x_BTD = elsewhere(weights.embedding_VD, tokens_BT)
    return x_BTD.astype(execution.activation_dtype)


def unembed(weights: Prepared, hidden_BTD: jax.Array, execution: Execution) -> jax.Array:
    """Logits, float32 [B, T, V]."""
    if weights.unembedding_DV is None:
        return einsum("BTD,VD->BTV", hidden_BTD, weights.embedding_VD, dtype=execution.product_dtype)
    return einsum("BTD,DV->BTV", hidden_BTD, weights.unembedding_DV, dtype=execution.product_dtype)


@program(static_argnames=("config", "execution"))
def logits(
    weights: Prepared, tokens_BT: jax.Array, real_BT: jax.Array, *, config: ModelConfig, execution: Execution
) -> jax.Array:
    """Logits of every token of whole texts, float32 [B, T, V]."""
    hidden_BTD, _ = forward(weights, tokens_BT, real_BT, None, config, execution)
    return unembed(weights, hidden_BTD, execution)


@program(static_argnames=("config", "execution", "fresh"), donate_argnames=("cache", "last_BD"))
def prefill(
    weights: Prepared,
    cache: Cache,
    last_BD: jax.Array,
    tokens_BT: jax.Array,
    real_BT: jax.Array,
    *,
    config: ModelConfig,
    execution: Execution,
    fresh: bool,
) -> tuple[Cache, jax.Array]:
    """Takes in a chunk of prompts.

    Args:
      last_BD: the output at each row's last token so far.

    Returns:
      The cache, and the output at each row's last token, moved on where the row has tokens in this chunk.
    """
    hidden_BTD, after = forward(weights, tokens_BT, real_BT, cache, config, execution, fresh)
    assert after is not None
    count_B = jnp.sum(real_BT, axis=1)
    index_B = jnp.maximum(count_B - 1, 0)
    here_BD = jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0]
    return after, jnp.where(count_B[:, None] > 0, here_BD, last_BD)


class DecodeState(NamedTuple):
    """What the decode loop carries, a row for each text."""

    cache: Cache
    token_B: jax.Array
    """int32, chosen last and not yet in the cache."""
    output_BM: jax.Array
    """int32, the new tokens; what stands at count and after means nothing."""
    count_B: jax.Array
    """int32, new tokens so far."""
    finished_B: jax.Array
    """bool: the row takes no more part."""
    key_B: jax.Array
    """A random key a row; token n of a row is drawn with fold_in(key, n)."""
    seen_BV: jax.Array | None
    """bool, tokens of the text so far, for the repetition penalty."""


def laid_out(cache: Cache) -> Cache:
    """The cache laid out as programs take it and leave it: on a mesh, another layout would be another program's."""
    layers = jax.tree.map(lambda each: constrain(each, CACHE_AXES, DECODING), cache.layers)
    return Cache(layers, *replicated((cache.position_BR, cache.length_B)))


def replicated(tree: Any) -> Any:
    """Arrays that are whole on each device of the mesh, if there is one."""
    return jax.tree.map(lambda each: constrain(each, (None,) * each.ndim, DECODING), tree)


@partial(jax.jit, static_argnames=("batch", "slots", "max_new_tokens", "config", "execution"))
def empty_state(
    key: jax.Array,
    seen_BV: jax.Array | None,
    *,
    batch: int,
    slots: int,
    max_new_tokens: int,
    config: ModelConfig,
    execution: Execution,
) -> tuple[DecodeState, jax.Array]:
    """A state of texts that have not begun, and the `last_BD` that their prefill begins with.

    One program: array by array it would be many, and on a mesh each device would first hold the whole cache.

    Args:
      key: a random key; a row's own does not depend on how many rows there are.
    """
    state = DecodeState(
        cache=laid_out(empty_cache(config, batch, slots, execution.kept_dtype)),
        token_B=jnp.zeros((batch,), jnp.int32),
        output_BM=jnp.zeros((batch, max_new_tokens), jnp.int32),
        count_B=jnp.zeros((batch,), jnp.int32),
        finished_B=jnp.zeros((batch,), bool),
        key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)),
        seen_BV=seen_BV,
    )
    return state, jnp.zeros((batch, config.dim), execution.activation_dtype)


@program(static_argnames=("execution", "form", "stop_ids"), donate_argnames=("state",))
def first_token(
    weights: Prepared,
    state: DecodeState,
    last_BD: jax.Array,
    values: Values,
    *,
    execution: Execution,
    form: Form,
    stop_ids: tuple[int, ...],
) -> DecodeState:
    """Chooses each row's first new token, from the output at its prompt's end."""
    return _choose(state, unembed(weights, last_BD[:, None], execution)[:, 0], form, values, stop_ids)


@program(static_argnames=("config", "execution", "form", "stop_ids"), donate_argnames=("state",))
def decode(
    weights: Prepared,
    state: DecodeState,
    steps: jax.Array,
    values: Values,
    *,
    config: ModelConfig,
    execution: Execution,
    form: Form,
    stop_ids: tuple[int, ...],
) -> DecodeState:
    """Up to so many steps, in one program; fewer where all rows finish before.

    Args:
      steps: int32.
      form, values: how to choose tokens.
      stop_ids: tokens that end a row; they are part of its output.
    """

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        return (carry[0] < steps) & ~jnp.all(carry[1].finished_B)

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        done, state = carry
        return done + 1, decode_step(weights, state, values, config, execution, form, stop_ids)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]


def decode_step(
    weights: Prepared,
    state: DecodeState,
    values: Values,
    config: ModelConfig,
    execution: Execution,
    form: Form,
    stop_ids: tuple[int, ...],
) -> DecodeState:
    """Takes in each row's last token and chooses the next."""
    hidden_BTD, cache = forward(
        weights, state.token_B[:, None], ~state.finished_B[:, None], state.cache, config, execution
    )
    assert cache is not None
    logits_BV = unembed(weights, hidden_BTD, execution)[:, 0]
    return _choose(state._replace(cache=cache), logits_BV, form, values, stop_ids)


def _choose(
    state: DecodeState, logits_BV: jax.Array, form: Form, values: Values, stop_ids: tuple[int, ...]
) -> DecodeState:
    key_B = state.key_B if form.greedy else jax.vmap(jax.random.fold_in)(state.key_B, state.count_B)
    token_B = sample(logits_BV, key_B, state.seen_BV, form, values)
    row_B, goes_on_B = jnp.arange(token_B.shape[0]), ~state.finished_B
    limit = state.output_BM.shape[1]
    place_B = jnp.where(goes_on_B, state.count_B, limit)
    count_B = state.count_B + goes_on_B
    stopped_B = jnp.any(token_B[:, None] == jnp.array(stop_ids, jnp.int32)[None], axis=1)
    return state._replace(
        token_B=token_B,
        output_BM=state.output_BM.at[row_B, place_B].set(token_B, mode="drop"),
        count_B=count_B,
        finished_B=state.finished_B | stopped_B | (count_B >= limit),
        seen_BV=None if state.seen_BV is None else state.seen_BV.at[row_B, token_B].set(True),
    )
