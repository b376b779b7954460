"""The losses of pretraining: cross-entropy in chunks, and the routing's auxiliary losses, by name."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax.config import STRICT, require
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.balance import BalanceName, RouterTraining, hf_global
from mixtral_jax.model.routing import Statistics
from mixtral_jax.model.transformer import UNEMBEDDING_AXES
from mixtral_jax.sharding.partition import gather_weight, over_tokens, split_axes
from mixtral_jax.sharding.rules import Rules

_Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """What is added to the cross-entropy, and how much of it."""

    balance: float = 0.02
    """Coefficient of the load-balancing loss; 0: none."""
    balance_loss: BalanceName = "per_sequence"
    """Whose tokens that loss is taken over."""
    z: float = 0.001
    """Coefficient of the squared log of the router's partition function."""
    jitter: float = 0.0
    """The router's input is multiplied by noise from 1 - jitter to 1 + jitter, in training alone."""
    bias_rate: float = 0.0
    """How far a step moves the selection bias of each expert towards an even load; needs `model.moe.selection_bias`."""
    chunk: int = 1024
    """Tokens of a device whose logits exist at a time, about; of each row at least one."""

    @model_validator(mode="after")
    def check(self) -> LossConfig:
        require(self.balance >= 0, "balance", self.balance, "zero or more")
        require(self.z >= 0, "z", self.z, "zero or more")
        require(0 <= self.jitter < 1, "jitter", self.jitter, "zero or more and below 1")
        require(self.bias_rate >= 0, "bias_rate", self.bias_rate, "zero or more")
        require(self.chunk > 0, "chunk", self.chunk, "a number of tokens above zero")
        return self

    @property
    def router(self) -> RouterTraining:
        """The part of it that happens inside the model."""
        return RouterTraining(self.balance_loss, self.jitter)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    chunk: int,
    product_dtype: str,
    parts: tuple[str, ...] = (),
) -> jax.Array:
    """The weighted sum of -log softmax(hidden @ unembedding)[target], in nats; logits exist a chunk at a time.

    The gradient is computed with the loss, while a chunk's logits are at hand, so that none are computed twice.

    Args:
      target_BT: int32 in [0, V).
      weight_BT: float32; a token of weight 0 counts for nothing, whatever its target.
      chunk: tokens at a time, about, of all rows together.
      product_dtype: of the products' operands; logits and softmax are float32.
      parts: inside a shard_map, the mesh axes whose shards have a part of the vocabulary each. The loss is then the
        same on all of them, and the gradient by hidden_BTD is a shard's part of a sum.

    Returns:
      float32, a scalar.
    """
    chunks = _chunks(chunk, hidden_BTD, target_BT, weight_BT)

    def step(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_BCD, target_BC, weight_BC = piece
        logits_BCV = einsum("BTD,DV->BTV", hidden_BCD, unembedding_DV, dtype=product_dtype)
        return total + jnp.sum(_losses(logits_BCV, target_BC, parts)[0] * weight_BC), None

    return jax.lax.scan(step, jnp.zeros(()), chunks)[0]


def _forward(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    chunk: int,
    product_dtype: str,
    parts: tuple[str, ...],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    chunks = _chunks(chunk, hidden_BTD, target_BT, weight_BT)
    w_DV = unembedding_DV.astype(product_dtype)

    def step(carry: _Pair, piece: tuple[jax.Array, ...]) -> tuple[_Pair, _Pair]:
        total, gradient_DV = carry
        hidden_BCD, target_BC, weight_BC = piece
        hidden_BCD = hidden_BCD.astype(product_dtype)
        logits_BCV = einsum("BTD,DV->BTV", hidden_BCD, w_DV, dtype=product_dtype)
        loss_BC, log_z_BC = _losses(logits_BCV, target_BC, parts)
        probability_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        d_logits_BCV = (probability_BCV - _hits(logits_BCV, target_BC, parts)) * weight_BC[..., None]
        d_logits_BCV = d_logits_BCV.astype(product_dtype)
        d_hidden_BCD = einsum("BTV,DV->BTD", d_logits_BCV, w_DV, dtype=product_dtype)
        gradient_DV += einsum("BTD,BTV->DV", hidden_BCD, d_logits_BCV, dtype=product_dtype)
        return (total + jnp.sum(loss_BC * weight_BC), gradient_DV), (d_hidden_BCD.astype(hidden_BTD.dtype), loss_BC)

    start = (jnp.zeros(()), jnp.zeros(unembedding_DV.shape, jnp.float32))
    (total, gradient_DV), (d_hidden_XBCD, loss_XBC) = jax.lax.scan(step, start, chunks)
    d_hidden_BTD = jnp.moveaxis(d_hidden_XBCD, 0, 1).reshape(hidden_BTD.shape[0], -1, hidden_BTD.shape[2])
    loss_BT = jnp.moveaxis(loss_XBC, 0, 1).reshape(hidden_BTD.shape[0], -1)
    length = hidden_BTD.shape[1]
    return total, (d_hidden_BTD[:, :length], gradient_DV.astype(unembedding_DV.dtype), loss_BT[:, :length])


def _backward(
    chunk: int,
    product_dtype: str,
    parts: tuple[str, ...],
    saved: tuple[jax.Array, jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_hidden_BTD, gradient_DV, loss_BT = saved
    # A result that all parts have reaches them as a share of its cotangent each.
    whole = jax.lax.psum(cotangent, parts) if parts else cotangent
    return (
        (d_hidden_BTD * whole).astype(d_hidden_BTD.dtype),
        (gradient_DV * whole).astype(gradient_DV.dtype),
        None,
        loss_BT * cotangent,
    )


cross_entropy.defvjp(_forward, _backward)


def _losses(logits_BTV: jax.Array, target_BT: jax.Array, parts: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """-log softmax at the target, and the log of the partition function; both over all parts of the vocabulary."""
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    if not parts:
        return log_z_BT - jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0], log_z_BT
    largest_BT = jax.lax.pmax(log_z_BT, parts)
    log_z_BT = largest_BT + jnp.log(jax.lax.psum(jnp.exp(log_z_BT - largest_BT), parts))
    at_target_BT = jnp.sum(jnp.where(_hits(logits_BTV, target_BT, parts), logits_BTV, 0), axis=-1)
    return log_z_BT - jax.lax.psum(at_target_BT, parts), log_z_BT


def _hits(logits_BTV: jax.Array, target_BT: jax.Array, parts: tuple[str, ...]) -> jax.Array:
    """Whether a logit is the target's, bool [B, T, V]."""
    own = logits_BTV.shape[-1]
    first = jax.lax.axis_index(parts) * own if parts else 0
    return first + jnp.arange(own, dtype=jnp.int32)[None, None] == target_BT[..., None]


def chunks_of(rows: int, length: int, chunk: int) -> tuple[int, int]:
    """How many chunks of about so many tokens there are of so many rows, and how many tokens of each row one has."""
    count = -(-length // max(1, min(chunk // rows, length)))
    return count, -(-length // count)


def _chunks(chunk: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Each array [B, T, ...] as X chunks [X, B, C, ...], padded with zeros to a whole number of them."""
    rows, length = arrays_BT[0].shape[:2]
    count, size = chunks_of(rows, length, chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays_BT)


def batch_cross_entropy(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    chunk: int,
    product_dtype: str,
    rules: Rules,
) -> jax.Array:
    """cross_entropy, each shard of the current mesh chunking its own tokens: the sum over all of them, float32.

    Left to the compiler, the unembedding's gradient would be summed over the mesh at every chunk.
    """

    def on_shard(hidden: jax.Array, target: jax.Array, weight: jax.Array, unembedding: jax.Array) -> jax.Array:
        unembedding = gather_weight(unembedding, UNEMBEDDING_AXES, rules, product_dtype)
        parts = split_axes("vocab", rules)
        return cross_entropy(hidden, unembedding, target, weight, chunk, product_dtype, parts)[None, None]

    on_shards = over_tokens(on_shard, UNEMBEDDING_AXES, rules, split=("vocab",))
    return jnp.sum(on_shards(hidden_BTD, target_BT, weight_BT, unembedding_DV))


def token_nats(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    target_BT: jax.Array,
    *,
    chunk: int,
    product_dtype: str,
    rules: Rules,
) -> jax.Array:
    """-log softmax(hidden @ unembedding)[target] of each token, float32 [B, T]; not to be differentiated.

    Each shard of the current mesh takes its own tokens, a chunk at a time.
    """

    def on_shard(hidden: jax.Array, target: jax.Array, unembedding: jax.Array) -> jax.Array:
        unembedding = gather_weight(unembedding, UNEMBEDDING_AXES, rules, product_dtype)
        parts = split_axes("vocab", rules)

        def step(_: None, piece: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
            hidden_BCD, target_BC = piece
            logits_BCV = einsum("BTD,DV->BTV", hidden_BCD, unembedding, dtype=product_dtype)
            return None, _losses(logits_BCV, target_BC, parts)[0]

        loss_XBC = jax.lax.scan(step, None, _chunks(chunk, hidden, target))[1]
        return jnp.moveaxis(loss_XBC, 0, 1).reshape(len(hidden), -1)[:, : hidden.shape[1]]

    on_shards = over_tokens(on_shard, UNEMBEDDING_AXES, rules, split=("vocab",))
    return on_shards(hidden_BTD, target_BT, unembedding_DV)


def auxiliary(
    routing: Statistics, tokens: jax.Array, name: BalanceName = "per_sequence"
) -> tuple[jax.Array, jax.Array]:
    """The balance loss and the z-loss of (a part of) a batch of so many real tokens: means over layers, but for the
    balance loss by the names of hf_global, which takes all layers together, and megatron, which sums over them."""
    if name == "hf_global":
        assert routing.probability_E is not None
        balance = hf_global(routing.assigned_E, routing.probability_E, routing.tokens)
    else:
        balance = (jnp.sum if name == "megatron" else jnp.mean)(routing.balance_loss)
    return balance / tokens, jnp.mean(routing.z_loss) / tokens
